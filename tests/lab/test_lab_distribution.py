"""Where a detector's loss comes from: binned numbers against plain sorting, and the figures of a whole run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from commands import Capture, Tool, one_line
from retina.inference import Detector
from retina.lab.elements import SHARES, WIDTH, Bins, Elements, assign, describe, histogram
from retina.losses.classification import Focal
from retina.losses.focal import sigmoid_focal_loss
from retina.model.retinanet import retinanet
from retina.model.weights import save_detector
from retina.ops.anchors import Anchors
from retina.ops.assigners import ATSS, MaxIoU
from retina.types import Assignment, Predictions, Targets

GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]


def losses(logits: Tensor, gamma: float) -> Tensor:
    """Of negatives, each for itself."""
    return sigmoid_focal_loss(logits.double(), torch.zeros_like(logits).double(), alpha=None, gamma=gamma)


def binned(logits: Tensor) -> Bins:
    return Bins.of(histogram(logits, torch.zeros(len(logits), dtype=torch.int64), 1)[:, 0])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_bins_are_as_exact_as_they_say(gamma: float) -> None:
    logits = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 3 - 4
    bins, exact = binned(logits), losses(logits, gamma).sort().values
    bound = 1.05 * (gamma + 1) ** 2 * WIDTH**2 / 8  # to leading order
    assert bins.counts.sum() == len(logits)
    assert bins.total(gamma) == pytest.approx(float(exact.sum()), rel=bound)
    cumulative = exact.cumsum(0) / exact.sum()
    wanted = [float(cumulative[round(share * len(logits)) - 1]) if share else 0.0 for share in SHARES]
    np.testing.assert_allclose(bins.cumulative(gamma, SHARES), wanted, atol=3 * bound + 1e-4)
    hardest = float(exact[-2000:].sum() / exact.sum())
    assert bins.hardest(gamma, 0.01) == pytest.approx(hardest, abs=3 * bound + 1e-4)


def test_logits_beyond_the_bins_keep_their_loss() -> None:
    logits = torch.tensor([-100.0, -33.0, 40.0, 60.0])
    bins = binned(logits)
    assert bins.counts.tolist() == [2, 2]
    assert bins.total(2.0) == pytest.approx(100.0)
    assert bins.hardest(2.0, 0.5) == pytest.approx(1.0)


def test_nothing_has_no_loss() -> None:
    bins = binned(torch.zeros(0))
    assert bins.total(2.0) == 0
    assert bins.cumulative(2.0, [0.0, 1.0]) == [0.0, 0.0]
    assert bins.hardest(2.0, 0.01) == 0


@pytest.fixture
def seen() -> tuple[Predictions, Tensor, Assignment]:
    """Two images, two levels of 30 and 10 anchors, three classes; some anchors are ignored."""
    generator = torch.Generator().manual_seed(1)
    logits = tuple(torch.randn(2, count, 3, generator=generator) * 2 - 2 for count in (30, 10))
    anchors = Anchors((torch.rand(count, 4, generator=generator) for count in (30, 10)), ((5, 6), (2, 5)), (8, 16))
    kind = torch.rand(2, 40, generator=generator)
    labels = torch.randint(3, (2, 40), generator=generator)
    predictions = Predictions(logits, tuple(torch.zeros(2, count, 4) for count in (30, 10)), anchors)
    return predictions, labels, Assignment(torch.zeros(2, 40, dtype=torch.int64), kind < 0.2, kind > 0.3)


def test_rescored_totals_are_those_of_the_loss(seen: tuple[Predictions, Tensor, Assignment]) -> None:
    elements = Elements(3, 2)
    elements.add(*seen)
    positive, negative = seen[2].positive, seen[2].negative
    assert elements.positive_anchors == int(positive.sum())
    found = describe(elements, ["a", "b", "c"], ["P3", "P4"], GAMMAS, [0.25, 0.75])
    assert len(found["rescored"]) == len(GAMMAS) * 3
    for row in found["rescored"]:
        wanted = Focal(alpha=row["alpha"], gamma=row["gamma"])(*seen) / positive.sum()
        assert row["loss_per_positive"] == pytest.approx(float(wanted), rel=2e-3)
    assert found["positives"]["all"]["elements"] == positive.sum()
    assert found["negatives"]["all"]["elements"] == 3 * (positive | negative).sum() - positive.sum()


def test_groups_are_classes_and_levels(seen: tuple[Predictions, Tensor, Assignment]) -> None:
    predictions, labels, assigned = seen
    elements = Elements(3, 2)
    elements.add(*seen)
    found = describe(elements, ["a", "b", "c"], ["P3", "P4"], [2.0], [])
    of_class = labels[assigned.positive] == 1
    assert found["positives"]["class"]["b"]["elements"] == int(of_class.sum())
    logits = torch.cat(predictions.logits, dim=1)[assigned.positive][:, 1][of_class]
    mean = losses(-logits, 2.0).mean()
    assert found["positives"]["class"]["b"]["gamma 2"]["mean_loss"] == pytest.approx(float(mean), rel=2e-3)
    assert found["positives"]["level"]["P4"]["elements"] == int(assigned.positive[:, 30:].sum())
    for kind in ("positives", "negatives"):
        for by in ("class", "level"):
            groups = found[kind][by].values()
            assert sum(group["elements"] for group in groups) == found[kind]["all"]["elements"]
            assert sum(group["gamma 2"]["share"] for group in groups) == pytest.approx(1)
    own = losses(-logits, 2.0).sort().values.cumsum(0)
    half = found["positives"]["class"]["b"]["gamma 2"]["cumulative"][50]
    assert half == pytest.approx(float(np.interp(0.5 * len(own), range(len(own) + 1), [0, *own]) / own[-1]), abs=0.01)


@pytest.mark.parametrize("assigner", [MaxIoU(), ATSS()])
def test_without_objects_every_anchor_is_negative(
    seen: tuple[Predictions, Tensor, Assignment], assigner: MaxIoU | ATSS
) -> None:
    nothing = torch.zeros(2, 0)
    targets = Targets(nothing[..., None].expand(2, 0, 4), nothing.long(), nothing > 0, nothing > 0)
    labels, assigned = assign(assigner, seen[0], targets)
    assert labels.shape == (2, 40)
    assert assigned.negative.all()
    assert not assigned.positive.any()
    elements = Elements(3, 2)
    elements.add(seen[0], labels, assigned)
    assert elements.histograms["negatives"][0, :3].sum() == 2 * 40 * 3


def read(folder: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads((folder / "distribution.json").read_text(), parse_constant=refuse)


def test_a_run_is_taken_apart(tool: Tool, trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "out"
    command = ("lab", "distribution", f"checkpoint={trained_run}", f"output={output}", "device=cpu")
    assert tool(*command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("5 images, ")
    figures = [f"{name}.png" for name in ("cumulative", "cumulative_by_class", "cumulative_by_level", "hardest")]
    assert sorted(file.name for file in output.iterdir()) == sorted(["distribution.json", *figures])
    found = read(output)
    assert found["images"] == 5
    assert found["levels"] == ["P3", "P4", "P5"]
    assert found["anchors"] <= 5 * (96 * 96 // 64 + 96 * 96 // 256 + 96 * 96 // 1024)
    assert found["positive_anchors"] == found["positives"]["all"]["elements"] > 0
    for gamma in ("gamma 0", "gamma 0.5", "gamma 1", "gamma 2"):
        curve = found["negatives"]["all"][gamma]["cumulative"]
        assert curve[0] == 0
        assert curve[-1] == pytest.approx(1)
        assert curve == sorted(curve)
    shares = [found["negatives"]["all"][f"gamma {gamma}"]["hardest_1_percent"] for gamma in ("0", "0.5", "1", "2")]
    assert shares == sorted(shares), "more focus, more loss on the hardest"
    for name in figures:
        with Image.open(output / name) as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 100
    before = (output / "distribution.json").read_bytes()
    assert tool(*command) == 0, "takes the place of what it wrote before"
    assert (output / "distribution.json").read_bytes() == before


def test_another_split_rule_and_format(tool: Tool, trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["split=train", "gammas=[2]", "alphas=[]", "figures=svg", "loss.assigner.positive_iou=0.6"]
    command = ["lab", "distribution", f"checkpoint={trained_run}", f"output={tmp_path}", "device=cpu"]
    assert tool(*command, *words) == 2
    assert one_line(capsys) == "error: alphas: empty - give at least one number"
    words[2] = "alphas=[0.25]"
    assert tool(*command, *words) == 0
    found = read(tmp_path)
    assert found["images"] == 4
    assert found["assigner"]["positive_iou"] == 0.6
    assert [(row["gamma"], row["alpha"]) for row in found["rescored"]] == [(2, None), (2, 0.25)]
    assert (tmp_path / "cumulative.svg").is_file()


def test_a_rule_of_another_head_is_only_a_rule(tool: Tool, trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """loss=atss trains a quality branch, which this detector does not have; its assigner needs none."""
    command = ("lab", "distribution", f"checkpoint={trained_run}", f"output={tmp_path}", "device=cpu", "loss=atss")
    assert tool(*command, "gammas=[2]") == 0
    found = read(tmp_path)
    assert found["assigner"]["_target_"] == "retina.ops.assigners.ATSS"
    assert found["positive_anchors"] > 0


def run_of_another_head(folder: Path, run: Path, **more: Any) -> Path:
    """A run like that one, but for these arguments of the model."""
    card = Detector.load(run, device="cpu").card
    model = retinanet(**card.model | more)
    folder.mkdir()
    shutil.copy(run / "config.yaml", folder)
    save_detector(folder / "best.safetensors", model.state_dict(), replace(card, model=model.arguments))
    return folder


def run_of_another_rule(folder: Path, run: Path) -> Path:
    shutil.copytree(run, folder)
    with (folder / "config.yaml").open("a") as file:
        file.write("loss: {assigner: {_target_: retina.ops.assigners.TaskAligned}}\n")
    return folder


@pytest.mark.parametrize("loss", ["focal", "gfl", "tal"])
def test_every_head_is_taken_apart_by_every_rule(tool: Tool, trained_run: Path, tmp_path: Path, loss: str) -> None:
    """A rule needs nothing but class logits and boxes, whatever else a head predicts."""
    run = run_of_another_head(tmp_path / "run", trained_run, head_quality=True, box_bins=17)

    def positives(checkpoint: Path) -> int:
        words = [f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", "gammas=[2]", "device=cpu"]
        assert tool("lab", "distribution", *words, f"loss={loss}") == 0
        return int(read(tmp_path / "out")["positive_anchors"])

    found = positives(run)
    assert found > 0
    if loss != "tal":  # whose choice depends on what is predicted
        assert found == positives(trained_run)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["~loss.assigner"], "loss.assigner: None makes nothing - give loss.assigner._target_="),
        (["loss.assigner.positive_iou=2"], "loss.assigner: "),
        (["loss=atss", "loss.assigner.topk=0"], "loss.assigner: topk must be at least 1, got 0"),
        (
            [
                "loss.assigner._target_=retina.losses.classification.Focal",
                *(f"~loss.assigner.{key}" for key in ("positive_iou", "negative_iou", "low_quality")),
            ],
            "loss.assigner: ",
        ),
    ],
)
def test_a_wrong_rule_is_one_line(
    tool: Tool, trained_run: Path, tmp_path: Path, capsys: Capture, words: list[str], wanted: str
) -> None:
    """Also for a run that was trained with another one."""
    run = run_of_another_rule(tmp_path / "run", trained_run)
    assert tool("lab", "distribution", f"checkpoint={run}", f"output={tmp_path / 'out'}", "device=cpu", *words) == 2
    assert one_line(capsys).startswith(f"error: {wanted}")


def test_a_run_that_was_trained_with_another_rule_is_told(
    tool: Tool, trained_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = run_of_another_rule(tmp_path / "run", trained_run)
    assert tool("lab", "distribution", f"checkpoint={run}", f"output={tmp_path / 'out'}", "device=cpu") == 0
    assert capsys.readouterr().err.startswith("note: the run was trained with loss.assigner {'_target_': 'retina.ops.")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "checkpoint: missing - give checkpoint=..."),
        (["checkpoint=x", "gammas=[-1]"], "gammas: -1 is not allowed - give numbers finite and at least 0"),
        (["checkpoint=x", "gammas=[1,2,1.0000001]"], "gammas: 1 is there twice - give numbers that differ"),
        (["checkpoint=x", "alphas=[0.5,0.5]"], "alphas: 0.5 is there twice - give numbers that differ"),
        (["checkpoint=x", "alphas=[2]"], "alphas: 2 is not allowed - give numbers from 0 to 1"),
        (["checkpoint=x", "figures=gif"], "figures: 'gif' is not known - choose one of png, svg"),
        (["checkpoint=x", "split=test"], "split: 'test' is not known - choose one of train, val"),
        (["checkpoint=x", "batch_size=0"], "batch_size: 0 is not allowed"),
    ],
)
def test_mistakes_are_one_line(tool: Tool, capsys: Capture, words: list[str], wanted: str) -> None:
    assert tool("lab", "distribution", *words) == 2
    assert one_line(capsys).startswith(f"error: {wanted}")


def test_other_files_are_left_alone(tool: Tool, trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert tool("lab", "distribution", f"checkpoint={trained_run}", f"output={tmp_path}") == 2
    assert "holds other files" in one_line(capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
