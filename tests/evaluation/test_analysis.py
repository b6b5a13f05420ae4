"""What an evaluation says beside AP: its parts agree with each other, and little data is no fault."""

import json

import numpy as np
import pytest

from retina.evaluation.analysis import analyze, describe, mistakes_per_image, most_confused
from retina.evaluation.confusion import precision_and_recall
from retina.evaluation.metrics import coco_metrics
from scenes import annotations_of, detections_of, random_scene


def test_its_parts_agree() -> None:
    annotations, detections = random_scene(0, num_images=60)
    metrics = coco_metrics(annotations, detections)
    analysis = analyze(annotations, detections, metrics, draws=100)
    values = json.loads(json.dumps(analysis.values, allow_nan=False))
    rows = values["at_the_point"]
    precision, recall = precision_and_recall(np.array(values["confusion"]))
    assert [row["precision"] for row in rows] == pytest.approx(precision.tolist())
    assert [row["recall"] for row in rows] == pytest.approx(recall.tolist())
    for kind in ("size", "aspect", "crowding"):
        groups = values["breakdown"][kind]
        assert sum(group["objects"] for group in groups) == values["objects"]
        found = sum(group["objects"] * (group["recall"] or 0) for group in groups)
        assert found == pytest.approx(sum(row["hits"] for row in rows)), kind
    missed, false = mistakes_per_image(analysis)
    assert missed.sum() == sum(row["missed"] for row in rows)
    assert false.sum() == sum(row["false_alarms"] for row in rows)
    for key in ("AP", "AP50", "AP75"):
        value, low, high = values["intervals"]["overall"][key]
        assert value == pytest.approx(metrics[key], abs=1e-6)
        assert low < value < high
    empty = int((np.diff(annotations.offsets) == 0).sum())
    assert values["images_without_objects"]["images"] == empty > 0
    confused = most_confused(analysis.matrix, list(annotations.classes))
    assert confused[0][2] == max(count for *_, count in confused)
    assert len(describe(values)) >= 3


def test_one_group_of_all_objects_has_the_ap_of_all() -> None:
    annotations, detections = random_scene(1, num_images=60, crowds=False, decimals=6)
    same = [place for place in range(len(annotations)) if 5 <= np.diff(annotations.offsets)[place] < 10]
    images = np.repeat(np.arange(60), np.diff(annotations.offsets)).tolist()
    rows = [row for row, image in enumerate(images) if image in same]
    objects = [(same.index(images[row]), int(annotations.labels[row]), annotations.boxes[row].tolist()) for row in rows]
    found = [
        (same.index(i), label, score, box)
        for i, box, score, label in zip(*(field.tolist() for field in detections), strict=True)
        if i in same
    ]
    crowded = annotations_of(objects, len(same), list(annotations.classes))
    metrics = coco_metrics(crowded, detections_of(found))
    values = analyze(crowded, detections_of(found), metrics, draws=10).values
    group = values["breakdown"]["crowding"][1]
    assert group["objects"] == len(objects) > 20
    assert group["ap"] == pytest.approx(metrics["AP"])


@pytest.mark.parametrize("num_classes", [1, 3])
def test_nothing_to_count_is_no_fault(num_classes: int) -> None:
    classes = [f"class {label}" for label in range(num_classes)]
    box = [1.0, 1.0, 20.0, 20.0]
    for objects in ([], [(0, 0, box)]):
        for found in ([], [(0, 0, 0.5, box)], [(1, num_classes - 1, 1.0, box)]):
            annotations, detections = annotations_of(objects, 2, classes), detections_of(found)
            analysis = analyze(annotations, detections, coco_metrics(annotations, detections), draws=10)
            json.dumps(analysis.values, allow_nan=False)
            assert describe(analysis.values)
