"""All that an evaluation says beside COCO's metrics, as one JSON object. Beside the road."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from retina.data.annotations import Annotations
from retina.evaluation.bootstrap import DRAWS, interval, mean_over_classes, resampled_ap, resamples
from retina.evaluation.confusion import confusion_matrix
from retina.evaluation.curves import calibration, precision_over_recall
from retina.evaluation.error_types import Errors, error_costs, find_errors
from retina.evaluation.metrics import COCO, DetectionArrays, Scoring
from retina.evaluation.operating_points import as_json, fit_operating_point
from retina.evaluation.outcomes import NO_OBJECT, Outcomes, find_outcomes

_ASPECT = 1.5
_CROWDING = (1, 5, 10)
"""Objects in an image at which each group begins."""


class Analysis(NamedTuple):
    """`values` for `analysis.json`, and the arrays they are from."""

    values: dict[str, Any]
    outcomes: Outcomes
    errors: Errors
    thresholds: Float64[np.ndarray, "K"]
    matrix: Int64[np.ndarray, "K1 K1"]
    """The confusion matrix at the thresholds."""


def analyze(
    annotations: Annotations,
    detections: DetectionArrays,
    metrics: dict[str, Any],
    *,
    point: dict[str, Any] | None = None,
    scoring: Scoring = COCO,
    draws: int = DRAWS,
) -> Analysis:
    """Counts and intervals of detections with the given `metrics` (of `coco_metrics`).

    point: the operating point of the weights; None fits one to these detections.

    Raises DataError if scores or boxes are not finite."""
    outcomes = find_outcomes(annotations, detections, max_dets=scoring.max_dets)
    fitted = not point
    known = outcomes if scoring.max_dets == COCO.max_dets else None
    point = point or fit_operating_point(annotations, detections, draws=draws, outcomes=known)
    thresholds = np.array([one["threshold"] for one in point["classes"]], dtype=np.float64)
    errors = find_errors(outcomes)
    matrix = confusion_matrix(outcomes, outcomes.above(thresholds))
    values = {
        "images": len(annotations),
        "objects": annotations.num_objects,
        "classes": list(annotations.classes),
        "operating_point": point | {"fitted_here": fitted},
        "intervals": ap_intervals(outcomes, metrics, draws),
        "at_the_point": at_thresholds(outcomes, thresholds),
        "confusion": matrix.tolist(),
        "errors": error_costs(outcomes, errors),
        "breakdown": breakdown(outcomes, thresholds, scoring),
        "calibration": calibration(outcomes),
        "images_without_objects": false_alarms_on_empty(outcomes, thresholds),
    }
    return Analysis(values, outcomes, errors, thresholds, matrix)


def ap_intervals(outcomes: Outcomes, metrics: dict[str, Any], draws: int = DRAWS) -> dict[str, Any]:
    """AP, AP50 and AP75 of all classes, AP and AP50 of each, as [value, low, high]: 95 % of a bootstrap over images.

    Resampled AP lies above AP, because an image that is drawn twice agrees with itself. So the draws are moved: their
    mean is the value."""
    drawn = resampled_ap(outcomes, resamples(len(outcomes.annotations), draws))
    mean = drawn.mean(axis=2)
    of_all = {"AP": mean, "AP50": drawn[:, :, 0], "AP75": drawn[:, :, 5]}
    whole = {key: _estimate(metrics[key], mean_over_classes(part)) for key, part in of_all.items()}
    classes = []
    for label, name in enumerate(outcomes.annotations.classes):
        own = metrics["per_class"][name]
        columns = {"AP": mean[:, label], "AP50": drawn[:, label, 0]}
        classes.append({key: _estimate(own[key], column) for key, column in columns.items()})
    return {"images_drawn": draws, "overall": whole, "classes": classes}


def _estimate(value: float | None, draws: Float[np.ndarray, "R"]) -> list[float] | None:
    if value is None or not np.isfinite(draws).any():
        return None
    return as_json(interval(value, np.clip(draws - np.nanmean(draws) + value, 0, 1)))


def at_thresholds(outcomes: Outcomes, thresholds: Float64[np.ndarray, "K"]) -> list[dict[str, Any]]:
    """Counts of each class, and what follows from them; null where undefined."""
    kept, size = outcomes.above(thresholds), len(thresholds)
    hit, ignored = outcomes.hits(), outcomes.ignored()
    hits = np.bincount(outcomes.labels[kept & hit], minlength=size)
    false = np.bincount(outcomes.labels[kept & ~hit & ~ignored], minlength=size)
    objects = outcomes.annotations.class_counts()
    rows = zip(hits.tolist(), false.tolist(), objects.tolist(), thresholds.tolist(), strict=True)
    return [{"threshold": limit, **rates(*counts)} for *counts, limit in rows]


def rates(hits: int, false: int, objects: int) -> dict[str, Any]:
    return {
        "objects": objects,
        "hits": hits,
        "false_alarms": false,
        "missed": objects - hits,
        "precision": hits / (hits + false) if hits + false else None,
        "recall": hits / objects if objects else None,
        "f1": 2 * hits / (hits + false + objects) if objects else None,
    }


def breakdown(
    outcomes: Outcomes, thresholds: Float64[np.ndarray, "K"], scoring: Scoring = COCO
) -> dict[str, list[dict[str, Any]]]:
    """AP, and recall at the thresholds, by size, aspect ratio and crowding of the image.

    A group counts the objects in it, the detections that took one of them, and the false alarms whose own box, or
    image, is in it."""
    annotations = outcomes.annotations
    small, large = map(float, scoring.areas)
    counts = np.diff(annotations.offsets)
    crowding = np.searchsorted(_CROWDING, counts, side="right") - 1
    sizes = [f"area up to {small:g}²", f"area {small:g}² to {large:g}²", f"area over {large:g}²"]
    aspects = [f"tall, over 1:{_ASPECT:g}", "about as tall as wide", f"wide, over {_ASPECT:g}:1"]
    low, middle, high = _CROWDING
    crowds = [f"{low} to {middle - 1} objects in the image", f"{middle} to {high - 1}", f"{high} and more"]
    own = np.prod(outcomes.boxes[:, 2:] - outcomes.boxes[:, :2], axis=1)
    groups = {
        "size": (sizes, _by_area(annotations.areas, small, large), _by_area(own, small, large)),
        "aspect": (aspects, _by_aspect(annotations.boxes), _by_aspect(outcomes.boxes)),
        "crowding": (crowds, crowding[outcomes.object_images()], crowding[outcomes.images]),
    }
    kept, taken = outcomes.above(thresholds) & outcomes.hits(), outcomes.objects[:, 0]
    found = np.zeros(len(annotations.labels), dtype=bool)
    found[taken[kept]] = True
    real = ~annotations.crowd
    return {
        kind: [
            {
                "group": name,
                "objects": int((real & (of_objects == number)).sum()),
                "recall": _share(found[real & (of_objects == number)]),
                "ap": _ap_within(outcomes, of_objects == number, of_detections == number),
            }
            for number, name in enumerate(names)
        ]
        for kind, (names, of_objects, of_detections) in groups.items()
    }


def _share(values: Bool[np.ndarray, "n"]) -> float | None:
    return float(values.mean()) if len(values) else None


def _by_area(areas: Float64[np.ndarray, "n"], small: float, large: float) -> Int64[np.ndarray, "n"]:
    return np.searchsorted([small**2, large**2], areas, side="left").astype(np.int64)


def _by_aspect(boxes: Float64[np.ndarray, "n 4"]) -> Int64[np.ndarray, "n"]:
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return (1 - (height > _ASPECT * width) + (width > _ASPECT * height)).astype(np.int64)


def _ap_within(outcomes: Outcomes, objects: Bool[np.ndarray, "G"], alarms: Bool[np.ndarray, "D"]) -> float | None:
    annotations = outcomes.annotations
    counts = np.bincount(annotations.labels[objects & ~annotations.crowd], minlength=len(annotations.classes))
    classes, values = np.flatnonzero(counts).tolist(), []
    for number in range(outcomes.objects.shape[1]):
        taken = outcomes.objects[:, number]
        hit = outcomes.hits(number)
        hit[hit] = objects[taken[hit]]
        counted = hit | (alarms & (taken == NO_OBJECT))
        for label in classes:
            part = outcomes.of_class(label)
            values.append(precision_over_recall(hit[part], counted[part], int(counts[label])).mean())
    return float(np.mean(values)) if values else None


def false_alarms_on_empty(outcomes: Outcomes, thresholds: Float64[np.ndarray, "K"]) -> dict[str, Any]:
    """At the thresholds, on images without any object or crowd region."""
    empty = np.diff(outcomes.annotations.offsets) == 0
    alarms = outcomes.images[outcomes.above(thresholds) & empty[outcomes.images]]
    return {
        "images": int(empty.sum()),
        "with_false_alarms": len(np.unique(alarms)),
        "false_alarms": len(alarms),
    }


def mistakes_per_image(analysis: Analysis) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """Missed objects and false alarms at the thresholds."""
    outcomes = analysis.outcomes
    kept, num_images = outcomes.above(analysis.thresholds), len(outcomes.annotations)
    false = kept & ~outcomes.hits() & ~outcomes.ignored()
    missing = ~outcomes.annotations.crowd
    missing[outcomes.objects[kept & outcomes.hits(), 0]] = False
    missed = np.bincount(outcomes.object_images()[missing], minlength=num_images)
    return missed.astype(np.int64), np.bincount(outcomes.images[false], minlength=num_images).astype(np.int64)


def most_confused(
    matrix: Int64[np.ndarray, "K1 K1"], classes: list[str], limit: int = 10
) -> list[tuple[str, str, int]]:
    """Pairs of classes (what it is, what it was taken for, how often), most frequent first."""
    inner = matrix[:-1, :-1] * ~np.eye(len(matrix) - 1, dtype=bool)
    order = np.argsort(-inner, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(place), len(inner)) for place in order]
    return [(classes[row], classes[column], int(inner[row, column])) for row, column in pairs if inner[row, column]]


def describe(values: dict[str, Any]) -> list[str]:
    """A few sentences: what it finds at the operating point, what it lacks, and what costs most."""
    rows = values["at_the_point"]
    totals = [sum(row[key] for row in rows) for key in ("hits", "false_alarms", "objects")]
    whole = rates(*totals)
    if not whole["objects"]:
        return ["There are no objects to find, so there is nothing to say of what is found."]
    share = "-" if whole["precision"] is None else f"{1 - whole['precision']:.0%}"
    lines = [f"It finds {whole['recall']:.0%} of the objects; {share} of its detections are false alarms."]
    scored = [(row["f1"], name) for row, name in zip(rows, values["classes"], strict=True) if row["f1"] is not None]
    if len(scored) > 1:
        (worst, weak), (best, strong) = min(scored), max(scored)
        lines.append(f"Its strong point is {strong} (F1 {best:.2f}), its weak point {weak} (F1 {worst:.2f}).")
    costs = {kind: one["ap50"] for kind, one in values["errors"].items() if one["ap50"] is not None}
    if costs and max(costs.values()) > 0:
        kind = max(costs, key=lambda name: costs[name])
        words = _IN_WORDS[kind]
        lines.append(f"Most AP50 is lost to {words} ({100 * costs[kind]:.1f} points).")
    empty = values["images_without_objects"]
    if empty["images"]:
        lines.append(f"{empty['with_false_alarms']} of {empty['images']} images without objects have false alarms.")
    return lines


_IN_WORDS = {
    "classification": "wrong classes",
    "localisation": "badly placed boxes",
    "both": "boxes of a wrong class and place",
    "duplicate": "objects that are found twice",
    "background": "detections where nothing is",
    "missed": "objects that are missed",
}
