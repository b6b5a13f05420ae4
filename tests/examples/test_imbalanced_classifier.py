import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import imbalanced_classifier as example

SMALL = {"train": {"ok": 40, "dent": 8, "crack": 3}, "val": {"ok": 6, "dent": 4, "crack": 5}}
METHODS = ["cross entropy", "weighted", "resampled", "focal"]
Capture = pytest.CaptureFixture[str]


def bytes_of(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def write_colors(root: Path) -> None:
    """Somebody's own data: photographs of two sizes, red or blue, 30 to 3."""
    rng = np.random.default_rng(0)
    for split, counts in {"train": (30, 3), "val": (5, 4)}.items():
        for channel, (name, count) in enumerate(zip(("common", "rare"), counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (50 + 10 * channel, 40, 3), dtype=np.uint8)
                pixels[..., 2 * channel] += 150
                Image.fromarray(pixels).save(root / split / name / f"{index}.jpg")


def test_the_folder_is_an_image_folder(tmp_path: Path) -> None:
    example.draw_folder(tmp_path / "parts", SMALL)
    for split, counts in SMALL.items():
        found = ImageFolder(tmp_path / "parts" / split)
        assert found.classes == sorted(counts)
        assert {name: found.targets.count(label) for name, label in found.class_to_idx.items()} == counts
        assert {image.size for image, _ in found} == {(32, 32)}
    files = bytes_of(tmp_path / "parts")
    assert len(set(files.values())) == len(files)  # no picture twice, in one split or both
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    example.draw_folder(tmp_path / "again", SMALL)
    assert bytes_of(tmp_path / "again") == files
    example.draw_folder(tmp_path / "other", SMALL, seed=1)
    assert bytes_of(tmp_path / "other") != files


def test_four_methods_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(example, "DRAWN", SMALL)
    arguments = ["--drawn", str(tmp_path / "parts"), "--epochs", "1", "--seeds", "2"]
    found = example.main(arguments)
    assert list(found) == METHODS
    assert all(len(of_seeds) == 2 and len(recalls) == 3 for of_seeds in found.values() for recalls in of_seeds)
    assert all(0 <= recall <= 1 for of_seeds in found.values() for recalls in of_seeds for recall in recalls)
    lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/parts/train: 3 crack, 8 dent, 40 ok" in lines
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows] == ["trained with", "---", *METHODS]
    assert {len(row) for row in rows} == {7}

    drawn = bytes_of(tmp_path / "parts")
    assert example.main(arguments) == found  # to the last bit, on the folder that is there
    assert bytes_of(tmp_path / "parts") == drawn


def test_the_table_says_what_it_says() -> None:
    train = example.Split(torch.zeros(0), torch.tensor([0, 1, 1, 1]), ["rare", "common"])
    val = example.Split(torch.zeros(0), torch.tensor([0] * 10 + [1] * 30), ["rare", "common"])
    text = example.table({"a": [[0.2, 0.9], [0.4, 0.7]]}, train, val)
    assert text.splitlines()[0].endswith("recall rare | recall common | recall rare over seeds |")
    assert text.splitlines()[2] == "| a | 0.675 | 0.550 | 0.300 | 0.800 | 0.200 to 0.400 |"


def test_recalls_are_shares_of_each_class() -> None:
    images = torch.zeros(8, 3, 1, 1)
    images[[0, 5, 6, 7], 1] = 1.0  # taken for class 1
    val = example.Split(images, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]), ["a", "b", "c"])
    assert example.recalls(nn.Flatten(), val, torch.device("cpu")) == pytest.approx([3 / 4, 2 / 3, 0])


def test_methods_differ_in_one_thing_each() -> None:
    methods = example.methods([1000, 100, 10])
    assert [name for name, method in methods.items() if method.resample] == ["resampled"]
    weights = methods["weighted"].loss.weight
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[2] / weights[0]).item() == pytest.approx((1 - 0.999**1000) / (1 - 0.999**10), rel=1e-4)
    assert methods["cross entropy"].loss.weight is None
    assert methods["resampled"].loss.weight is None
    assert methods["focal"].loss.gamma == 2.0
    assert methods["focal"].loss.weight is None


def test_your_own_folder_is_learned_and_left_alone(tmp_path: Path) -> None:
    write_colors(tmp_path / "mine")
    before = bytes_of(tmp_path / "mine")
    found = example.main(["--data", str(tmp_path / "mine"), "--epochs", "8", "--seeds", "1"])
    assert found["resampled"] == [[1.0, 1.0]]
    assert all(recalls[0] == 1.0 for [recalls] in found.values())
    assert bytes_of(tmp_path / "mine") == before


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_folder_is_named(tmp_path: Path, capsys: Capture, missing: str) -> None:
    write_colors(tmp_path / "mine")
    (tmp_path / "mine" / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="2"):
        example.main(["--data", str(tmp_path / "mine")])
    assert str(tmp_path / "mine" / missing) in capsys.readouterr().err.splitlines()[-1]


def test_other_classes_in_val_are_refused(tmp_path: Path, capsys: Capture) -> None:
    write_colors(tmp_path / "mine")
    (tmp_path / "mine" / "val" / "rare").rename(tmp_path / "mine" / "val" / "seldom")
    with pytest.raises(SystemExit, match="2"):
        example.main(["--data", str(tmp_path / "mine")])
    assert "classes of train (common, rare) and val (common, seldom)" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_readmes_claim(tmp_path: Path) -> None:
    found = example.main(["--drawn", str(tmp_path / "parts"), "--seeds", "1"])
    crack = {name: recalls[0] for name, [recalls] in found.items()}
    assert crack["cross entropy"] < 0.3
    assert crack["weighted"] > crack["cross entropy"] + 0.2
    assert crack["resampled"] > crack["cross entropy"] + 0.2
