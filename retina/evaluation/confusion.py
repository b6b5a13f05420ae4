"""Which class is taken for which, at score thresholds. Beside the road."""

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.evaluation.error_types import HIGH, pairs_of
from retina.evaluation.outcomes import Outcomes

Pairs = tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"]]
"""Detections and objects."""


def confusion_matrix(
    outcomes: Outcomes, kept: Bool[np.ndarray, "D"], pairs: Pairs | None = None
) -> Int64[np.ndarray, "K1 K1"]:
    """Objects by their class (rows) and the class of the detection that found them (columns); the last row and column
    are the background: false alarms that found nothing, and objects that nothing found.

    An object goes to a detection of its own class before any other, by COCO's rules. What is left over on both sides is
    paired across classes, best score first, each with the free object of highest IoU >= 0.5. So the diagonal over the
    sum of its row is recall, and over the sum of its column precision. Crowd regions, and detections of one, are left
    out.

    kept: the detections above their thresholds.
    pairs: of `overlaps`, for those who make many matrices."""
    annotations, background = outcomes.annotations, len(outcomes.annotations.classes)
    hit, false = outcomes.hits() & kept, ~outcomes.hits() & ~outcomes.ignored() & kept
    free = ~annotations.crowd
    free[outcomes.objects[hit, 0]] = False
    found = np.full(len(annotations.labels), background, dtype=np.int64)
    found[outcomes.objects[hit, 0]] = outcomes.labels[hit]
    taken, used = set[int](), set[int]()
    detections, objects = overlaps(outcomes) if pairs is None else pairs
    possible = kept[detections] & free[objects]
    for row, place in zip(detections[possible].tolist(), objects[possible].tolist(), strict=True):
        if row not in used and place not in taken:
            used.add(row)
            taken.add(place)
            found[place] = outcomes.labels[row]
    alone = false.copy()
    alone[list(used)] = False
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    np.add.at(matrix, (annotations.labels[~annotations.crowd], found[~annotations.crowd]), 1)
    np.add.at(matrix, (background, outcomes.labels[alone]), 1)
    return matrix


def overlaps(outcomes: Outcomes) -> Pairs:
    """False detections with the objects they overlap at IoU >= 0.5, best score first, then best IoU."""
    rows = np.flatnonzero(~outcomes.hits() & ~outcomes.ignored())
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)), *pairs_of(outcomes, rows, HIGH)]
    detections, objects, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((objects, -iou, detections, -outcomes.scores[detections]))
    return detections[order], objects[order]


def precision_and_recall(
    matrix: Int64[np.ndarray, "K1 K1"],
) -> tuple[Float64[np.ndarray, "K"], Float64[np.ndarray, "K"]]:
    """Of every class, NaN where nothing was found or there is nothing."""
    diagonal = np.diag(matrix)[:-1]
    found, there = matrix.sum(axis=0)[:-1], matrix.sum(axis=1)[:-1]
    precision, recall = (
        np.divide(diagonal, total, out=np.full(len(diagonal), np.nan), where=total > 0) for total in (found, there)
    )
    return precision, recall
