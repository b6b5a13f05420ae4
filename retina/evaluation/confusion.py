"""Which class is taken for which, at score thresholds. Beside the road."""

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.evaluation.error_types import HIGH, pairs_of
from retina.evaluation.outcomes import Outcomes


def confusion_matrix(outcomes: Outcomes, kept: Bool[np.ndarray, "D"]) -> Int64[np.ndarray, "K1 K1"]:
    """Objects by their class (rows) and the class of the detection that found them (columns); the last row and column
    are the background: false alarms that found nothing, and objects that nothing found.

    An object goes to a detection of its own class before any other, by COCO's rules. What is left over on both sides is
    paired across classes, best score first, each with the free object of highest IoU >= 0.5. So the diagonal over the
    sum of its row is recall, and over the sum of its column precision. Crowd regions, and detections of one, are left
    out.

    kept: the detections above their thresholds."""
    annotations, background = outcomes.annotations, len(outcomes.annotations.classes)
    hit, false = outcomes.hits() & kept, ~outcomes.hits() & ~outcomes.ignored() & kept
    free = ~annotations.crowd
    free[outcomes.objects[hit, 0]] = False
    found = np.full(len(annotations.labels), background, dtype=np.int64)
    found[outcomes.objects[hit, 0]] = outcomes.labels[hit]

    rows = np.flatnonzero(false)
    paired = np.zeros(len(kept), dtype=bool)
    for row, place in _pair(outcomes, rows, free):
        found[place], paired[row] = outcomes.labels[row], True
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    objects = ~annotations.crowd
    np.add.at(matrix, (annotations.labels[objects], found[objects]), 1)
    np.add.at(matrix, (background, outcomes.labels[false & ~paired]), 1)
    return matrix


def _pair(outcomes: Outcomes, rows: Int64[np.ndarray, "n"], free: Bool[np.ndarray, "G"]) -> list[tuple[int, int]]:
    """Detections of `rows` with free objects of other classes; those of one image compete."""
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)), *pairs_of(outcomes, rows, HIGH)]
    detections, objects, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    open_ = free[objects]
    detections, objects, iou = detections[open_], objects[open_], iou[open_]
    order = np.lexsort((objects, -iou, detections, -outcomes.scores[detections]))
    taken, used, pairs = set[int](), set[int](), []
    for row, place in zip(detections[order].tolist(), objects[order].tolist(), strict=True):
        if row not in used and place not in taken:
            used.add(row)
            taken.add(place)
            pairs.append((row, place))
    return pairs


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
