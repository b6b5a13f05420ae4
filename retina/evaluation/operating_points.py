"""From detections on a validation split to a score threshold per class, and what to expect of it. Beside the road.

The thresholds are fitted on all images. What they promise is cross-fitted: of each fold of the images, the numbers are
those of thresholds fitted on the other folds. Classes with few objects take the threshold of all classes together,
because one that is fitted on a handful says nothing about other images."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.data.annotations import Annotations
from retina.errors import check, check_choice
from retina.evaluation.bootstrap import DRAWS, Estimate, interval, resamples, weighted_sums
from retina.evaluation.metrics import DetectionArrays
from retina.evaluation.outcomes import Outcomes, find_outcomes
from retina.schema import GOALS

FEW_OBJECTS = 20
"""Classes with fewer take the pooled threshold."""
FOLDS = 5
_FLOOR = 0.05
_WITHOUT_HITS = 0.3
"""The threshold where no detection is right: any is as good, and pictures should show something."""
_HIGHEST = math.nextafter(1.0, 0.0)


class Goal(NamedTuple):
    name: str = "f1"
    target: float | None = None
    """Of precision, recall and false_alarms."""

    def check(self) -> None:
        """Raises ConfigError for a goal that there is not, and a target that is missing or out of range."""
        check_choice(self.name, GOALS, "goal")
        if self.name in ("precision", "recall"):
            sound = self.target is not None and 0 < self.target <= 1
            check(sound, "target", self.target, f"give the {self.name} wanted, above 0, at most 1")
        elif self.name == "false_alarms":
            sound = self.target is not None and 0 <= self.target < math.inf
            check(sound, "target", self.target, "give false alarms per image, 0 or more")
        else:
            check(self.target is None, "target", self.target, f"leave it out: goal={self.name} takes none")


F1 = Goal()


def fit_operating_point(
    annotations: Annotations,
    detections: DetectionArrays,
    goal: Goal = F1,
    *,
    draws: int = DRAWS,
    outcomes: Outcomes | None = None,
) -> dict[str, Any]:
    """Thresholds for the goal and what is expected of them, as it stands in the header of weights
    (`retina.model.header` checks it there).

    draws: resamples of the images that intervals are made from.
    outcomes: of these detections, where they are known already.

    Keys: goal, target, num_images; `classes`, for each label its threshold, whether that is pooled, whether the target
    was reached, objects, and estimates [value, low, high] of precision, recall, false_alarms (per image) and
    count_error (mean absolute, per image), null where undefined; `overall`, the same estimates over all classes.
    Deterministic. Raises ConfigError for an impossible goal."""
    goal.check()
    if not len(annotations):
        return {}
    outcomes = outcomes or find_outcomes(annotations, detections)
    steps = _Steps.of(outcomes)
    few = annotations.class_counts() < FEW_OBJECTS
    num_folds = min(FOLDS, len(annotations))
    folds = np.random.default_rng(0).permutation(len(annotations)) % num_folds
    everywhere = np.ones(len(annotations), dtype=bool)
    thresholds, reached = _thresholds(outcomes, steps, goal, everywhere, few)
    training = [folds != fold for fold in range(num_folds)] if num_folds > 1 else [everywhere]
    held_out = np.stack([_thresholds(outcomes, steps, goal, used, few)[0] for used in training])
    kept = outcomes.scores >= held_out[folds[outcomes.images], outcomes.labels]
    classes, overall = _expectations(outcomes, kept, draws)
    counts = annotations.class_counts().tolist()
    settings = zip(thresholds.tolist(), few.tolist(), reached.tolist(), counts, classes, strict=True)
    return {
        "goal": goal.name,
        "target": goal.target,
        "num_images": len(annotations),
        "classes": [
            {"threshold": threshold, "pooled": pooled, "reached": hit, "num_objects": count, **expected}
            for threshold, pooled, hit, count, expected in settings
        ],
        "overall": overall,
    }


class _Steps(NamedTuple):
    """What each detection adds when it is kept, in the order of `Outcomes`."""

    hit: Bool[np.ndarray, "D"]
    false: Bool[np.ndarray, "D"]
    count_error: Int64[np.ndarray, "D"]
    """-1 where an object of its image and class was still uncounted, else 1."""

    @classmethod
    def of(cls, outcomes: Outcomes) -> "_Steps":
        hit, ignored = outcomes.hits(), outcomes.ignored()
        missing = _objects_per_image(outcomes.annotations)[outcomes.images, outcomes.labels]
        error = np.where(outcomes.ranks < missing, -1, 1) * ~ignored
        return cls(hit, ~hit & ~ignored, error.astype(np.int64))


def _objects_per_image(annotations: Annotations) -> Int64[np.ndarray, "N K"]:
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))[~annotations.crowd]
    shape = len(annotations), len(annotations.classes)
    cells = images * shape[1] + annotations.labels[~annotations.crowd]
    return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape).astype(np.int64)


def _thresholds(
    outcomes: Outcomes, steps: _Steps, goal: Goal, used: Bool[np.ndarray, "N"], few: Bool[np.ndarray, "K"]
) -> tuple[Float64[np.ndarray, "K"], Bool[np.ndarray, "K"]]:
    """Of every class, fitted on the images used, and whether they meet the goal there."""
    annotations = outcomes.annotations
    object_labels = annotations.labels[~annotations.crowd & used[outcomes.object_images()]]
    counts = np.bincount(object_labels, minlength=len(few))
    in_use, num_images = used[outcomes.images], int(used.sum())
    thresholds, reached = np.empty(len(few)), np.zeros(len(few), dtype=bool)
    if few.any():
        rows = np.argsort(-outcomes.scores, kind="stable")
        rows = rows[in_use[rows]]
        thresholds[few], reached[few] = _best(outcomes, steps, rows, goal, int(counts.sum()), num_images)
    for label in np.flatnonzero(~few).tolist():
        part = outcomes.of_class(label)
        rows = np.arange(part.start, part.stop)[in_use[part]]
        chosen = _best(outcomes, steps, rows, goal, int(counts[label]), num_images)
        thresholds[label], reached[label] = chosen
    return thresholds, reached


def _best(
    outcomes: Outcomes,
    steps: _Steps,
    rows: Int64[np.ndarray, "n"],
    goal: Goal,
    num_objects: int,
    num_images: int,
) -> tuple[float, bool]:
    """The threshold that serves the goal best among the detections `rows`, best score first, and whether it meets it.

    A cut c keeps the first c of them. Equal scores cannot be cut apart. Of equally good cuts the first is taken."""
    scores = outcomes.scores[rows]
    cuts = np.concatenate([[0], 1 + np.flatnonzero(np.diff(scores, append=-math.inf))])
    hits, false, errors = (np.concatenate([[0], np.cumsum(part[rows])])[cuts] for part in steps)
    recall, kept = hits / max(num_objects, 1), hits + false
    precision = hits / np.maximum(kept, 1)
    if goal.name in ("f1", "precision", "recall") and not hits[-1]:
        return _WITHOUT_HITS, False
    met, target = np.ones(len(cuts), dtype=bool), goal.target or 0.0
    if goal.name == "f1":
        gain = 2 * hits / np.maximum(kept + num_objects, 1)
    elif goal.name == "count":
        gain = -errors.astype(np.float64)
    elif goal.name == "precision":
        met = (precision >= target) & (hits > 0)
        gain = recall if met.any() else precision
    elif goal.name == "recall":
        met = recall >= target
        gain = precision if met.any() else recall
    else:
        met = false <= target * max(num_images, 1)
        gain = recall
    best = int(np.argmax(np.where(met, gain, -math.inf) if met.any() else gain))
    return _between(scores, int(cuts[best])), bool(met[best])


def _between(scores: Float64[np.ndarray, "n"], cut: int) -> float:
    """A threshold in the middle between the last score kept and the first that is not."""
    above = scores[cut - 1] if cut else 1.0
    below = scores[cut] if cut < len(scores) else min(_FLOOR, above)
    if not len(scores):
        return _FLOOR
    middle = (float(above) + float(below)) / 2
    return min(max(middle if middle > below else float(above), 0.0), _HIGHEST)


def _expectations(
    outcomes: Outcomes, kept: Bool[np.ndarray, "D"], draws: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Estimates per class and over all, of the detections that are kept."""
    annotations = outcomes.annotations
    num_images, num_classes = len(annotations), len(annotations.classes)
    weights = resamples(num_images, draws)
    drawn = weights.sum(axis=1, dtype=np.int64)
    hit = kept & outcomes.hits()
    false = kept & ~outcomes.hits() & ~outcomes.ignored()
    objects = ~annotations.crowd
    images = np.concatenate([outcomes.images[hit], outcomes.images[false], outcomes.object_images()[objects]])
    labels = np.concatenate([outcomes.labels[hit], outcomes.labels[false], annotations.labels[objects]])
    kinds = np.repeat([0, 1, 2], [hit.sum(), false.sum(), objects.sum()])
    cells, where = np.unique(labels * num_images + images, return_inverse=True)
    tally = np.zeros((len(cells), 3), dtype=np.int64)
    np.add.at(tally, (where, kinds), 1)
    cell_images, cell_labels = cells % num_images, cells // num_images

    def estimates(images: Int64[np.ndarray, "C"], tally: Int64[np.ndarray, "C 3"]) -> dict[str, Any]:
        error = np.abs(tally[:, 0] + tally[:, 1] - tally[:, 2])
        values = np.column_stack([tally, error]).astype(np.float64)
        all_draws = weighted_sums(weights, images, values)
        value = _rates(values.sum(axis=0, keepdims=True), np.array([num_images]))
        spread = _rates(all_draws.astype(np.float64), drawn)
        return {name: as_json(interval(float(value[name][0]), spread[name])) for name in value}

    edges = np.searchsorted(cell_labels, np.arange(num_classes + 1))
    parts = [slice(*edges[label : label + 2]) for label in range(num_classes)]
    classes = [estimates(cell_images[part], tally[part]) for part in parts]
    whole = np.zeros((num_images, 3), dtype=np.int64)
    np.add.at(whole, cell_images, tally)
    return classes, estimates(np.arange(num_images), whole)


