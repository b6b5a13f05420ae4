"""COCO's twelve box metrics and their values per class, on flat arrays; as JSON and as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.data.coco import Annotations
from retina.errors import DataError, check, plain
from retina.evaluation.coco_matching import THRESHOLDS, Boxes, Matches, box_areas, match
from retina.files import make_folder, write_whole

RECALLS = np.linspace(0.0, 1.0, 101)
"""[P] recalls at which precision is sampled."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What COCO's metrics count; the defaults are COCO's own. Other numbers are not to be compared with published ones.

    Raises ConfigError."""

    max_dets: int = 100
    """Detections of one image and class, the best, that everything but AR1 and AR10 looks at."""
    areas: list[Any] = field(default_factory=lambda: [32, 96])
    """Square roots of the areas at which small ends and large begins."""

    def __post_init__(self) -> None:
        check(self.max_dets > 10, "max_dets", self.max_dets, "give more than 10: AR10 looks at as many")
        areas = self.areas
        sound = len(areas) == 2 and all(isinstance(edge, (int, float)) for edge in areas) and 0 < areas[0] < areas[1]
        check(sound, "areas", areas, "give two ascending numbers of pixels, as [32, 96]")

    @property
    def limits(self) -> tuple[int, int, int]:
        """Detections of one image and class that the three AR of all sizes look at."""
        return (1, 10, self.max_dets)

    @property
    def ranges(self) -> Float64[np.ndarray, "R 2"]:
        """Areas in square pixels, both ends inclusive: all, small, medium, large."""
        small, large = self.areas
        return np.array([[0, 1e5**2], [0, small**2], [small**2, large**2], [large**2, 1e5**2]], dtype=np.float64)

    def meanings(self) -> dict[str, str]:
        """What each of the twelve metrics looks at: AP is a mean of precisions, AR of recalls."""
        low, high = (f"{edge:g}^2" for edge in self.areas)
        sizes = {"s": f"area up to {low}", "m": f"area {low} to {high}", "l": f"area over {high}"}
        return (
            {"AP": "IoU 0.50:0.95", "AP50": "IoU 0.50", "AP75": "IoU 0.75"}
            | {f"AP{size}": area for size, area in sizes.items()}
            | {f"AR{limit}": f"best {limit} per image and class" for limit in self.limits}
            | {f"AR{size}": area for size, area in sizes.items()}
        )


COCO = Scoring()
METRICS = COCO.meanings()
"""COCO's own twelve."""


class DetectionArrays(NamedTuple):
    """Detections of a whole data set. Those of one image and class with equal scores are ranked in the order given."""

    indices: Int64[np.ndarray, "D"]
    """Which record of the annotations each detection is in."""
    boxes: Float64[np.ndarray, "D 4"]
    """xyxy in pixels of the original image."""
    scores: Float64[np.ndarray, "D"]
    labels: Int64[np.ndarray, "D"]


def coco_metrics(annotations: Annotations, detections: DetectionArrays, scoring: Scoring = COCO) -> dict[str, Any]:
    """COCO's box metrics of the detections, as fractions of 1; None where there is no object to define one.

    Keys: those of `Scoring.meanings`, in that order, then `per_class`, which holds under each class name the same
    twelve keys for that class alone and `num_objects`, its objects without crowd regions. A mean over classes leaves
    out those in which the metric is undefined.

    The numbers are those of pycocotools' COCOeval (cocodataset/cocoapi) up to rounding, ties of scores included: images
    count in ascending order of id, detections of one image in the order given. Differences, all on purpose: undefined
    is None instead of -1, no detection at all gives 0 instead of an IndexError, and ids of annotations mean nothing
    (pycocotools takes an object with id 0 for unmatched).

    Raises DataError if scores or boxes are not finite, ValueError if indices or labels are out of range.
    """
    check_detections(annotations, detections)
    num_classes = len(annotations.classes)
    image_order = np.argsort(np.argsort(annotations.image_ids))
    ranked, ranges = _rank(detections, image_order, scoring.max_dets), scoring.ranges

    object_images = np.repeat(image_order, np.diff(annotations.offsets))
    object_groups = annotations.labels * len(annotations) + object_images
    order = np.argsort(object_groups, kind="stable")
    crowd = annotations.crowd[order]
    counts = ~crowd[:, None] & _in_ranges(annotations.areas[order], ranges)
    objects = Boxes(annotations.boxes[order], object_groups[order], box_areas(annotations.boxes[order]))
    labels = annotations.labels[order]
    num_counted = np.stack([np.bincount(labels[column], minlength=num_classes) for column in counts.T], axis=1)

    matches = match(ranked.boxes, ranked.ranks, objects, crowd, counts)
    precision = _precision(matches, ranked, num_counted, ranges)
    recall = _recall(matches, ranked, num_counted, scoring.limits)

    values = _values(precision, recall, scoring)
    class_counts = np.bincount(annotations.labels[~annotations.crowd], minlength=num_classes)
    per_class = {
        name: {key: _mean(array[k : k + 1]) for key, array in values.items()} | {"num_objects": int(class_counts[k])}
        for k, name in enumerate(annotations.classes)
    }
    return {key: _mean(array) for key, array in values.items()} | {"per_class": per_class}


