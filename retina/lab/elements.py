"""The elements of a detector's classification loss, collected over the images of a data set."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.lab.histogram import Histograms, histograms
from retina.losses.detection import pad_if_empty
from retina.ops.assigners import Assigner
from retina.types import Assignment, Predictions, Targets


def assign(assigner: Assigner, predictions: Predictions, targets: Targets) -> tuple[Int64[Tensor, "B A"], Assignment]:
    """The label of every anchor's object, and the assignment."""
    targets = pad_if_empty(targets)
    assigned = assigner(predictions, targets)
    return targets.labels.gather(1, assigned.matched), assigned


class Elements:
    """Counts what a classification loss would be a sum of.

    An element is one class of one anchor that is positive or negative. It is positive for the class of the anchor's own
    object, and negative for every other class and at negative anchors. The targets are hard, whatever the loss that
    the detector was trained with."""

    def __init__(self, num_classes: int, num_levels: int) -> None:
        self.num_classes = num_classes
        self.positives = {"class": Histograms(num_classes), "level": Histograms(num_levels)}
        self.negatives = {"class": Histograms(num_classes), "level": Histograms(num_levels)}
        self.positive_anchors = 0
        self.anchors = 0
        """That are positive or negative."""

    def add(self, predictions: Predictions, labels: Int64[Tensor, "B A"], assigned: Assignment) -> None:
        """A batch; `labels` say something at positive anchors only."""
        counts = [len(anchors) for anchors in predictions.anchors]
        parts = (part.split(counts, dim=1) for part in (labels, assigned.positive, assigned.negative))
        for level, (logits, *of_level) in enumerate(zip(predictions.logits, *parts, strict=True)):
            for image in zip(logits, *of_level, strict=True):  # one at a time: each makes two float64 copies
                self._add(level, *(tensor.detach().cpu() for tensor in image))

    def _add(
        self,
        level: int,
        logits: Float[Tensor, "A_l K"],
        labels: Int64[Tensor, "A_l"],
        positive: Bool[Tensor, "A_l"],
        negative: Bool[Tensor, "A_l"],
    ) -> None:
        classes = torch.arange(self.num_classes).expand(logits.shape)
        yes = positive[:, None] & (labels[:, None] == classes)
        no = (positive | negative)[:, None] & ~yes
        logits = logits.float()
        for groups, elements, against in ((self.positives, yes, -logits[yes]), (self.negatives, no, logits[no])):
            found = histograms(against, classes[elements], self.num_classes)
            groups["class"].merge(found)
            groups["level"].add(level, found)
        self.positive_anchors += int(positive.sum())
        self.anchors += int((positive | negative).sum())
