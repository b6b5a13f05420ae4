"""Suspects: every kind of wrong label is found where it was planted, and a sound data set has few of high score."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retina.data.annotations import Annotations
from retina.data.coco import read_coco
from retina.evaluation.audit import find_suspects
from retina.evaluation.metrics import DetectionArrays

CLASSES = ("cat", "dog")


@pytest.fixture
def truth(tmp_path: Path) -> Annotations:
    """60 images with four objects, one in each quarter."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for image in range(60):
        images.append({"id": image, "file_name": f"{image}.jpg", "width": 200, "height": 200})
        for corner in ((0, 0), (100, 0), (0, 100), (100, 100)):
            x, y = (np.array(corner) + generator.uniform(5, 40, 2)).tolist()
            category = int(generator.integers(1, 3))
            width, height = generator.uniform(30, 50, 2).tolist()
            about = {"image_id": image, "category_id": category, "bbox": [x, y, width, height]}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **about})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return read_coco(tmp_path / "a.json", tmp_path)


def found_in(truth: Annotations, *, misses: float = 0.1, alarms: int = 40) -> DetectionArrays:
    """A fair detector: it misses some objects, is some pixels off, and sees others where nothing is."""
    generator = np.random.default_rng(1)
    kept = generator.uniform(size=len(truth.labels)) >= misses
    images = np.repeat(np.arange(len(truth)), np.diff(truth.offsets))[kept]
    boxes = truth.boxes[kept] + generator.normal(0, 1.5, (kept.sum(), 4))
    corner = generator.uniform(0, 150, (alarms, 2))
    boxes = np.concatenate([boxes, np.concatenate([corner, corner + 20], axis=1)])
    scores = np.concatenate([generator.uniform(0.5, 1.0, kept.sum()), generator.uniform(0.05, 0.5, alarms)])
    labels = np.concatenate([truth.labels[kept], generator.integers(0, 2, alarms)])
    return DetectionArrays(np.concatenate([images, generator.integers(0, 60, alarms)]), boxes, scores, labels)


def without(truth: Annotations, rows: list[int]) -> Annotations:
    kept = np.ones(len(truth.labels), dtype=bool)
    kept[rows] = False
    counts = np.add.reduceat(kept.astype(np.int64), truth.offsets[:-1])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    fields = {name: getattr(truth, name)[kept] for name in ("boxes", "labels", "crowd", "areas")}
    return replace(truth, offsets=offsets, **fields)


def first(annotations: Annotations, detections: DetectionArrays, count: int) -> list[tuple[str, int]]:
    return [(one.kind, one.image) for one in find_suspects(annotations, detections)[:count]]


def test_missing_labels(truth: Annotations) -> None:
    rows = [4 * image + 1 for image in range(5)]
    detections = found_in(truth, misses=0)
    suspects = find_suspects(without(truth, rows), detections)
    assert {(one.kind, one.image) for one in suspects[:5]} == {("missing", image) for image in range(5)}
    for one in suspects[:5]:
        assert one.object is None
        np.testing.assert_allclose(one.box, truth.boxes[4 * one.image + 1], atol=8)
        assert one.label == truth.labels[4 * one.image + 1]


def test_images_whose_labels_were_lost_are_one_suspect_each(truth: Annotations) -> None:
    rows = [4 * image + k for image in (7, 9) for k in range(4)]
    suspects = find_suspects(without(truth, rows), found_in(truth))
    assert {(one.kind, one.image) for one in suspects[:2]} == {("unlabelled", 7), ("unlabelled", 9)}
    assert sum(one.image in (7, 9) for one in suspects) == 2


def test_wrong_classes(truth: Annotations) -> None:
    labels = truth.labels.copy()
    rows = [4 * image for image in range(6)]
    labels[rows] = 1 - labels[rows]
    suspects = find_suspects(replace(truth, labels=labels), found_in(truth, misses=0))
    assert {(one.kind, one.object) for one in suspects[:6]} == {("class", row) for row in rows}
    assert CLASSES[truth.labels[suspects[0].object]] in suspects[0].reason.split("looks like")[1]


def test_misplaced_boxes(truth: Annotations) -> None:
    boxes = truth.boxes.copy()
    rows = [4 * image + 2 for image in range(6)]
    boxes[rows] += [12.0, 12.0, 12.0, 12.0]
    suspects = find_suspects(replace(truth, boxes=boxes), found_in(truth, misses=0))
    assert {(one.kind, one.object) for one in suspects[:6]} == {("place", row) for row in rows}
    for one in suspects[:6]:
        np.testing.assert_allclose(one.better, truth.boxes[one.object], atol=8)


def test_duplicates_and_labels_of_nothing(truth: Annotations) -> None:
    """The second and third object of the first images: at the place of the first, and where nothing is."""
    boxes, labels = truth.boxes.copy(), truth.labels.copy()
    detections = found_in(truth, misses=0, alarms=0)
    for image in range(4):
        boxes[4 * image + 1], labels[4 * image + 1] = boxes[4 * image] + 1.0, labels[4 * image]
        boxes[4 * image + 2] = [170.0, 2.0, 198.0, 30.0]
    suspects = find_suspects(replace(truth, boxes=boxes, labels=labels), detections)
    kinds = {(one.kind, one.object) for one in suspects}
    assert {("duplicate", 4 * image + 1) for image in range(4)} <= kinds
    assert {("spurious", 4 * image + 2) for image in range(4)} <= kinds


def test_sound_labels_have_few_suspects(truth: Annotations) -> None:
    suspects = find_suspects(truth, found_in(truth))
    assert sum(one.score > 0.9 for one in suspects) < 5
    assert [one.score for one in suspects] == sorted((one.score for one in suspects), reverse=True)
    assert all(0 <= one.score <= 1 for one in suspects)


def test_crowd_regions_hide_what_is_not_labelled(truth: Annotations) -> None:
    crowd = truth.crowd.copy()
    crowd[1] = True
    detections = found_in(truth, misses=0, alarms=0)
    assert [one for one in find_suspects(replace(truth, crowd=crowd), detections) if one.image == 0] == []


@pytest.mark.parametrize("count", [0, 1])
def test_few_detections(truth: Annotations, count: int) -> None:
    detections = DetectionArrays(*(values[:count] for values in found_in(truth)))
    assert all(one.score < 0.5 for one in find_suspects(truth, detections))