def check_detections(annotations: Annotations, detections: DetectionArrays) -> None:
    """Raise DataError for scores or boxes that are not finite, ValueError for rows that belong to no image or class."""
    finite = np.isfinite(detections.scores) & np.isfinite(detections.boxes).all(axis=1)
    if not finite.all():
        problem = f"{np.count_nonzero(~finite)} of {len(finite)} have a score or box that is not a finite number"
        fix = "the model has diverged; take an earlier checkpoint or a lower learning rate"
        raise DataError(f"{annotations.file}: detections: {problem} - {fix}", code="not-finite")
    for name, end in (("indices", len(annotations)), ("labels", len(annotations.classes))):
        values = getattr(detections, name)
        if len(values) and not 0 <= values.min() <= values.max() < end:
            raise ValueError(f"{name} must lie in [0, {end}), got {values.min()}..{values.max()}")


class _Ranked(NamedTuple):
    """The best detections of each image and class, sorted by class, image and score."""

    boxes: Boxes
    labels: Int64[np.ndarray, "D"]
    ranks: Int64[np.ndarray, "D"]
    """Place among the detections of the same image and class, from 0."""
    places: Int64[np.ndarray, "D"]
    """How many different scores of the whole data set are higher."""


def _rank(detections: DetectionArrays, image_order: Int64[np.ndarray, "N"], max_dets: int) -> _Ranked:
    groups = detections.labels * len(image_order) + image_order[detections.indices]
    # Whole numbers sort several times as fast as scores, in pairs with groups too.
    places = np.unique(-detections.scores, return_inverse=True)[1]
    order = np.argsort(groups * len(places) + places, kind="stable")
    positions = np.arange(len(order))
    starts = np.diff(groups[order], prepend=-1) > 0
    ranks = positions - np.maximum.accumulate(np.where(starts, positions, 0))
    best = ranks < max_dets
    order = order[best]
    boxes = detections.boxes[order]
    return _Ranked(Boxes(boxes, groups[order], box_areas(boxes)), detections.labels[order], ranks[best], places[order])


def _in_ranges(areas: Float64[np.ndarray, "N"], ranges: Float64[np.ndarray, "R 2"]) -> Bool[np.ndarray, "N R"]:
    return (areas[:, None] >= ranges[:, 0]) & (areas[:, None] <= ranges[:, 1])


