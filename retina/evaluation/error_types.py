"""What is wrong with false detections and missed objects, and what AP each kind costs. Beside the road.

The kinds and their costs are those of Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors,
ECCV 2020, at IoU 0.5 and 0.1. Crowd regions are no objects here, and detections that took one do not count."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.evaluation.coco_matching import THRESHOLDS
from retina.evaluation.curves import precision_over_recall
from retina.evaluation.outcomes import NO_OBJECT, Outcomes

KINDS = ("classification", "localisation", "both", "duplicate", "background")
"""Of false detections, by number; `missed` is that of objects."""
RIGHT, MISSED = -1, "missed"
HIGH, LOW = float(THRESHOLDS[0]), 0.1
_PAIRS = 1 << 20


class Errors(NamedTuple):
    kinds: Int64[np.ndarray, "D"]
    """Number in KINDS, or RIGHT where a detection is right or does not count."""
    objects: Int64[np.ndarray, "D"]
    """The object that a wrong class or place was meant for, else NO_OBJECT."""
    missed: Bool[np.ndarray, "G"]
    """Objects that no detection took, and none is a wrong class or place of."""


def pairs_of(
    outcomes: Outcomes, rows: Int64[np.ndarray, "n"], least: float
) -> Iterator[tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"], Float64[np.ndarray, "P"]]]:
    """Detections among `rows` and objects of the same image, of whatever class, with IoU >= least, and that IoU; in
    parts, all pairs of a detection together and in the order of `rows`. Crowd regions are left out."""
    annotations = outcomes.annotations
    first, counts = annotations.offsets[outcomes.images[rows]], np.diff(annotations.offsets)[outcomes.images[rows]]
    parts = np.cumsum(counts) // _PAIRS
    edges = np.flatnonzero(np.diff(parts, prepend=-1, append=-1))
    areas = np.prod(annotations.boxes[:, 2:] - annotations.boxes[:, :2], axis=1)
    for low, high in pairwise(edges.tolist()):
        count = counts[low:high]
        detections = np.repeat(rows[low:high], count)
        begins = np.repeat(first[low:high] - (np.cumsum(count) - count), count)
        objects = np.arange(len(detections)) + begins
        here, there = outcomes.boxes[detections], annotations.boxes[objects]
        sides = np.maximum(np.minimum(here[:, 2:], there[:, 2:]) - np.maximum(here[:, :2], there[:, :2]), 0)
        shared = sides[:, 0] * sides[:, 1]
        union = np.prod(here[:, 2:] - here[:, :2], axis=1) + areas[objects] - shared
        iou = np.divide(shared, union, out=np.zeros(len(shared)), where=union > 0)
        near = (iou >= least) & (iou > 0) & ~annotations.crowd[objects]
        yield detections[near], objects[near], iou[near]


def _best(
    detections: Int64[np.ndarray, "P"], objects: Int64[np.ndarray, "P"], iou: Float64[np.ndarray, "P"], size: int
) -> tuple[Float64[np.ndarray, "D"], Int64[np.ndarray, "D"]]:
    """The highest IoU of each detection and whose it is; of equals, the first object."""
    value, which = np.zeros(size), np.full(size, NO_OBJECT, dtype=np.int64)
    order = np.lexsort((-objects, iou, detections))  # the last of a detection is its best
    value[detections[order]] = iou[order]
    which[detections[order]] = objects[order]
    return value, which


def find_errors(outcomes: Outcomes) -> Errors:
    size = len(outcomes.rows)
    false = ~outcomes.hits() & ~outcomes.ignored()
    rows = np.flatnonzero(false)
    parts = list(pairs_of(outcomes, rows, LOW))
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    detections, objects, iou = (np.concatenate(column) for column in zip(nothing, *parts, strict=True))
    same = outcomes.annotations.labels[objects] == outcomes.labels[detections]
    of_class, own = _best(detections[same], objects[same], iou[same], size)
    of_others, other = _best(detections[~same], objects[~same], iou[~same], size)

    kinds, meant = np.full(size, RIGHT, dtype=np.int64), np.full(size, NO_OBJECT, dtype=np.int64)
    choices = [(of_class >= LOW) & (of_class < HIGH), of_others >= HIGH, of_class >= HIGH, of_others >= LOW]
    numbers = [KINDS.index(kind) for kind in ("localisation", "classification", "duplicate", "both")]
    kinds[rows] = np.select([choice[rows] for choice in choices], numbers, KINDS.index("background"))
    badly_placed, of_wrong_class = kinds == KINDS.index("localisation"), kinds == KINDS.index("classification")
    meant[badly_placed], meant[of_wrong_class] = own[badly_placed], other[of_wrong_class]

    missed = ~outcomes.annotations.crowd & ~_taken(outcomes)
    missed[meant[meant != NO_OBJECT]] = False
    return Errors(kinds, meant, missed)


def _taken(outcomes: Outcomes) -> Bool[np.ndarray, "G"]:
    taken = np.zeros(len(outcomes.annotations.labels), dtype=bool)
    taken[outcomes.objects[outcomes.hits(), 0]] = True
    return taken


def error_costs(outcomes: Outcomes, errors: Errors) -> dict[str, dict[str, Any]]:
    """Of each kind, how many there are and how much AP50 would rise without them.

    A wrong class or place is mended, unless its object is taken already or a detection of a higher score is mended to
    take it; then, as with the other kinds, the detection is left out. A missed object is left out of the count. None
    where no object defines AP."""
    taken, hits, counts = _taken(outcomes), outcomes.hits(), outcomes.annotations.class_counts()
    scored = ~outcomes.ignored()
    base = _mean_ap(outcomes, hits, scored, outcomes.labels, counts)
    costs: dict[str, dict[str, Any]] = {}
    aimed = np.flatnonzero(errors.objects != NO_OBJECT)
    aimed = aimed[~taken[errors.objects[aimed]]]
    aimed = aimed[np.argsort(-outcomes.scores[aimed], kind="stable")]
    aimed = aimed[np.unique(errors.objects[aimed], return_index=True)[1]]  # the best of each object, whatever its kind
    for number, kind in enumerate(KINDS):
        wrong = errors.kinds == number
        rows = aimed[wrong[aimed]]
        hit, counted, labels = hits.copy(), scored & ~wrong, outcomes.labels.copy()
        hit[rows], counted[rows], labels[rows] = True, True, outcomes.annotations.labels[errors.objects[rows]]
        ap = _mean_ap(outcomes, hit, counted, labels, counts)
        costs[kind] = {"count": int(wrong.sum()), "ap50": _difference(ap, base)}
    left = counts - np.bincount(outcomes.annotations.labels[errors.missed], minlength=len(counts))
    ap = _mean_ap(outcomes, hits, scored, outcomes.labels, left)
    costs[MISSED] = {"count": int(errors.missed.sum()), "ap50": _difference(ap, base)}
    return costs


def _difference(ap: float, base: float) -> float | None:
    return None if np.isnan(base) or np.isnan(ap) else ap - base


def _mean_ap(
    outcomes: Outcomes,
    hit: Bool[np.ndarray, "D"],
    counted: Bool[np.ndarray, "D"],
    labels: Int64[np.ndarray, "D"],
    num_objects: Int64[np.ndarray, "K"],
) -> float:
    """AP50 over the classes that have objects."""
    order = np.lexsort((-outcomes.scores, labels))
    order = order[counted[order]]
    edges = np.searchsorted(labels[order], np.arange(len(num_objects) + 1))
    values = []
    for label in np.flatnonzero(num_objects).tolist():
        rows = order[edges[label] : edges[label + 1]]
        everything = np.ones(len(rows), dtype=bool)
        values.append(precision_over_recall(hit[rows], everything, int(num_objects[label])).mean())
    return float(np.mean(values)) if values else float("nan")
