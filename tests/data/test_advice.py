"""What the doctor advises, and the objects that no anchor can reach: counted as the rule that trains counts them."""

import json
from pathlib import Path

import numpy as np
import torch

from retina.data.advice import advise, unreachable
from retina.data.annotations import Annotations
from retina.data.coco import read_coco
from retina.ops.anchors import AnchorGenerator
from retina.ops.assigners import ATSS
from retina.types import Predictions, Targets


def a_split(folder: Path, boxes: np.ndarray, *, side: int = 128, classes: int = 1) -> Annotations:
    """One square image."""
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": side, "height": side}],
        "annotations": [
            {"image_id": 1, "category_id": n % classes, "bbox": box} for n, box in enumerate(boxes.round(2).tolist())
        ],
        "categories": [{"id": k, "name": f"class{k}"} for k in range(classes)],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return read_coco(folder / "a.json", folder)


def some_boxes(size: float, count: int = 60) -> np.ndarray:
    corners = np.random.default_rng(0).uniform(9, 100, (count, 2))
    return np.concatenate([corners, np.full((count, 2), size)], axis=1)


def test_the_count_is_that_of_objects_without_a_positive_of_atss(tmp_path: Path) -> None:
    split = a_split(tmp_path, some_boxes(4))
    strides = (8, 16, 32, 64, 128)
    generator = AnchorGenerator(sizes=tuple(4.0 * stride for stride in strides), scales=(2.0,), ratios=(1.0,))
    anchors = generator([(128 // stride, 128 // stride) for stride in strides], strides, "cpu")
    boxes = torch.tensor(split.boxes, dtype=torch.float32)[:, None]  # each alone in its image
    valid = torch.ones(60, 1, dtype=torch.bool)
    targets = Targets(boxes, torch.zeros(60, 1, dtype=torch.int64), valid, ~valid)
    reached = ATSS(topk=9)(Predictions((), (), anchors), targets).positive.any(dim=1)
    warning = unreachable(split, 128, 128)
    assert f" {int((~reached).sum())} of 60 objects" in warning
    assert "model.levels=" in warning
    assert "data.short_side=" in warning


def test_objects_that_anchors_reach_are_not_warned_of(tmp_path: Path) -> None:
    split = a_split(tmp_path, some_boxes(17))
    assert unreachable(split, 128, 128) == ""
    assert unreachable(split, 32, 32) != "", "at a quarter of the size"
    assert unreachable(a_split(tmp_path, some_boxes(4)), 1024, 1024) == ""


def test_advice_names_sizes_rare_classes_and_crowds(tmp_path: Path) -> None:
    split = a_split(tmp_path, some_boxes(20, 130))
    sizes, crowd, kept = advise({"train": split}, 256, 256)
    assert "40 to 40 px" in sizes
    assert "eval.max_dets=200" in crowd
    assert "postprocess.max_detections=200" in kept
    few = advise({"train": a_split(tmp_path, some_boxes(20, 30), classes=7)}, 256, 256)[-1]
    assert "class6 (4)" in few
    assert advise({"train": a_split(tmp_path, some_boxes(20, 1)[:0])}, 256, 256)[-1].startswith("train: few objects")
