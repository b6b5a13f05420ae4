"""Labels that are likely wrong, given what a detector finds that was not trained on them. Beside the road.

Every suspect has a score from 0 to 1, so that all kinds can be ranked together. A detector's own scores are not
comparable between classes or detectors, so they are read as the share of detections of about that score that agree with
a label: `confidence`."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from retina.data.annotations import Annotations
from retina.evaluation.coco_matching import box_areas
from retina.evaluation.metrics import DetectionArrays

KINDS = ("unlabelled", "missing", "class", "place", "duplicate", "spurious")
_SAME, _NEAR, _APART = 0.5, 0.1, 0.3
"""IoU from which two boxes are of one object, down to which one is badly placed, and below which it is another's."""
_TWICE = 0.7
"""IoU of two labels of one class that are likely of one object."""
_LEAST_SCORE = 0.05
_SMOOTHING = 2.0
"""Detections that agree with no label, added to every count: few detections prove little."""


class Suspect(NamedTuple):
    kind: str
    """One of KINDS."""
    score: float
    image: int
    """Row of the annotations."""
    box: list[float]
    """xyxy: of the label, or, where one is missing, of the detection."""
    label: int
    """Class as labelled; of a missing label, as detected."""
    object: int | None
    """Row of the label among the annotations' objects; None where one is missing."""
    reason: str
    better: list[float] | None = None
    """The box that the detector would give."""


def find_suspects(annotations: Annotations, detections: DetectionArrays) -> list[Suspect]:
    """Most suspicious first; equal ones in the order of the images.

    `detections` must be of detectors that were not trained on the labels of the image (`retina audit` sees to that),
    since a detector learns wrong labels too."""
    kept = detections.scores >= _LEAST_SCORE
    detections = DetectionArrays(*(values[kept] for values in detections))
    order = np.argsort(detections.indices, kind="stable")
    detections = DetectionArrays(*(values[order] for values in detections))
    bounds = np.searchsorted(detections.indices, np.arange(len(annotations) + 1))
    views = [_view(annotations, detections, image, bounds) for image in range(len(annotations))]
    confidence = _confidence(annotations, detections, views)
    recall = _recall(annotations, views)
    suspects: list[Suspect] = []
    for image, view in enumerate(views):
        suspects += _of_image(annotations, image, view, confidence[bounds[image] : bounds[image + 1]], recall)
    return sorted(suspects, key=lambda one: -one.score)


class _View(NamedTuple):
    """One image."""

    rows: Int64[np.ndarray, "m"]
    """Of its labels, without crowd regions."""
    boxes: Float64[np.ndarray, "m 4"]
    labels: Int64[np.ndarray, "m"]
    detected: Float64[np.ndarray, "d 4"]
    classes: Int64[np.ndarray, "d"]
    overlaps: Float64[np.ndarray, "d m"]
    in_crowd: Bool[np.ndarray, "d"]


def _view(annotations: Annotations, detections: DetectionArrays, image: int, bounds: Int64[np.ndarray, "N1"]) -> _View:
    objects = np.arange(annotations.offsets[image], annotations.offsets[image + 1])
    crowd = annotations.crowd[objects]
    rows, regions = objects[~crowd], objects[crowd]
    here = slice(bounds[image], bounds[image + 1])
    detected = detections.boxes[here].astype(np.float64)
    covered = _shared(detected, annotations.boxes[regions]) / np.maximum(box_areas(detected), 1e-9)[:, None]
    return _View(
        rows=rows,
        boxes=annotations.boxes[rows],
        labels=annotations.labels[rows],
        detected=detected,
        classes=detections.labels[here],
        overlaps=_iou(detected, annotations.boxes[rows]),
        in_crowd=(covered >= _SAME).any(axis=1),
    )


def _shared(one: Float64[np.ndarray, "a 4"], other: Float64[np.ndarray, "b 4"]) -> Float64[np.ndarray, "a b"]:
    low, high = np.maximum(one[:, None, :2], other[:, :2]), np.minimum(one[:, None, 2:], other[:, 2:])
    return (high - low).clip(min=0).prod(axis=2)


def _iou(one: Float64[np.ndarray, "a 4"], other: Float64[np.ndarray, "b 4"]) -> Float64[np.ndarray, "a b"]:
    shared = _shared(one, other)
    return shared / np.maximum(box_areas(one)[:, None] + box_areas(other) - shared, 1e-9)


def _confidence(annotations: Annotations, detections: DetectionArrays, views: list[_View]) -> Float64[np.ndarray, "D"]:
    """Of each detection: the share of the detections of its class and about its score that agree with a label, as the
    rising function of the score that fits best."""
    agreeing = np.concatenate(
        [((view.overlaps >= _SAME) & (view.classes[:, None] == view.labels)).any(axis=1) for view in views]
    )
    confidence = np.zeros(len(agreeing))
    for label in range(len(annotations.classes)):
        rows = np.flatnonzero(detections.labels == label)
        rows = rows[np.argsort(detections.scores[rows], kind="stable")]
        confidence[rows] = _rising(agreeing[rows].astype(np.float64))
    return confidence


