"""Folders for Hugging Face's hub, and where `retina.load` looks."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import retina
from commands import Capture, refused_by_tool
from faults import refused
from retina.data.layouts import locate_split
from retina.errors import CheckpointError
from retina.hub import FILE, PUBLISHED
from retina.model.weights import load_detector, save_detector
from retina.ops.boxes import pairwise_iou

POINT = {
    "goal": "f1",
    "target": None,
    "num_images": 5,
    "overall": {"precision": [0.9, 0.8, 1.0], "recall": None, "false_alarms": None, "count_error": None},
}


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """With metrics, an operating point and an evaluation."""
    folder = Path(shutil.copytree(trained_run, tmp_path / "mine"))
    model, card = load_detector(folder / "best.safetensors", torch.device("cpu"))
    empty = dict.fromkeys(("precision", "recall", "false_alarms", "count_error"))
    one = {"threshold": 0.25, "pooled": False, "reached": True, "num_objects": 30, **empty}
    point = POINT | {"classes": [one for _ in card.classes]}
    metrics = {"AP": 0.4321, "AP50": 0.6, "APs": None}
    save_detector(
        folder / "best.safetensors", model.state_dict(), replace(card, operating_point=point, metrics=metrics)
    )
    (folder / "eval").mkdir()
    analysis = {"images": 5, "objects": 17, "intervals": {"overall": {"AP": [0.4321, 0.4, 0.47]}}}
    (folder / "eval" / "analysis.json").write_text(json.dumps(analysis))
    return folder


def test_a_folder_for_the_hub_loads_and_says_what_was_measured(
    tool: Callable[..., int], run: Path, tmp_path: Path, capsys: Capture, tiny_data: Path
) -> None:
    output = tmp_path / "hub"
    words = [f"checkpoint={run}", "format=hf", f"output={output}", "license=apache-2.0"]
    assert tool("export", *words) == 0
    assert sorted(file.name for file in output.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    detector, ours = (retina.load(place, device="cpu") for place in (output, run))
    image = sorted((tiny_data / "val").iterdir())[0]
    assert (detector.predict(image)[0].boxes == ours.predict(image)[0].boxes).all()
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"]["0"] == ours.classes[0]
    assert config["thresholds"] == [0.25] * len(ours.classes)
    _, front, text = (output / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    for said in (
        "| AP | 0.432 | 0.400 to 0.470 |",
        "| AP50 | 0.600 | - |",
        "5 images with 17 objects",
        "0.250",
        "tiny",
    ):
        assert said in text, said
    assert "APs" not in text
    assert tool("export", *words) == 2
    refused_by_tool(capsys, "output-taken", output)
    assert tool("export", *words, "overwrite=true") == 0


def test_a_card_of_weights_alone_pretends_nothing(tool: Callable[..., int], trained_run: Path, tmp_path: Path) -> None:
    file = shutil.copy(trained_run / "best.safetensors", tmp_path / "alone.safetensors")
    assert tool("export", f"checkpoint={file}", "format=hf", f"output={tmp_path / 'hub'}") == 0
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "license: unknown" in text
    assert "None were measured" in text


def test_a_folder_in_half_precision_finds_nearly_the_same(
    tool: Callable[..., int], trained_run: Path, tmp_path: Path, tiny_data: Path
) -> None:
    assert tool("export", f"checkpoint={trained_run}", "format=hf", "precision=fp16", f"output={tmp_path / 'h'}") == 0
    sizes = [
        (place / name).stat().st_size for place, name in ((tmp_path / "h", FILE), (trained_run, "best.safetensors"))
    ]
    assert sizes[0] < 0.52 * sizes[1]
    image = sorted((tiny_data / "val").iterdir())[0]
    (found,), (expected,) = (retina.load(place, device="cpu").predict(image) for place in (tmp_path / "h", trained_run))
    assert found.scores[:5].tolist() == pytest.approx(expected.scores[:5].tolist(), abs=0.01)


def test_the_weights_that_come_along_find_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = PUBLISHED / "shapes"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2_000_000
    digest = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    assert json.loads((folder / "config.json").read_text())["weights_sha256"] == digest
    assert "## Metrics" in (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    retina.write_shapes(Path("data"), num_train=1, num_val=12, image_size=[128, 160], seed=5)
    annotations = retina.read_coco(*locate_split(Path("data"), "val"))
    detector = retina.load("shapes", device="cpu")
    assert set(detector.classes) == set(annotations.classes)
    hits = 0
    for row, found in enumerate(detector.predict([annotations.path(row) for row in range(12)], score_threshold=0.3)):
        rows = slice(annotations.offsets[row], annotations.offsets[row + 1])
        known = torch.from_numpy(annotations.boxes[rows]).float()
        same = torch.from_numpy(annotations.labels[rows])[:, None] == found.labels
        hits += int(((pairwise_iou(known, found.boxes) > 0.5) & same).any(dim=1).sum())
    assert hits > annotations.num_objects / 3
    (tmp_path / "shapes").mkdir()
    with refused("no-file", "shapes", kind=CheckpointError):
        retina.load("shapes", device="cpu")  # what is there goes first


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", tmp_path):
        with refused("no-file", tmp_path.name, kind=CheckpointError):
            retina.load(place, device="cpu")