def _rates(sums: Float64[np.ndarray, "R 4"], num_images: Int64[np.ndarray, "R"]) -> dict[str, Float64[np.ndarray, "R"]]:
    hits, false, objects, error = sums.T
    nothing = np.full(len(sums), np.nan)
    return {
        "precision": np.divide(hits, hits + false, out=nothing.copy(), where=hits + false > 0),
        "recall": np.divide(hits, objects, out=nothing.copy(), where=objects > 0),
        "false_alarms": false / num_images,
        "count_error": error / num_images,
    }


def as_json(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [round(number, 6) for number in estimate]


def describe(point: dict[str, Any], classes: list[str]) -> list[str]:
    """A sentence on all classes, then a table with a row per class."""
    target = "" if point["target"] is None else f" {point['target']:g}"
    whole = {name: _shown(point["overall"][name]) for name in point["overall"]}
    lines = [
        f"operating point for {point['goal']}{target}, from {point['num_images']} images: precision "
        f"{whole['precision']}, recall {whole['recall']}, {whole['false_alarms']} false alarms per image, "
        f"number of objects wrong by {whole['count_error']} per image"
    ]
    columns = ("precision", "recall", "false_alarms", "count_error")
    table = [["class", "objects", "threshold", "precision", "recall", "false alarms", "count error"]]
    for name, one in zip(classes, point["classes"], strict=True):
        row = [name, str(one["num_objects"]), f"{one['threshold']:.3f}" + "*" * one["pooled"]]
        table.append(row + [_shown(one[column]) for column in columns])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    if any(one["pooled"] for one in point["classes"]):
        lines.append(f"* fewer than {FEW_OBJECTS} objects: the threshold of all classes together")
    missed = [name for name, one in zip(classes, point["classes"], strict=True) if not one["reached"]]
    if missed:
        lines.append(f"no threshold reaches {point['goal']}{target} for {', '.join(missed)}")
    return lines


def _shown(estimate: list[float] | None) -> str:
    if estimate is None:
        return "-"
    value, low, high = estimate
    return f"{value:.2f} ({low:.2f}-{high:.2f})"
