"""Classification losses of a detector: sums over all anchors that are positive or negative."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from retina.ops.focal import check_focal, class_focal_loss
from retina.types import Assignment, Predictions


@runtime_checkable
class ClassLoss(Protocol):
    """What `DetectionLoss` needs of a classification loss."""

    def __call__(
        self, predictions: Predictions, labels: Int64[Tensor, "B A"], assigned: Assignment
    ) -> Float[Tensor, ""]:
        """The sum over anchors and classes; anchors that are neither positive nor negative count for nothing. `labels`
        are those of the objects that the anchors belong to, and say something at positive anchors only."""
        ...


@dataclass(frozen=True, kw_only=True)
class Focal:
    """The focal loss (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5).

    Args:
        alpha: weight of positives, 1 - alpha being that of negatives; None for weight 1 on both.
        gamma: focusing exponent; 0 is the (balanced) cross entropy.

    Raises ValueError for values out of range."""

    alpha: float | None = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_focal(self.alpha, self.gamma)

    def __call__(
        self, predictions: Predictions, labels: Int64[Tensor, "B A"], assigned: Assignment
    ) -> Float[Tensor, ""]:
        # Level by level: one tensor of all logits would be a second copy of the largest tensor of the step.
        counts = [len(anchors) for anchors in predictions.anchors]
        parts = (part.split(counts, dim=1) for part in (labels, assigned.positive, assigned.negative))
        levels = zip(predictions.logits, *parts, strict=True)
        return torch.stack([class_focal_loss(*level, alpha=self.alpha, gamma=self.gamma) for level in levels]).sum()
