"""Paired comparisons: no difference where there is none, as often as they say; and one where there is."""

import numpy as np
import pytest

from faults import refused
from retina.evaluation.compare import analyses_of, changed_images, compare, verdict
from retina.evaluation.metrics import DetectionArrays, coco_metrics
from scenes import annotations_of, detections_of, random_scene


def without(detections: DetectionArrays, share: float, seed: int) -> DetectionArrays:
    keep = np.random.default_rng(seed).random(len(detections.scores)) >= share
    return DetectionArrays(*(field[keep] for field in detections))


def test_values_are_those_of_the_metrics_and_signs_turn_with_the_order() -> None:
    annotations, detections = random_scene(0, num_images=200)
    worse = without(detections, 0.6, 0)
    forth, back = compare(annotations, detections, worse), compare(annotations, worse, detections)
    for key in ("AP", "AP50", "AP75"):
        one = forth["overall"][key]
        values = [coco_metrics(annotations, each)[key] for each in (detections, worse)]
        assert [one["first"], one["second"]] == values
        assert one["difference"] == pytest.approx(values[1] - values[0])
        assert one["low"] < one["difference"] < one["high"] < 0
        assert one["p"] < 0.05
        assert back["overall"][key]["difference"] == -one["difference"]
        assert back["overall"][key]["low"] == pytest.approx(-one["high"])
    assert verdict(forth, "a", "b").startswith("a is better than b by")
    assert verdict(back, "b", "a").startswith("a is better than b by")


def test_equal_detections_do_not_differ() -> None:
    annotations, detections = random_scene(0)
    result = compare(annotations, detections, detections, draws=50)
    assert (result["overall"]["AP"]["low"], result["overall"]["AP"]["high"]) == (0, 0)
    assert result["overall"]["AP"]["p"] == 1
    assert "No difference that these 30 images can show" in verdict(result, "a", "b")


def test_luck_is_called_a_difference_about_as_often_as_promised() -> None:
    """Each of two detectors lacks other detections, by chance."""
    wrong = 0
    for seed in range(15):
        annotations, detections = random_scene(seed, num_images=25, crowds=False)
        result = compare(annotations, *(without(detections, 0.3, 2 * seed + n) for n in (0, 1)), draws=200)
        one = result["overall"]["AP50"]
        wrong += one["low"] > 0 or one["high"] < 0
        assert (one["p"] < 0.04) <= (one["low"] > 0 or one["high"] < 0)
    assert wrong <= 4  # 1 expected


def test_images_that_changed() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    annotations = annotations_of([(image, 0, box) for image in range(30)], 30, ["a"])
    found = [(image, 0, 0.9, box) for image in range(30)]
    first, second = (detections_of([one for one in found if one[0] != gone]) for gone in (3, 7))
    assert changed_images(*analyses_of(annotations, [first, second])) == ([3], [7])


def test_nothing_to_compare() -> None:
    nothing = detections_of([])
    result = compare(annotations_of([], 2, ["a"]), nothing, nothing, draws=10)
    assert result["overall"]["AP"] is None
    assert "no objects" in verdict(result, "a", "b")
    with refused("no-images"):
        compare(annotations_of([], 0, ["a"]), nothing, nothing)