def _precision(
    matches: Matches,
    ranked: _Ranked,
    num_counted: Int64[np.ndarray, "K R"],
    area_ranges: Float64[np.ndarray, "R 2"],
) -> Float64[np.ndarray, "T P K R"]:
    """Interpolated precision at each recall, NaN where a class has no object in the area range.

    Sort the detections of a class by score. Precision after a detection is tp / (tp + fp + eps). Precision at recall x
    is the greatest precision from the first detection that reaches recall x to the end, and 0 if none reaches it. Only
    a true positive raises precision or recall, so tp and fp are needed at the true positives only. A false positive is
    a detection with an area within the range that took no object, so
    fp = (detections within the range so far) - (those of them that took an object).
    """
    num_thresholds, (num_classes, num_ranges) = len(THRESHOLDS), num_counted.shape
    labels, num_detections = ranked.labels, len(ranked.labels)
    in_range = _in_ranges(ranked.boxes.areas, area_ranges)
    # 1. Number the detections of each class by falling score. The sort is stable, so equal scores keep their order,
    # which is by image and rank. visible[n] counts those within each area range among the first n of all classes.
    order = np.argsort(labels * (ranked.places.max(initial=0) + 1) + ranked.places, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(num_detections)
    visible = np.zeros((num_detections + 1, num_ranges), dtype=np.int64)
    np.cumsum(in_range[order], axis=0, out=visible[1:])
    visible_before_class = visible[np.searchsorted(labels, np.arange(num_classes))]

    # 2. There is one precision-recall curve for each (range, threshold, class). Sort the matches by curve, and along a
    # curve by score. The matches of curve c are rows starts[c]:starts[c + 1].
    curves = matches.ranges * num_thresholds + matches.thresholds
    sort = np.argsort(curves * num_detections + place[matches.detections])
    rows, ranges = matches.detections[sort], matches.ranges[sort]
    curves = curves[sort] * num_classes + labels[rows]
    starts = np.searchsorted(curves, np.arange(num_ranges * num_thresholds * num_classes + 1))
    positive = ~matches.ignored[sort]
    positives = np.concatenate([[0], np.cumsum(positive)])
    matched = np.concatenate([[0], np.cumsum(in_range[rows, ranges])])

    # 3. Keep the true positives. Each count along a curve is a cumulative sum over all curves, minus its value at the
    # start of the curve.
    rows, ranges, curves, at = rows[positive], ranges[positive], curves[positive], np.flatnonzero(positive) + 1
    true = positives[at] - positives[starts[curves]]
    took_something = matched[at] - matched[starts[curves]]
    false = visible[place[rows] + 1, ranges] - visible_before_class[labels[rows], ranges] - took_something
    values = np.append(true / (false + true + np.spacing(1)), 0.0)

    # 4. The n-th true positive of a curve reaches recall n / num_counted. `first` is the row in `values` of the one
    # that reaches each recall. reduceat takes the maximum from one such row to the next; the running maximum from the
    # highest recall down then gives the maximum to the end of the curve.
    needed = _positives_needed(num_counted)[:, None]
    begins, ends = (
        positives[edges].reshape(num_ranges, num_thresholds, num_classes) for edges in (starts[:-1], starts[1:])
    )
    first = begins[..., None] + needed
    reached = first < ends[..., None]
    first = np.minimum(first, ends[..., None])
    stretch = np.maximum.reduceat(values, first.ravel()).reshape(first.shape)
    best = np.maximum.accumulate(np.where(reached, stretch, 0.0)[..., ::-1], axis=-1)[..., ::-1]
    best = np.where((num_counted.T > 0)[:, None, :, None], best, np.nan)
    return best.transpose(1, 3, 2, 0)


def _positives_needed(num_counted: Int64[np.ndarray, "K R"]) -> Int64[np.ndarray, "R K P"]:
    """How many true positives come before the one that reaches each recall, by the rounded quotient n / num_counted."""
    totals = np.maximum(num_counted.T, 1)[..., None]
    counts = np.maximum(np.floor(RECALLS * totals) - 1, 0)
    for _ in range(2):
        counts += counts / totals < RECALLS
    return np.maximum(counts - 1, 0).astype(np.int64)


def _recall(
    matches: Matches, ranked: _Ranked, num_counted: Int64[np.ndarray, "K R"], limits: Sequence[int]
) -> Float64[np.ndarray, "T K R L"]:
    """Fraction of objects found by so many best detections per image and class; NaN where there are none."""
    positive = ~matches.ignored
    rows, thresholds, ranges = matches.detections[positive], matches.thresholds[positive], matches.ranges[positive]
    shape = (len(THRESHOLDS), *num_counted.shape)
    cells = np.ravel_multi_index((thresholds, ranked.labels[rows], ranges), shape)
    size = int(np.prod(shape))
    hits = [np.bincount(cells[ranked.ranks[rows] < limit], minlength=size).reshape(shape) for limit in limits]
    return np.stack(hits, axis=-1) / np.where(num_counted > 0, num_counted, np.nan)[..., None]


def _values(
    precision: Float64[np.ndarray, "T P K R"], recall: Float64[np.ndarray, "T K R L"], scoring: Scoring
) -> dict[str, Float64[np.ndarray, "K"]]:
    """Every metric of every class, NaN where it is undefined."""
    half, three_quarters = np.flatnonzero(np.isin(THRESHOLDS, (0.5, 0.75)))
    arrays = [precision[..., 0], precision[half, ..., 0], precision[three_quarters, ..., 0]]
    arrays += [precision[..., area] for area in (1, 2, 3)]
    arrays += [recall[..., 0, limit] for limit in (0, 1, 2)] + [recall[..., area, 2] for area in (1, 2, 3)]
    means = [array.mean(axis=tuple(range(array.ndim - 1))) for array in arrays]
    return dict(zip(scoring.meanings(), means, strict=True))


def _mean(values: Float64[np.ndarray, "K"]) -> float | None:
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else None


def write_metrics(file: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics as JSON (None becomes null) so that `file` is never seen half written; parent folders are made.

    Raises ValueError for NaN or infinity, which JSON does not have.
    """
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    make_folder(file.parent)
    write_whole(file, text.encode())


def format_metrics(metrics: Mapping[str, Any], scoring: Scoring = COCO) -> str:
    """The twelve numbers of `coco_metrics`, 0 to 1, then a table with a row per class; undefined is shown as "-"."""
    lines = [f"{key:<6} {_shown(metrics[key]):>5}  {meaning}" for key, meaning in scoring.meanings().items()]
    columns = ("AP", "AP50", "AP75", "APs", "APm", "APl", f"AR{scoring.max_dets}")
    table: list[tuple[str, ...]] = [("class", "objects", *columns)]
    for name, values in metrics["per_class"].items():
        table.append((plain(name), str(values["num_objects"]), *(_shown(values[key]) for key in columns)))
    first, *others = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        lines.append("  ".join([name.ljust(first), *map(str.rjust, cells, others)]))
    lines.insert(len(lines) - len(table), "")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
