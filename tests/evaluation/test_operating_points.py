"""Thresholds against a search over all of them, and what is promised of them against plain counts."""

from typing import Any

import numpy as np
import pytest

from faults import refused
from retina.data.annotations import Annotations
from retina.evaluation import operating_points
from retina.evaluation.bootstrap import interval, resamples, weighted_sums
from retina.evaluation.metrics import DetectionArrays
from retina.evaluation.operating_points import Goal, describe, fit_operating_point
from retina.evaluation.outcomes import NO_OBJECT, find_outcomes
from scenes import annotations_of, detections_of, plain_matches, random_scene

GOALS = [Goal(), Goal("precision", 0.7), Goal("recall", 0.4), Goal("false_alarms", 0.1), Goal("count")]


def measured(annotations: Annotations, detections: DetectionArrays, label: int, threshold: float) -> dict[str, float]:
    """By loops over everything."""
    taken = plain_matches(annotations, detections)
    hits, false, error = 0, 0, 0
    per_image = np.zeros(len(annotations), dtype=int)
    for row, score in enumerate(detections.scores):
        if detections.labels[row] != label or score < threshold:
            continue
        place = taken.get(row)
        if place is not None and annotations.crowd[place]:
            continue
        hits, false = hits + (place is not None), false + (place is None)
        per_image[detections.indices[row]] += 1
    objects = 0
    for image in range(len(annotations)):
        here = slice(annotations.offsets[image], annotations.offsets[image + 1])
        count = int(((annotations.labels[here] == label) & ~annotations.crowd[here]).sum())
        objects, error = objects + count, error + abs(count - int(per_image[image]))
    return {
        "f1": 2 * hits / max(hits + false + objects, 1),
        "precision": hits / max(hits + false, 1),
        "recall": hits / objects,
        "false_alarms": false / len(annotations),
        "count": -error / len(annotations),
    }


@pytest.mark.parametrize("seed", range(3))
def test_outcomes_are_those_of_plain_loops(seed: int) -> None:
    annotations, detections = random_scene(seed)
    outcomes = find_outcomes(annotations, detections)
    for number, least in ((0, 0.5), (5, 0.75)):
        taken = plain_matches(annotations, detections, least)
        ours = {int(row): int(place) for row, place in zip(outcomes.rows, outcomes.objects[:, number], strict=True)}
        assert {row: place for row, place in ours.items() if place != NO_OBJECT} == taken
        assert len(taken) > 10
    assert outcomes.hits().sum() + outcomes.ignored().sum() == len(plain_matches(annotations, detections))
    assert (np.diff(outcomes.labels) >= 0).all()


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.name)
def test_no_threshold_serves_the_goal_better(goal: Goal) -> None:
    annotations, detections = random_scene(5)
    point = fit_operating_point(annotations, detections, goal, draws=10)
    limits = np.append(np.unique(detections.scores), 1.0)
    chosen_by = {"precision": "recall", "recall": "precision", "false_alarms": "recall"}.get(goal.name, goal.name)
    tried = 0
    for label, one in enumerate(point["classes"]):
        if one["pooled"]:
            continue
        values = [measured(annotations, detections, label, limit) for limit in limits]
        target = goal.target
        if target is not None:
            side = -1 if goal.name == "false_alarms" else 1
            values = [value for value in values if side * value[goal.name] >= side * target]
            assert one["reached"] == bool(values)
            if not values:
                continue
        tried += 1
        ours = measured(annotations, detections, label, one["threshold"])
        assert ours[chosen_by] == pytest.approx(max(value[chosen_by] for value in values))
        assert one["threshold"] not in detections.scores[detections.labels == label], "rounding would decide"
    assert tried >= 1


def test_classes_of_few_objects_take_the_pooled_threshold_and_say_so() -> None:
    annotations, detections = random_scene(2, num_images=60, num_classes=6)
    point = fit_operating_point(annotations, detections, draws=10)
    few = [one for one in point["classes"] if one["num_objects"] < operating_points.FEW_OBJECTS]
    assert 1 <= len(few) < 6
    assert [one["pooled"] for one in point["classes"]] == [one in few for one in point["classes"]]
    assert len({one["threshold"] for one in few}) == 1
    lines = describe(point, list(annotations.classes))
    assert sum("*" in line for line in lines) == len(few) + 1


def test_promises_are_those_of_images_that_the_thresholds_have_not_seen() -> None:
    """Detections that mean nothing, half of them right; the best cut of a class looks good where it was made."""
    generator = np.random.default_rng(0)
    objects, found = [], []
    for image in range(40):
        for label in range(10):
            objects.append((image, label, [10.0, 10.0, 50.0, 50.0]))
            place = 10.0 if generator.random() < 0.5 else 100.0
            found.append((image, label, float(generator.random()), [place, place, place + 40, place + 40]))
    annotations, detections = annotations_of(objects, 40, list("abcdefghij")), detections_of(found)
    classes = fit_operating_point(annotations, detections, Goal("precision", 0.7))["classes"]
    reached = [label for label in range(10) if classes[label]["reached"]]
    there = [measured(annotations, detections, label, classes[label]["threshold"])["precision"] for label in reached]
    promised = [classes[label]["precision"][0] for label in reached]
    assert len(reached) > 4
    assert min(there) >= 0.7
    assert np.mean(promised) < 0.6


