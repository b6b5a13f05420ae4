"""The functions of docs/adapters.md do what they say, where the packages are installed."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import retina
from retina.cli.outputs import final_files

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"


def defined(heading: str) -> dict[str, Any]:
    """What the first block of code below a heading defines."""
    text = PAGE.read_text().split(f"## {heading}\n")[1]
    found = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    exec(compile(found[1], str(PAGE), "exec"), names)
    return names


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)


def test_supervision_holds_the_same(trained_run: Path, photo: np.ndarray) -> None:
    pytest.importorskip("supervision")
    detector = retina.load(trained_run, device="cpu")
    (found,) = detector.predict(photo)
    theirs = defined("supervision")["to_supervision"](found, detector.classes)
    assert len(theirs) == len(found.scores) > 0
    np.testing.assert_array_equal(theirs.xyxy, found.boxes.numpy())
    assert theirs["class_name"].tolist() == [detector.classes[label] for label in found.labels.tolist()]
    sure = theirs[theirs.confidence > 0.5]
    assert len(sure) == int((found.scores > 0.5).sum())


def test_sahi_finds_in_one_slice_what_the_detector_finds(trained_run: Path, photo: np.ndarray) -> None:
    pytest.importorskip("sahi")
    from sahi.predict import get_sliced_prediction

    names = defined("sahi")
    model = names["RetinaModel"](model_path=str(trained_run), confidence_threshold=0.3, device="cpu")
    size = {"slice_height": 90, "slice_width": 90, "overlap_height_ratio": 0.0, "overlap_width_ratio": 0.0}
    result = get_sliced_prediction(
        photo, model, **size, perform_standard_pred=False, postprocess_match_threshold=1.0, verbose=0
    )
    (found,) = retina.load(trained_run, device="cpu").predict(photo, score_threshold=0.3)
    theirs = sorted((one.score.value, one.category.name) for one in result.object_prediction_list)
    ours = {model.model.classes[label] for label in found.labels.tolist()}
    assert 0 < len(theirs) <= len(found.scores), "sahi leaves out boxes without a whole pixel of area"
    assert {name for _, name in theirs} <= ours
    wide = np.concatenate([np.zeros_like(photo), photo], axis=1)
    moved = get_sliced_prediction(
        wide, model, **size, perform_standard_pred=False, postprocess_match_threshold=1.0, verbose=0
    )
    boxes = torch.tensor([one.bbox.to_xyxy() for one in moved.object_prediction_list])
    assert (boxes[:, 2] > 90).any(), "in pixels of the whole picture"


def test_label_studio_gets_shares_of_the_image() -> None:
    boxes = np.array([[10.0, 20.0, 60.0, 70.0], [0.0, 0.0, 200.0, 100.0]])
    sizes = {"a": (200, 100), "b": (30, 40)}
    records = [
        {"id": number, "file_name": f"1/{name}.jpg", "width": width, "height": height}
        | {"boxes": boxes.tolist() if name == "a" else [], "scores": [0.9, 0.4], "labels": [1, 0]}
        for number, (name, (width, height)) in enumerate(sizes.items(), start=1)
    ]
    records[1] |= {"scores": [], "labels": []}
    content = json.loads(dict(final_files(records, ["cat", "dog"], [7, 3], ["coco"]))["coco.json"])
    tasks = defined("Label Studio and CVAT")["to_label_studio"](content, place="s3://photos/")
    assert [task["data"]["image"] for task in tasks] == ["s3://photos/1/a.jpg", "s3://photos/1/b.jpg"]
    first, whole = tasks[0]["predictions"][0]["result"]
    assert (first["value"]["rectanglelabels"], first["score"], first["original_width"]) == (["dog"], 0.9, 200)
    assert [first["value"][key] for key in ("x", "y", "width", "height")] == [5, 20, 25, 50]
    assert [whole["value"][key] for key in ("x", "y", "width", "height")] == [0, 0, 100, 100]
    assert tasks[1]["predictions"][0]["result"] == []
