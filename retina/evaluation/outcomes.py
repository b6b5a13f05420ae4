"""What became of every detection and every object, by COCO's rules: the arrays that curves, operating points, confusion
and error types are counted from. Beside the road."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.data.annotations import Annotations
from retina.evaluation.coco_matching import THRESHOLDS, Boxes, box_areas, match
from retina.evaluation.metrics import DetectionArrays, check_detections

NO_OBJECT = -1


class Outcomes(NamedTuple):
    """Detections by class and falling score, with the objects that they took; the best `max_dets` of each image and
    class. Whether a detection takes an object does not depend on detections of lower score, so what holds for all holds
    for those above any threshold."""

    annotations: Annotations
    rows: Int64[np.ndarray, "D"]
    """Of the `DetectionArrays` they are from."""
    images: Int64[np.ndarray, "D"]
    labels: Int64[np.ndarray, "D"]
    scores: Float64[np.ndarray, "D"]
    boxes: Float64[np.ndarray, "D 4"]
    objects: Int64[np.ndarray, "D T"]
    """The object (row of the annotations) that each took at each IoU threshold, or NO_OBJECT."""
    ranks: Int64[np.ndarray, "D"]
    """Place by score among those of the same image and class that took no crowd region at IoU 0.5, from 0."""

    def hits(self, threshold: int = 0) -> Bool[np.ndarray, "D"]:
        """Those that took an object that counts, at the IoU threshold of that number."""
        taken = self.objects[:, threshold]
        return (taken != NO_OBJECT) & ~self._in_crowd(taken)

    def ignored(self, threshold: int = 0) -> Bool[np.ndarray, "D"]:
        """Those that took a crowd region: neither right nor wrong."""
        taken = self.objects[:, threshold]
        return (taken != NO_OBJECT) & self._in_crowd(taken)

    def _in_crowd(self, taken: Int64[np.ndarray, "D"]) -> Bool[np.ndarray, "D"]:
        return self.annotations.crowd[taken] if len(self.annotations.crowd) else np.zeros(len(taken), bool)

    def of_class(self, label: int) -> slice:
        first, last = np.searchsorted(self.labels, [label, label + 1])
        return slice(int(first), int(last))

    def above(self, thresholds: Float64[np.ndarray, "K"]) -> Bool[np.ndarray, "D"]:
        """Those with a score of at least their class's threshold."""
        return self.scores >= thresholds[self.labels]

    def object_images(self) -> Int64[np.ndarray, "G"]:
        """The image of each object of the annotations."""
        return np.repeat(np.arange(len(self.annotations)), np.diff(self.annotations.offsets))


def find_outcomes(annotations: Annotations, detections: DetectionArrays, *, max_dets: int = 100) -> Outcomes:
    """Raises DataError if scores or boxes are not finite, ValueError if indices or labels are out of range."""
    check_detections(annotations, detections)
    num_images = len(annotations)
    image_order = np.argsort(np.argsort(annotations.image_ids))
    groups = detections.labels * num_images + image_order[detections.indices]
    order = np.lexsort((-detections.scores, groups))  # stable: equal scores keep their order
    ranks = _ranks(groups[order])
    order, ranks = order[ranks < max_dets], ranks[ranks < max_dets]
    boxes = detections.boxes[order]
    predicted = Boxes(boxes, groups[order], box_areas(boxes))

    object_images = np.repeat(image_order, np.diff(annotations.offsets))
    object_groups = annotations.labels * num_images + object_images
    by_group = np.argsort(object_groups, kind="stable")
    truth = annotations.boxes[by_group]
    crowd = annotations.crowd[by_group]
    objects = Boxes(truth, object_groups[by_group], box_areas(truth))
    matches = match(predicted, ranks, objects, crowd, ~crowd[:, None])
    taken = np.full((len(order), len(THRESHOLDS)), NO_OBJECT, dtype=np.int64)
    taken[matches.detections, matches.thresholds] = by_group[matches.objects]

    labels, scores = detections.labels[order], detections.scores[order]
    best_first = np.lexsort((-scores, labels))
    rows = order[best_first]
    unranked = Outcomes(
        annotations,
        rows,
        detections.indices[rows],
        labels[best_first],
        scores[best_first],
        detections.boxes[rows],
        taken[best_first],
        np.zeros(len(rows), dtype=np.int64),
    )
    return unranked._replace(ranks=_ranks_of_counted(unranked))


def _ranks(groups: Int64[np.ndarray, "D"]) -> Int64[np.ndarray, "D"]:
    """Position within runs of equal groups."""
    positions = np.arange(len(groups))
    starts = np.diff(groups, prepend=-1) != 0
    return positions - np.maximum.accumulate(np.where(starts, positions, 0)) if len(groups) else positions


def _ranks_of_counted(outcomes: Outcomes) -> Int64[np.ndarray, "D"]:
    groups = (outcomes.labels * len(outcomes.annotations) + outcomes.images) * 2 + outcomes.ignored()
    order = np.argsort(groups, kind="stable")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = _ranks(groups[order])
    return ranks
