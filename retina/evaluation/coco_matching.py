"""Which detection takes which object, by COCO's rules, for all images, classes, thresholds and area ranges together.

The rules are those of `COCOeval.evaluateImg` (cocodataset/cocoapi, PythonAPI/pycocotools/cocoeval.py): within one
image and class the detections choose in descending order of score, each among the objects still free with IoU >=
threshold. An object that counts is preferred to one that is ignored (a crowd region, or outside of the area range),
then the higher IoU, then the object later in the file. A crowd region may be taken any number of times.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""[T] IoU thresholds, COCO's 0.50:0.05:0.95."""
MAX_PAIRS = 1 << 19
"""Detection-object pairs whose IoU is held at a time, to bound memory on data of one class and many objects."""


class Boxes(NamedTuple):
    """Boxes of detections or of objects, sorted by `groups`."""

    boxes: Float64[np.ndarray, "N 4"]
    groups: Int64[np.ndarray, "N"]
    """One number per (image, class); only boxes of the same group meet."""
    areas: Float64[np.ndarray, "N"]
    """See `box_areas`."""


class Matches(NamedTuple):
    """One row per (detection, threshold, area range) that took an object; a combination without a row took none."""

    detections: Int64[np.ndarray, "E"]
    thresholds: Int64[np.ndarray, "E"]
    ranges: Int64[np.ndarray, "E"]
    ignored: Bool[np.ndarray, "E"]
    """True where the object taken is an ignored one, so that the detection counts neither as right nor as wrong."""
    objects: Int64[np.ndarray, "E"]


def box_areas(boxes: Float64[np.ndarray, "N 4"]) -> Float64[np.ndarray, "N"]:
    """Width times height of `xyxy` boxes, each as the file stated it before x1 + w was rounded.

    fl(x1 + w) - x1 misses w by up to one unit in the last place of the corner, which is enough to move an area of
    exactly 32 x 32 or an IoU of exactly 0.5 to the other side. Where a number of at most 9 decimals lies within that
    error it is taken instead of the difference; the change is never larger than the rounding error itself. A side with
    more decimals than that cannot be restored, which matters only to an IoU that equals a threshold to the last bit.
    """
    difference = boxes[:, 2:] - boxes[:, :2]
    decimal = np.round(difference, 9)
    error = np.spacing(np.maximum(np.abs(boxes[:, :2]), np.abs(boxes[:, 2:])))
    sides = np.where(np.abs(decimal - difference) <= error, decimal, difference)
    return sides[:, 0] * sides[:, 1]


def overlapping_pairs(
    detections: Boxes, objects: Boxes, crowd: Bool[np.ndarray, "G"]
) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"], Float64[np.ndarray, "P"]]:
    """Rows of the detections and objects of the same group with IoU >= 0.5, and that IoU; detection-major.

    IoU with a crowd region is the intersection over the area of the detection alone. The arithmetic is, operation for
    operation, that of `bbIou` in cocoapi's maskApi.c.
    """
    first = np.searchsorted(objects.groups, detections.groups, side="left")
    counts = np.searchsorted(objects.groups, detections.groups, side="right") - first
    pairs = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for low, high in _runs(np.cumsum(counts) // MAX_PAIRS):
        count = counts[low:high]
        rows = np.repeat(np.arange(low, high), count)
        columns = np.arange(len(rows)) + np.repeat(first[low:high] - (np.cumsum(count) - count), count)
        predicted, truth = detections.boxes[rows], objects.boxes[columns]
        sides = np.minimum(predicted[:, 2:], truth[:, 2:]) - np.maximum(predicted[:, :2], truth[:, :2])
        touching = np.flatnonzero((sides > 0).all(axis=1))
        rows, columns = rows[touching], columns[touching]
        intersection = sides[touching, 0] * sides[touching, 1]
        areas = detections.areas[rows]
        union = np.where(crowd[columns], areas, areas + objects.areas[columns] - intersection)
        iou = intersection / union
        close = iou >= THRESHOLDS[0]
        pairs.append((rows[close], columns[close], iou[close]))
    rows, columns, iou = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return rows, columns, iou


def _runs(values: Int64[np.ndarray, "N"]) -> Iterable[tuple[int, int]]:
    """Where each run of equal values begins and ends; none of them is negative."""
    return pairwise(np.flatnonzero(np.diff(values, prepend=-1, append=-1)).tolist())


def match(
    detections: Boxes,
    ranks: Int64[np.ndarray, "D"],
    objects: Boxes,
    crowd: Bool[np.ndarray, "G"],
    counts: Bool[np.ndarray, "G R"],
) -> Matches:
    """Let detections take objects, greedily by score, for every threshold and area range at once.

    `ranks` numbers the detections of a group from 0, best score first; objects of a group stand in the order of the
    file; `counts[g, r]` is False where object g is ignored in area range r. Detections of one rank belong to different
    groups and cannot compete, so one pass per rank over all groups is the same as COCO's loop over images.
    """
    rows, columns, iou = overlapping_pairs(detections, objects, crowd)
    # Positions of pairs now grow with (rank, detection, IoU, place in the file): the later of two equals is preferred.
    order = np.lexsort((iou, rows, ranks[rows]))
    rows, columns, iou = rows[order], columns[order], iou[order]
    num_pairs = len(rows)
    free = np.ones((len(crowd), len(THRESHOLDS), counts.shape[1]), dtype=bool)
    bonus = np.int32(num_pairs) * counts
    taken = [(*np.empty((3, 0), np.int64), np.empty(0, np.bool_), np.empty(0, np.int64))]
    for low, high in _runs(ranks[rows]):
        candidates = columns[low:high]
        allowed = free[candidates] & (iou[low:high, None] >= THRESHOLDS)[:, :, None]
        preference = np.arange(low, high, dtype=np.int32)[:, None] + bonus[candidates]
        starts = np.flatnonzero(np.diff(rows[low:high], prepend=-1))
        best = np.maximum.reduceat(np.where(allowed, preference[:, None, :], np.int32(-1)), starts, axis=0)
        row, threshold, area = np.nonzero(best >= 0)
        pairs = best[row, threshold, area] % np.int32(num_pairs)
        free[columns[pairs], threshold, area] = crowd[columns[pairs]]
        taken.append((rows[pairs], threshold, area, ~counts[columns[pairs], area], columns[pairs]))
    return Matches(*(np.concatenate(parts) for parts in zip(*taken, strict=True)))
