"""What can be read but is likely not meant, counted: each a warning of one line. Beside the road."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from retina.data.annotations import Annotations
from retina.data.checks import alike_names, some

_SLACK = 2.0
"""Pixels, and a tenth of the box, that a polygon may leave its box by."""


def count_oddities(records: Sequence[Mapping[str, Any]], xywh: Float64[np.ndarray, "T 4"]) -> Int64[np.ndarray, "3"]:
    """Of sound annotations, how many have flags that mean nothing here, an area and a polygon that contradict the
    box."""
    ignored = sum(bool(record.get("ignore")) for record in records)
    areas = np.array([record.get("area") for record in records], dtype=np.float64)
    too_large = int((areas > 1.5 * xywh[:, 2] * xywh[:, 3] + 1).sum())
    boxes = zip(records, xywh.tolist(), strict=True)
    elsewhere = sum(_is_elsewhere(record.get("segmentation"), box) for record, box in boxes)
    return np.array([ignored, too_large, elsewhere], dtype=np.int64)


def record_oddities(file: Path, counts: Int64[np.ndarray, "3"]) -> list[str]:
    """A line for each of what `count_oddities` has counted, if there is any."""
    ignored, too_large, elsewhere = counts.tolist()
    lines = []
    if ignored:
        fix = "write `iscrowd` 1 where nothing is to be learned and no detection to be counted, or remove them"
        lines.append(f"{file}: annotations: {ignored} have `ignore` 1, and are objects like all others - {fix}")
    for count, problem in (
        (too_large, "have an `area` larger than their box"),
        (elsewhere, "have a polygon elsewhere"),
    ):
        if count:
            fix = "see which of the two is right: boxes are learned, areas sort objects into small, medium and large"
            lines.append(f"{file}: annotations: {count} {problem} - {fix}")
    return lines


def rotations(records: Sequence[Mapping[str, Any]]) -> Float64[np.ndarray, "T"]:
    """Degrees by which CVAT says that each box is turned: `attributes.rotation`, mostly 0."""

    def degrees(record: Mapping[str, Any]) -> float:
        attributes = record.get("attributes")
        value = attributes.get("rotation") if isinstance(attributes, dict) else None
        return float(value) if isinstance(value, (int, float)) and abs(value) < 1e6 else 0.0

    return np.array([degrees(record) for record in records], dtype=np.float64)


def _is_elsewhere(segmentation: Any, box: Sequence[float]) -> bool:
    """Whether a polygon begins outside of its box. Other points are not looked at: there may be millions."""
    start = segmentation[0] if isinstance(segmentation, list) and segmentation else None
    if not (isinstance(start, list) and len(start) >= 6 and all(type(value) in (int, float) for value in start[:2])):
        return False
    (x, y), (left, top, width, height) = start[:2], box
    across, down = _SLACK + width / 10, _SLACK + height / 10
    return not (left - across <= x <= left + width + across and top - down <= y <= top + height + down)


def content_oddities(splits: Mapping[str, Annotations]) -> Iterator[str]:
    """Of whole splits: crowd regions mostly, boxes that are there twice, classes that nothing is learned of."""
    for split in splits.values():
        num_crowd, total = int(split.crowd.sum()), len(split.crowd)
        if total / 2 < num_crowd < total:
            problem = f"{num_crowd} of {total} are crowd regions (`iscrowd` 1), of which nothing is learned"
            yield f"{split.file}: annotations: {problem} - write 0 for single objects"
        yield from _repeated(split)
    if first := splits.get("train"):
        counts = sum((split.class_counts() for split in splits.values()), np.zeros(len(first.classes), np.int64))
        if counts.any() and (dead := [name for name, n in zip(first.classes, counts, strict=True) if n == 0]):
            fix = "remove the categories (some exports add the supercategory as one), or annotate objects of them"
            yield f"{first.file}: categories: no object of {some(dead)} in any split: never learned - {fix}"
        yield from (f"{first.file}: categories: {line}" for line in alike_names(first.classes))


def _repeated(split: Annotations) -> Iterator[str]:
    """Boxes of an image that are equal to the last digit, of one class or of several."""
    images = np.repeat(np.arange(len(split)), np.diff(split.offsets))
    rows = np.flatnonzero(~split.crowd)
    places = np.unique(np.column_stack([images[rows], split.boxes[rows]]), axis=0, return_inverse=True)[1].reshape(-1)
    pairs: Int64[np.ndarray, "P 2"] = np.unique(np.column_stack([places, split.labels[rows]]), axis=0)
    if repeated := len(rows) - len(pairs):
        problem = f"{repeated} repeat the box and class of another of their image"
        yield f"{split.file}: annotations: {problem} - remove them: each counts as an object of its own"
    shared = np.flatnonzero(np.bincount(pairs[:, 0]) > 1)
    if len(shared):
        labels = pairs[np.isin(pairs[:, 0], shared)]
        names = Counter(
            " and ".join(split.classes[k] for k in labels[labels[:, 0] == place, 1]) for place in shared[:1000]
        )
        problem = f"{len(shared)} boxes have more than one class ({some([name for name, _ in names.most_common()])})"
        yield f"{split.file}: annotations: {problem} - give each the class that is to be detected, or merge the classes"


def crowding(split: Annotations, max_dets: int, max_detections: int | None = None) -> list[str]:
    """Warnings if images have more objects than metrics count detections, or than a detector keeps (of all classes)."""
    images = np.repeat(np.arange(len(split)), np.diff(split.offsets))[~split.crowd]
    of_class = np.unique(images * len(split.classes) + split.labels[~split.crowd], return_counts=True)[1]
    lines = []
    for counts, limit, what, key in (
        (of_class, max_dets, "of one class, and metrics count the best", "eval.max_dets"),
        (np.bincount(images), max_detections, "in all, and a detector keeps", "postprocess.max_detections"),
    ):
        if limit and len(counts) and counts.max() > limit:
            problem = f"images have up to {counts.max()} objects {what} {limit}: the others count as missed"
            lines.append(f"{split.file}: {problem} - give {key}={-(-counts.max() // 100) * 100}")
    return lines