def _rising(values: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """The rising sequence with the least squared differences: neighbours that fall are pooled (isotonic regression)."""
    sums: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        sums.append(value)
        counts.append(1)
        while len(sums) > 1 and sums[-2] * counts[-1] >= sums[-1] * counts[-2]:
            last, size = sums.pop(), counts.pop()
            sums[-1] += last
            counts[-1] += size
    means = np.array(sums) / (np.array(counts) + _SMOOTHING)
    return np.repeat(np.maximum.accumulate(means) if len(means) else means, counts)


def _recall(annotations: Annotations, views: list[_View]) -> Float64[np.ndarray, "K"]:
    """Of each class: the share of labels with any detection on them. Where that is low, an object without one is
    nothing odd."""
    touched = np.zeros(len(annotations.labels), dtype=bool)
    for view in views:
        touched[view.rows] = (view.overlaps >= _APART).any(axis=0)
    counts = annotations.class_counts()
    real = ~annotations.crowd
    found = np.bincount(annotations.labels[real], weights=touched[real], minlength=len(counts))
    return found / (counts + _SMOOTHING)


def _of_image(
    annotations: Annotations,
    image: int,
    view: _View,
    confidence: Float[np.ndarray, "d"],
    recall: Float64[np.ndarray, "K"],
) -> list[Suspect]:
    names = annotations.classes
    suspects = _missing(names, image, view, confidence)
    best = np.argsort(-confidence, kind="stable")
    for place, row in enumerate(view.rows.tolist()):
        label, box, overlaps = int(view.labels[place]), view.boxes[place].tolist(), view.overlaps[:, place]
        about = {"image": image, "box": box, "label": label, "object": row}
        own, near = view.classes == label, overlaps >= _SAME
        agreed = float(confidence[near & own].max(initial=0))
        other = next((k for k in best.tolist() if near[k] and not own[k]), None)
        if other is not None and confidence[other] > agreed:
            reason = f"labelled {names[label]}, looks like {names[view.classes[other]]}"
            better = view.detected[other].tolist()
            score = float(confidence[other] * (1 - agreed))
            suspects.append(Suspect("class", score, reason=reason, better=better, **about))
            continue
        # a detection that has no better label of its own
        nearest = view.overlaps.argmax(axis=1) == place
        shifted = next((k for k in best.tolist() if own[k] and nearest[k] and _NEAR <= overlaps[k] < _SAME), None)
        if agreed < 0.5 and shifted is not None and confidence[shifted] > agreed:
            reason = f"the box overlaps that of the detection by {overlaps[shifted]:.2f} only"
            better = view.detected[shifted].tolist()
            score = float(confidence[shifted] * (1 - agreed))
            suspects.append(Suspect("place", score, reason=reason, better=better, **about))
            continue
        touched = float(confidence[overlaps >= _APART].max(initial=0))
        doubt = float(recall[label] * (1 - touched))
        reason = f"nothing is detected there, as on {recall[label]:.0%} of the labels of {names[label]} something is"
        if touched < 0.1:
            suspects.append(Suspect("spurious", doubt * recall[label], reason=reason, **about))
    return suspects + _duplicates(names, image, view)


def _missing(names: tuple[str, ...], image: int, view: _View, confidence: Float[np.ndarray, "d"]) -> list[Suspect]:
    """Detections where no label is; of an image without any label they make one suspect together."""
    apart = ~view.in_crowd & (view.overlaps.max(axis=1, initial=0) < _APART)
    if len(view.rows):  # a shifted label has its detection
        claimed = (view.overlaps >= _NEAR) & (view.classes[:, None] == view.labels)
        apart &= ~claimed.any(axis=1)
    chosen: list[int] = []
    for k in np.argsort(-confidence, kind="stable").tolist():
        if apart[k] and (_iou(view.detected[k : k + 1], view.detected[chosen]) < _SAME).all():
            chosen.append(k)
    suspects = [
        Suspect(
            kind="missing",
            score=float(confidence[k]),
            image=image,
            box=view.detected[k].tolist(),
            label=int(view.classes[k]),
            object=None,
            reason=f"{names[view.classes[k]]} is detected where no label is",
            better=view.detected[k].tolist(),
        )
        for k in chosen
    ]
    if len(view.rows) or not suspects:
        return suspects
    sure = [one for one in suspects if one.score >= _SAME]
    reason = f"no label, but {len(sure) or len(suspects)} detections"
    none = 1 - float(np.prod([1 - one.score for one in suspects]))
    return [suspects[0]._replace(kind="unlabelled", score=max(none, suspects[0].score), reason=reason)]


def _duplicates(names: tuple[str, ...], image: int, view: _View) -> list[Suspect]:
    overlaps = _iou(view.boxes, view.boxes)
    suspects = []
    for one, other in zip(*np.nonzero(np.triu(overlaps, 1) >= _TWICE), strict=True):
        if view.labels[one] == view.labels[other]:
            label, row = int(view.labels[other]), int(view.rows[other])
            share = float(overlaps[one, other])
            reason = f"two labels of {names[label]} overlap by {share:.2f}"
            suspects.append(Suspect("duplicate", share, image, view.boxes[other].tolist(), label, row, reason))
    return suspects
