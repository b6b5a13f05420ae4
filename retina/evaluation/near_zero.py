"""Why a detector scores near zero: what can be seen of it, and the likeliest cause. Beside the road.

Each rule looks at one kind of evidence and stays silent unless it is plain, because a sound run scores near zero too,
for a while."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from retina.data.advice import resized_boxes
from retina.data.annotations import Annotations
from retina.evaluation.coco_matching import box_areas
from retina.evaluation.metrics import DetectionArrays

NEAR_ZERO = 0.02
"""AP below which it is asked why."""
_IOU = 0.5
_LEAST_OBJECTS = 10
"""Fewer tell nothing."""
_LEAST_SHARE = 0.3
"""Of the objects: so many must be found some other way before that way is named."""
_BEST = 3
"""Detections of each image that are looked at, in multiples of its objects: those of highest score."""
_FACTORS = (0.125, 0.2, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.75, 4 / 3, 1.5, 5 / 3, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0)
_LEAST_FIT = 0.3
"""IoU of an object with the anchor of the nearest shape at the same centre, in the median."""
_FARTHEST_MEAN, _WIDEST, _NARROWEST = 4.0, 8.0, 0.1
"""Of images after normalisation, which should have a mean near 0 and a spread near 1."""
_WORSE = 5.0
"""Classification loss over that of a head that gives every anchor its prior."""


class Finding(NamedTuple):
    cause: str
    """classes, box-scale, box-convention, normalisation, anchors or rate."""
    seen: str
    check: str
    """What shows whether it is so: a command, or what to look at."""


class Evidence(NamedTuple):
    train: Annotations
    val: Annotations
    detections: DetectionArrays
    """Of `val`."""
    anchors: Float64[np.ndarray, "A 2"]
    """Widths and heights in pixels of the images as the detector sees them."""
    sides: tuple[int, int]
    """Short and long side that images are resized to."""
    inputs: tuple[float, float]
    """Mean and standard deviation of some images after normalisation: of the channel where they are oddest."""
    history: Sequence[Mapping[str, Any]]
    """`train` records of metrics.jsonl so far."""


def likely_causes(evidence: Evidence) -> list[Finding]:
    """Likeliest first; empty where nothing is plain."""
    rules = (_normalisation, _anchors, _boxes_in_a_corner, _classes, _other_boxes, _rate)
    return [finding for rule in rules if (finding := rule(evidence))]


def describe(findings: Sequence[Finding], value: float, step: int) -> str:
    first, *others = findings
    also = "".join(f"; also {one.seen}" for one in others)
    return f"AP is {value:.3f} at step {step}: {first.seen} - likeliest cause: {first.check}{also}"


def _normalisation(evidence: Evidence) -> Finding | None:
    mean, spread = evidence.inputs
    if abs(mean) <= _FARTHEST_MEAN and _NARROWEST <= spread <= _WIDEST:
        return None
    seen = f"images have a mean of {mean:.3g} and a spread of {spread:.3g} after normalisation, instead of 0 and 1"
    check = "model.mean and model.std, which are in units of 0 to 255; leave them out, or look at them: "
    return Finding("normalisation", seen, f"{check}python tools/train.py ... --cfg job -p model")


def _anchors(evidence: Evidence) -> Finding | None:
    boxes = resized_boxes(evidence.train, *evidence.sides)
    if len(boxes) < _LEAST_OBJECTS:
        return None
    objects = boxes[:, 2:] - boxes[:, :2]
    shared = np.minimum(objects[:, None], evidence.anchors).prod(axis=2)
    union = objects.prod(axis=1)[:, None] + evidence.anchors.prod(axis=1) - shared
    fit = (shared / union).max(axis=1)
    if np.median(fit) >= _LEAST_FIT:
        return None
    nearest = evidence.anchors[(shared / union).argmax(axis=1)]
    factor = float(np.median(np.sqrt(nearest.prod(axis=1) / objects.prod(axis=1))))
    size = f"{factor:.1f}x as large as" if factor > 1 else f"{1 / factor:.1f}x smaller than"
    last = evidence.history[-1].get("diagnosis", {}) if evidence.history else {}
    positives = {key: value for key, value in last.items() if key.startswith("positives_")}
    levels = ", ".join(f"{key.removeprefix('positives_')} {value:.0f}" for key, value in positives.items())
    seen = f"half of the objects overlap no anchor by more than {np.median(fit):.2f}"
    seen += f" (positive anchors of the last step: {levels})" if levels else ""
    check = f"anchors {size} the objects: python tools/lab.py anchors data=... shows their fit; see model.anchor_sizes"
    return Finding("anchors", seen, check)


def _boxes_in_a_corner(evidence: Evidence) -> Finding | None:
    """Of images that were enlarged without their boxes, these begin at the upper left and end before the middle."""
    split = evidence.train
    edges = split.boxes / np.repeat(split.sizes[:, [1, 0, 1, 0]], np.diff(split.offsets), axis=0)
    edges = edges[~split.crowd]
    if len(edges) < 3 * _LEAST_OBJECTS:
        return None
    first, last = np.quantile(edges[:, :2], 0.02, axis=0), np.quantile(edges[:, 2:], 0.99, axis=0)
    if (first > 0.1).any() or (last > 0.8).any() or np.ptp(last) > 0.2:
        return None
    reach = float(last.mean())
    seen = f"the boxes of {split.file.name} lie in the upper left {reach:.0%} of the images' width and height"
    check = f"images were resized by {1 / reach:.2g} without their boxes: python tools/doctor.py data=... draws them"
    return Finding("box-scale", seen, check)


def _classes(evidence: Evidence) -> Finding | None:
    truth, rows = _best_rows(evidence)
    if len(evidence.val.classes) < 2 or len(truth.labels) < _LEAST_OBJECTS:
        return None
    pairs = _pairs(truth, evidence.detections.boxes[rows], evidence.detections.indices[rows])
    overlaps, objects, detected = pairs
    near = overlaps >= _IOU
    scores = evidence.detections.scores[rows]
    best: dict[int, int] = {}
    for place in np.flatnonzero(near)[np.argsort(scores[detected[near]], kind="stable")]:
        best[int(objects[place])] = int(detected[place])  # the last is the one of highest score
    if len(best) < max(_LEAST_OBJECTS, _LEAST_SHARE * len(truth.labels)):
        return None
    taken = Counter(
        (int(truth.labels[one]), int(evidence.detections.labels[rows][other])) for one, other in best.items()
    )
    usual = {a: Counter({b: n for (c, b), n in taken.items() if c == a}).most_common(1)[0] for a, _ in taken}
    right = sum(n for (a, b), n in taken.items() if a == b)
    swapped = {a: b for a, (b, _) in usual.items() if a != b}
    if right > 0.2 * len(best) or sum(n for _, n in usual.values()) < 0.6 * len(best) or not swapped:
        return None
    names = evidence.val.classes
    words = ", ".join(f"{names[a]} as {names[b]}" for a, b in list(swapped.items())[:6])
    seen = f"{len(best)} of {len(truth.labels)} objects are found under another class: {words}"
    files = f"{evidence.train.file.name} and {evidence.val.file.name}"
    check = f"`categories` of {files} have other names for the same ids: python tools/doctor.py data=... draws them"
    return Finding("classes", seen, check)


def _other_boxes(evidence: Evidence) -> Finding | None:
    """Detections that fit the objects once all of them are changed in the same way."""
    truth, rows = _best_rows(evidence)
    if len(truth.labels) < _LEAST_OBJECTS:
        return None
    boxes, images = evidence.detections.boxes[rows], evidence.detections.indices[rows]
    usual = _share_found(truth, boxes, images)
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    shares = {factor: _share_found(truth, boxes * factor, images) for factor in _FACTORS}
    factor = max(shares, key=lambda one: shares[one])
    best, as_corners = shares[factor], _share_found(truth, corners, images)
    if max(best, as_corners) < max(_LEAST_SHARE, 3 * usual):
        return None
    files = f"{evidence.train.file.name} and {evidence.val.file.name}"
    if as_corners > best:
        seen = f"{as_corners:.0%} of the objects are found where boxes are read as [x1, y1, x2, y2]"
        check = f"boxes of {files} are of different conventions: python tools/doctor.py data=... draws them"
        return Finding("box-convention", seen, check)
    seen = f"{best:.0%} of the objects are found by boxes that are {1 / factor:.3g}x as far from the upper left corner"
    check = f"images or boxes of {files} were resized without the other, or turned: python tools/doctor.py data=..."
    return Finding("box-scale", seen, f"{check} draws them")


def _rate(evidence: Evidence) -> Finding | None:
    over_prior = [one.get("diagnosis", {}).get("loss_over_prior", 0.0) for one in evidence.history]
    diverged = any(one.get("loss_classification", 0.0) is None for one in evidence.history)
    if not diverged and max(over_prior, default=0.0) <= _WORSE:
        return None
    rate = max(one.get("lr", 0.0) for one in evidence.history)
    seen = f"the classification loss has been {max(over_prior):.2g} times that of a head that knows nothing"
    seen = "the classification loss has not been finite" if diverged else seen
    check = f"the rate {rate:.3g}: again with name=NEW optimizer.lr={rate / 100:.1g} for a few steps"
    return Finding("rate", seen, check)


class _Truth(NamedTuple):
    boxes: Float64[np.ndarray, "G 4"]
    labels: Int64[np.ndarray, "G"]
    images: Int64[np.ndarray, "G"]


def _best_rows(evidence: Evidence) -> tuple[_Truth, Int64[np.ndarray, "d"]]:
    """The objects, and the detections of highest score, _BEST for each object of their image."""
    val, detections = evidence.val, evidence.detections
    counts = np.diff(val.offsets)
    real = ~val.crowd
    truth = _Truth(val.boxes[real], val.labels[real], np.repeat(np.arange(len(val)), counts)[real])
    order = np.lexsort((-detections.scores, detections.indices))
    images = detections.indices[order]
    rank = np.arange(len(order)) - np.searchsorted(images, images)
    return truth, order[rank < _BEST * counts[images]]


def _pairs(
    truth: _Truth, boxes: Float[np.ndarray, "d 4"], images: Int64[np.ndarray, "d"]
) -> tuple[Float64[np.ndarray, "p"], Int64[np.ndarray, "p"], Int64[np.ndarray, "p"]]:
    """IoU, object and detection of every pair within an image; `images` rise."""
    first, last = np.searchsorted(images, truth.images), np.searchsorted(images, truth.images, side="right")
    counts = last - first
    objects = np.repeat(np.arange(len(counts)), counts)
    detected = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    one, other = truth.boxes[objects], boxes[detected].astype(np.float64)
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    shared = sides.clip(min=0).prod(axis=1)
    union = box_areas(one) + (other[:, 2:] - other[:, :2]).clip(min=0).prod(axis=1) - shared
    return shared / np.maximum(union, 1e-9), objects, detected


def _share_found(truth: _Truth, boxes: Float[np.ndarray, "d 4"], images: Int64[np.ndarray, "d"]) -> float:
    overlaps, objects, _ = _pairs(truth, boxes, images)
    found: Bool[np.ndarray, "G"] = np.zeros(len(truth.labels), dtype=bool)
    found[objects[overlaps >= _IOU]] = True
    return float(found.mean())
