"""COCO's twelve box metrics and their values per class, on flat arrays."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.data.coco import Annotations
from retina.errors import DataError
from retina.evaluation.matching import AREA_RANGES, THRESHOLDS, Boxes, Matches, extents, match

RECALLS = np.linspace(0.0, 1.0, 101)
"""[P] recalls at which precision is sampled."""
MAX_DETECTIONS = (1, 10, 100)
"""Detections of one image and class that AR1, AR10 and AR100 look at; everything else looks at the last number."""


class DetectionArrays(NamedTuple):
    """Detections of a whole data set. Those of one image and class with equal scores are ranked in the order given."""

    indices: Int64[np.ndarray, "D"]
    """Which record of the annotations each detection is in."""
    boxes: Float64[np.ndarray, "D 4"]
    """xyxy in pixels of the original image."""
    scores: Float64[np.ndarray, "D"]
    labels: Int64[np.ndarray, "D"]


def coco_metrics(annotations: Annotations, detections: DetectionArrays) -> dict[str, Any]:
    """COCO's box metrics of the detections, as fractions of 1; None where there is no object to define one.

    Keys, in this order: AP (mean over IoU 0.50:0.05:0.95), AP50, AP75, APs, APm, APl (objects of area up to 32^2, up to
    96^2, larger), AR1, AR10, AR100 (best 1, 10, 100 detections per image and class), ARs, ARm, ARl. Then `per_class`,
    which holds under each class name the same twelve keys for that class alone and `num_objects`, its objects without
    crowd regions. A mean over classes leaves out those in which the metric is undefined.

    The numbers are those of pycocotools' COCOeval (cocodataset/cocoapi) up to rounding, ties of scores included: images
    count in ascending order of id, detections of one image in the order given. Differences, all on purpose: undefined
    is None instead of -1, no detection at all gives 0 instead of an IndexError, and ids of annotations mean nothing
    (pycocotools takes an object with id 0 for unmatched).

    Raises DataError if scores or boxes are not finite, ValueError if indices or labels are out of range.
    """
    check_detections(annotations, detections)
    num_classes = len(annotations.classes)
    image_order = np.argsort(np.argsort(annotations.image_ids))
    ranked, groups, ranks = _rank(detections, image_order)
    labels = ranked.labels

    object_images = np.repeat(image_order, np.diff(annotations.offsets))
    object_groups = annotations.labels * len(annotations) + object_images
    order = np.argsort(object_groups, kind="stable")
    crowd = annotations.crowd[order]
    counts = ~crowd[:, None] & _in_ranges(annotations.areas[order])
    objects = Boxes(annotations.boxes[order], object_groups[order])
    num_counted = np.zeros((num_classes, len(AREA_RANGES)), dtype=np.int64)
    np.add.at(num_counted, annotations.labels[order], counts)

    matches = match(Boxes(ranked.boxes, groups), ranks, objects, crowd, counts)
    in_range = _in_ranges(np.multiply(*extents(ranked.boxes)))
    precision = _precision(matches, labels, ranked.scores, in_range, num_counted)
    recall = _recall(matches, labels, ranks, num_counted)

    class_counts = np.bincount(annotations.labels[~annotations.crowd], minlength=num_classes)
    per_class = {
        name: _summary(precision[:, :, [k]], recall[:, [k]]) | {"num_objects": int(class_counts[k])}
        for k, name in enumerate(annotations.classes)
    }
    return {**_summary(precision, recall), "per_class": per_class}


def check_detections(annotations: Annotations, detections: DetectionArrays) -> None:
    """Raise DataError for scores or boxes that are not finite, ValueError for rows that belong to no image or class."""
    finite = np.isfinite(detections.scores) & np.isfinite(detections.boxes).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{annotations.file}: detections: {np.count_nonzero(~finite)} of {len(finite)} have a score or box that is "
            f"not a finite number - the model has diverged; take an earlier checkpoint or a lower learning rate"
        )
    for name, values, end in (
        ("indices", detections.indices, len(annotations)),
        ("labels", detections.labels, len(annotations.classes)),
    ):
        if len(values) and not 0 <= values.min() <= values.max() < end:
            raise ValueError(f"{name} must lie in [0, {end}), got {values.min()}..{values.max()}")


def _rank(
    detections: DetectionArrays, image_order: Int64[np.ndarray, "N"]
) -> tuple[DetectionArrays, Int64[np.ndarray, "D"], Int64[np.ndarray, "D"]]:
    """The best 100 detections of each image and class, sorted by (class, image, -score), with group and rank."""
    groups = detections.labels * len(image_order) + image_order[detections.indices]
    order = np.lexsort((-detections.scores, groups))
    positions = np.arange(len(order))
    starts = np.diff(groups[order], prepend=-1) > 0
    ranks = positions - np.maximum.accumulate(np.where(starts, positions, 0))
    kept = ranks < MAX_DETECTIONS[-1]
    order = order[kept]
    return DetectionArrays(*(values[order] for values in detections)), groups[order], ranks[kept]


def _in_ranges(areas: Float64[np.ndarray, "N"]) -> Bool[np.ndarray, "N R"]:
    return (areas[:, None] >= AREA_RANGES[:, 0]) & (areas[:, None] <= AREA_RANGES[:, 1])


def _precision(
    matches: Matches,
    labels: Int64[np.ndarray, "D"],
    scores: Float64[np.ndarray, "D"],
    in_range: Bool[np.ndarray, "D R"],
    num_counted: Int64[np.ndarray, "K R"],
) -> Float64[np.ndarray, "T P K R"]:
    """Interpolated precision at each recall, NaN where a class has no object in the area range.

    For detections of a class sorted by score, precision after one of them is tp / (tp + fp + eps); at recall x it is
    the greatest precision from the first detection on that reaches recall x, and 0 if none does. Only a true positive
    raises either number, so it is enough to know tp and fp at the true positives. A false positive is a detection of an
    area within the range that took nothing: those within the range so far, less those of them that took something.
    """
    num_thresholds, (num_classes, num_ranges) = len(THRESHOLDS), num_counted.shape
    num_detections = len(labels)
    # Stable, so equal scores keep the order (image, rank) that the detections already have within a class.
    order = np.lexsort((-scores, labels))
    place = np.empty_like(order)
    place[order] = np.arange(num_detections)
    visible = np.zeros((num_detections + 1, num_ranges), dtype=np.int64)
    np.cumsum(in_range[order], axis=0, out=visible[1:])
    visible_before_class = visible[np.searchsorted(labels, np.arange(num_classes))]

    # Curves are numbered (range, threshold, class); matches are sorted by curve and by place along it.
    curves = matches.ranges * num_thresholds + matches.thresholds
    sort = np.argsort(curves * num_detections + place[matches.detections])
    rows, ranges = matches.detections[sort], matches.ranges[sort]
    curves = curves[sort] * num_classes + labels[rows]
    starts = np.searchsorted(curves, np.arange(num_ranges * num_thresholds * num_classes + 1))
    positive = ~matches.ignored[sort]
    positives = np.concatenate([[0], np.cumsum(positive)])
    seen = np.concatenate([[0], np.cumsum(in_range[rows, ranges])])

    rows, ranges, curves, at = rows[positive], ranges[positive], curves[positive], np.flatnonzero(positive) + 1
    true = positives[at] - positives[starts[curves]]
    took_something = seen[at] - seen[starts[curves]]
    false = visible[place[rows] + 1, ranges] - visible_before_class[labels[rows], ranges] - took_something
    values = np.append(true / (false + true + np.spacing(1)), 0.0)

    # The n-th true positive reaches recall n / num_counted; `first` is where each wanted one stands in `values`.
    wanted = _positives_needed(num_counted)[:, None]
    begins, ends = (
        positives[edges].reshape(num_ranges, num_thresholds, num_classes) for edges in (starts[:-1], starts[1:])
    )
    first = begins[..., None] + wanted
    reached = first < ends[..., None]
    first = np.minimum(first, ends[..., None])
    stretch = np.maximum.reduceat(values, first.ravel()).reshape(first.shape)
    best = np.maximum.accumulate(np.where(reached, stretch, 0.0)[..., ::-1], axis=-1)[..., ::-1]
    best = np.where((num_counted.T > 0)[:, None, :, None], best, np.nan)
    return best.transpose(1, 3, 2, 0)


def _positives_needed(num_counted: Int64[np.ndarray, "K R"]) -> Int64[np.ndarray, "R K P"]:
    """How many true positives come before the one that reaches each recall, by the rounded quotient n / num_counted."""
    totals = np.maximum(num_counted.T, 1)[..., None]
    needed = np.maximum(np.floor(RECALLS * totals) - 1, 0)
    for _ in range(2):
        needed += needed / totals < RECALLS
    return np.maximum(needed - 1, 0).astype(np.int64)


def _recall(
    matches: Matches,
    labels: Int64[np.ndarray, "D"],
    ranks: Int64[np.ndarray, "D"],
    num_counted: Int64[np.ndarray, "K R"],
) -> Float64[np.ndarray, "T K R L"]:
    """Fraction of objects found by the best 1, 10, 100 detections per image and class; NaN where there are none."""
    positive = ~matches.ignored
    rows, thresholds, ranges = matches.detections[positive], matches.thresholds[positive], matches.ranges[positive]
    shape = (len(THRESHOLDS), *num_counted.shape)
    cells = np.ravel_multi_index((thresholds, labels[rows], ranges), shape)
    size = int(np.prod(shape))
    hits = [np.bincount(cells[ranks[rows] < limit], minlength=size).reshape(shape) for limit in MAX_DETECTIONS]
    return np.stack(hits, axis=-1) / np.where(num_counted > 0, num_counted, np.nan)[..., None]


def _summary(
    precision: Float64[np.ndarray, "T P K R"], recall: Float64[np.ndarray, "T K R L"]
) -> dict[str, float | None]:
    half, three_quarters = (int(np.flatnonzero(value == THRESHOLDS)[0]) for value in (0.5, 0.75))
    return {
        "AP": _mean(precision[..., 0]),
        "AP50": _mean(precision[half, ..., 0]),
        "AP75": _mean(precision[three_quarters, ..., 0]),
        "APs": _mean(precision[..., 1]),
        "APm": _mean(precision[..., 2]),
        "APl": _mean(precision[..., 3]),
        "AR1": _mean(recall[..., 0, 0]),
        "AR10": _mean(recall[..., 0, 1]),
        "AR100": _mean(recall[..., 0, 2]),
        "ARs": _mean(recall[..., 1, 2]),
        "ARm": _mean(recall[..., 2, 2]),
        "ARl": _mean(recall[..., 3, 2]),
    }


def _mean(values: Float64[np.ndarray, "..."]) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