def test_promises_hold_what_a_new_sample_gives() -> None:
    seen, later = (random_scene(seed, num_images=300, num_classes=2) for seed in (1, 2))
    point = fit_operating_point(*seen)
    for label, one in enumerate(point["classes"]):
        new = measured(*later, label, one["threshold"])
        for name in ("precision", "recall", "false_alarms"):
            value, low, high = one[name]
            assert low < value < high
            assert low - 0.1 <= new[name] <= high + 0.1, name
        _, low, high = one["count_error"]
        assert low - 0.1 <= -new["count"] <= high + 0.1


def test_estimates_are_counts_of_the_folds() -> None:
    """With one class, recomputed from the thresholds of each fold, which are those of the other images alone."""
    annotations, detections = random_scene(4, num_images=50, num_classes=1, crowds=False)
    whole = fit_operating_point(annotations, detections, draws=10)["overall"]
    folds = np.random.default_rng(0).permutation(50) % operating_points.FOLDS
    hits = false = 0
    taken = plain_matches(annotations, detections)
    for fold in range(operating_points.FOLDS):
        here = np.isin(detections.indices, np.flatnonzero(folds != fold))
        part = DetectionArrays(*(field[here] for field in detections))
        images = np.repeat(np.arange(50), np.diff(annotations.offsets))
        objects = [
            (int(image), 0, box.tolist())
            for image, box in zip(images, annotations.boxes, strict=True)
            if folds[image] != fold
        ]
        fitted = fit_operating_point(annotations_of(objects, 50, ["a"]), part, draws=10)["classes"][0]["threshold"]
        for row in np.flatnonzero((folds[detections.indices] == fold) & (detections.scores >= fitted)):
            hits, false = hits + (row in taken), false + (row not in taken)
    assert whole["precision"][0] == pytest.approx(hits / (hits + false), abs=1e-6)
    assert whole["recall"][0] == pytest.approx(hits / len(annotations.labels), abs=1e-6)
    assert whole["false_alarms"][0] == pytest.approx(false / 50, abs=1e-6)


@pytest.mark.parametrize("num_images", [1, 2, 7])
@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.name)
def test_little_data_gives_a_threshold_and_no_promise(goal: Goal, num_images: int) -> None:
    nothing = detections_of([])
    empty = annotations_of([], num_images, ["a", "b"])
    some = annotations_of([(0, 0, [1.0, 1.0, 9.0, 9.0])], num_images, ["a", "b"])
    one = detections_of([(0, 0, 1.0, [1.0, 1.0, 9.0, 9.0])])
    for annotations in (empty, some):
        for detections in (nothing, one):
            point = fit_operating_point(annotations, detections, goal, draws=10)
            assert all(0 <= cls["threshold"] < 1 for cls in point["classes"])
            assert point["classes"][1]["recall"] is None, "no object defines one"
            assert describe(point, list(annotations.classes))


@pytest.mark.parametrize(
    ("goal", "code", "key"),
    [
        (Goal("best"), "unknown-value", "goal"),
        (Goal("precision"), "out-of-range", "target"),
        (Goal("recall", 1.5), "out-of-range", "target"),
        (Goal("false_alarms", float("nan")), "out-of-range", "target"),
        (Goal("f1", 0.5), "out-of-range", "target"),
    ],
)
def test_impossible_goals(goal: Goal, code: str, key: str) -> None:
    with refused(code, key):
        fit_operating_point(annotations_of([], 1, ["a"]), detections_of([]), goal)


def test_resampled_sums_are_those_of_repeated_images() -> None:
    generator = np.random.default_rng(0)
    weights = resamples(9, draws=20)
    assert (weights.sum(axis=1) == 9).all()
    images, values = generator.integers(0, 9, 50), generator.random((50, 2))
    expected: Any = [sum(weights[draw, i] * v for i, v in zip(images, values, strict=True)) for draw in range(20)]
    np.testing.assert_allclose(weighted_sums(weights, images, values), expected, rtol=1e-5)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    weights, covered = resamples(50, draws=300), 0
    for _ in range(200):
        values = generator.random((50, 1))
        draws = weighted_sums(weights, np.arange(50), values)[:, 0] / 50
        estimate = interval(float(values.mean()), draws)
        assert estimate is not None
        covered += estimate.low <= 0.5 <= estimate.high
    assert 180 <= covered <= 199  # 190 expected
