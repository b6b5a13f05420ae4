"""Curves of the losses: the published formulas, drawn into the format that was asked for."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from commands import Capture, Tool, one_line
from retina.lab.curves import CURVES, sample


@pytest.mark.parametrize("name", ["focal", "softmax_focal"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_and_its_gradient_are_the_papers(name: str, gamma: float) -> None:
    """Equation 4 of the paper, and its derivative in appendix B for y = 1; two classes of a softmax are a sigmoid."""
    p, loss, gradient = sample(CURVES[name], gamma)
    torch.testing.assert_close(loss, -((1 - p) ** gamma) * p.log())
    torch.testing.assert_close(gradient, (1 - p) ** gamma * (gamma * p * p.log() + p - 1))


def test_soft_losses_are_least_at_their_target() -> None:
    p, loss, gradient = sample(CURVES["quality_focal"], 0.25)
    assert p[loss.argmin()] == pytest.approx(0.25, abs=1e-3)
    assert (gradient[p < 0.24] < 0).all()
    assert (gradient[p > 0.26] > 0).all()
    p, loss, _ = sample(CURVES["varifocal"], 0.0)
    torch.testing.assert_close(loss, -0.75 * p**2 * (1 - p).log())
    p, loss, _ = sample(CURVES["balanced_cross_entropy"], 0.75)
    torch.testing.assert_close(loss, -0.75 * p.log())


def test_losses_of_masks_and_distributions_are_the_published_formulas() -> None:
    for beta in (1.0, 3.0):
        p, loss, gradient = sample(CURVES["focal_dice"], beta)
        overlap = 2 * p / (1 + p)
        torch.testing.assert_close(loss, 1 - overlap ** (1 / beta))
        by_p = -(1 / beta) * overlap ** (1 / beta - 1) * 2 / (1 + p) ** 2
        torch.testing.assert_close(gradient, by_p * p * (1 - p))
    torch.testing.assert_close(sample(CURVES["dice"], 1.0)[1], sample(CURVES["focal_dice"], 1.0)[1])
    p, loss, gradient = sample(CURVES["distribution_focal"], 0.25)
    torch.testing.assert_close(loss, -0.75 * (1 - p).log() - 0.25 * p.log())
    torch.testing.assert_close(gradient, p - 0.25)


def test_every_loss_is_drawn_as_asked(tool: Tool, tmp_path: Path, capsys: Capture) -> None:
    for suffix, names in {"png": ",".join(CURVES), "svg": "varifocal"}.items():
        output = tmp_path / "figures" / f"family.{suffix}"
        assert tool("lab", "curves", f"losses=[{names}]", f"output={output}") == 0
        assert capsys.readouterr().out == f"written: {output}\n"
    with Image.open(tmp_path / "figures" / "family.png") as picture:
        assert picture.height > 3 * picture.width / 2, "a row of two panels for each"
        assert len(picture.convert("RGB").getcolors(2**24)) > 100
    text = (tmp_path / "figures" / "family.svg").read_text()
    assert text.startswith("<?xml")
    assert "varifocal" in text


def test_the_same_command_writes_the_same_bytes(tool: Tool, tmp_path: Path) -> None:
    command = ("lab", "curves", f"output={tmp_path / 'a.svg'}")
    assert tool(*command) == 0
    before = (tmp_path / "a.svg").read_bytes()
    assert tool(*command) == 0, "replaces its own figure"
    assert (tmp_path / "a.svg").read_bytes() == before
    assert tool(*command, "values=[3]") == 0
    assert (tmp_path / "a.svg").read_bytes() != before


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["losses=focl"], "losses: focl: no such loss - did you mean focal? There are focal, cross_entropy, "),
        (["losses=[focal,varifocal]", "values=[1]"], "values: of which parameter? - "),
        (["values=[-1]"], "values: -1 is not allowed - give gamma from 0, finite"),
        (["values=[inf]"], "values: inf is not allowed - give gamma from 0, finite"),
        (["values=[nan]"], "values: nan is not allowed - give gamma from 0, finite"),
        (["losses=balanced_cross_entropy", "values=[2]"], "values: 2 is not allowed - give alpha from 0 to 1"),
        (["losses=quality_focal", "values=[2]"], "values: 2 is not allowed - give target from 0 to 1"),
        (["losses=varifocal", "values=[-0.5]"], "values: -0.5 is not allowed - give target from 0 to 1"),
        (["losses=focal_dice", "values=[0.5]"], "values: 0.5 is not allowed - give beta from 1, finite"),
        (["losses=cross_entropy", "values=[2]"], "values: 2 is not allowed - give null"),
        (
            ["losses=ghm"],
            "losses: ghm: has no curve: it divides by how many elements of the batch have such a gradient",
        ),
        (["losses=[focal,ohem]"], "losses: ohem: has no curve: it chooses among the anchors of an image"),
        (["values=[a]"], "values: ['a'] is of the wrong type - give list[float] or null"),
        (["losses=[]"], "losses: nothing to draw"),
        (["output=a.gif"], "output: a.gif is of no known format - end it in .png or .svg"),
        (["gama=[1]"], "gama: no such key"),
    ],
)
def test_mistakes_are_one_line(
    tool: Tool, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tool("lab", "curves", *words) == 2
    assert one_line(capsys).startswith(f"error: {wanted}")
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_overwritten(tool: Tool, capsys: Capture, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(photo)
    before = photo.read_bytes()
    assert tool("lab", "curves", f"output={photo}") == 2
    assert "is no figure of the lab" in one_line(capsys)
    assert photo.read_bytes() == before
