"""The training criterion: match anchors with objects, then focal loss on classes and a box loss on the positives.

Everything is batched over images, and no shape or branch depends on the data, so a GPU never waits for Python.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.ops.boxes import box_area, generalized_iou, intersection_over_union, pairwise_intersection
from retina.ops.coding import decode, encode
from retina.ops.focal import check_focal, class_focal_loss
from retina.ops.matching import check_thresholds, match
from retina.types import Losses, Predictions, Targets

BoxLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(deltas [... A 4], anchors [A 4], boxes [... A 4]) -> [... A]: predicted offsets against the objects' boxes."""


def smooth_l1(
    deltas: Float[Tensor, "*batch A 4"],
    anchors: Float[Tensor, "A 4"],
    boxes: Float[Tensor, "*batch A 4"],
    *,
    beta: float = 0.0,
) -> Float[Tensor, "*batch A"]:
    """Smooth L1 between predicted and encoded deltas, summed over the 4 coordinates.

    Per coordinate with difference d: d^2 / (2 beta) if |d| < beta, else |d| - beta / 2; beta 0 is plain L1, as
    torchvision and detectron2 train RetinaNet. Choose beta with `functools.partial(smooth_l1, beta=0.1)`.
    Source: Girshick, Fast R-CNN, ICCV 2015, equations 2 and 3.
    """
    return F.smooth_l1_loss(deltas, encode(boxes, anchors), beta=beta, reduction="none").sum(dim=-1)


def giou(
    deltas: Float[Tensor, "*batch A 4"], anchors: Float[Tensor, "A 4"], boxes: Float[Tensor, "*batch A 4"]
) -> Float[Tensor, "*batch A"]:
    """1 - generalized IoU of the decoded box with the object's box, in [0, 2]."""
    return 1 - generalized_iou(decode(deltas, anchors), boxes)


class _Assignment(NamedTuple):
    """What every anchor of every image should predict. Boxes and labels are meaningful where positive."""

    boxes: Float[Tensor, "B A 4"]
    labels: Int64[Tensor, "B A"]
    positive: Bool[Tensor, "B A"]
    negative: Bool[Tensor, "B A"]


@dataclass(frozen=True, kw_only=True)
class DetectionLoss:
    """RetinaNet's criterion. Returns sums: dividing by the positives of the whole optimizer step is the caller's part.

    Anchors of all levels are matched together per image (see `retina.ops.matching.match`), since an object's best
    anchor is its best over all levels. An anchor that is not positive for an object, and has at least `positive_iou` of
    its own area inside one crowd region, is ignored: nobody knows what is there (COCO scores crowds by the same ratio).

    Without objects, in an image or the whole batch (M = 0 too), the losses and gradients are finite and the box loss is
    0. Computed in float32 for narrower predictions.

    Args:
        alpha: weight of positives in the focal loss, 1 - alpha being that of negatives; None for weight 1 on both.
        gamma: focusing exponent of the focal loss.
        box_loss: `smooth_l1`, `giou` or any callable like them.
        box_weight: factor of the box loss.
        positive_iou, negative_iou, low_quality: the matching rule.

    Raises ValueError for hyper-parameters out of range.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, sections 3 and 4.
    """

    alpha: float | None = 0.25
    gamma: float = 2.0
    box_loss: BoxLoss = smooth_l1
    box_weight: float = 1.0
    positive_iou: float = 0.5
    negative_iou: float = 0.4
    low_quality: bool = True

    def __post_init__(self) -> None:
        check_focal(self.alpha, self.gamma)
        check_thresholds(self.positive_iou, self.negative_iou)
        if not callable(self.box_loss):
            raise ValueError(f"box_loss must be a callable (deltas, anchors, boxes) -> loss, got {self.box_loss!r}")
        if not 0 <= self.box_weight < float("inf"):
            raise ValueError(f"box_weight must be finite and at least 0, got {self.box_weight}")

    def __call__(self, predictions: Predictions, targets: Targets) -> Losses:
        counts = [len(anchors) for anchors in predictions.anchors]
        assignment = self._assign(torch.cat(predictions.anchors), targets)
        # Level by level: one tensor of all logits would be a second copy of the largest tensor of the step.
        levels = zip(*predictions, *(part.split(counts, dim=1) for part in assignment), strict=True)
        classification, box = [], []
        for logits, deltas, anchors, boxes, labels, positive, negative in levels:
            classification.append(
                class_focal_loss(logits, labels, positive, negative, alpha=self.alpha, gamma=self.gamma)
            )
            # Masked before and after: a wild delta of an anchor that does not count must not put NaN into the gradient.
            deltas = torch.where(positive[..., None], deltas, 0)
            loss = self.box_loss(deltas.to(torch.promote_types(deltas.dtype, torch.float32)), anchors, boxes)
            box.append(torch.where(positive, loss, 0).sum())
        return Losses(
            classification=torch.stack(classification).sum(),
            box=self.box_weight * torch.stack(box).sum(),
            num_positives=assignment.positive.sum(dtype=torch.float32),
        )

    @torch.no_grad()
    def _assign(self, anchors: Float[Tensor, "A 4"], targets: Targets) -> _Assignment:
        if targets.boxes.shape[1] == 0:
            targets = _with_one_padding(targets)
        area = box_area(anchors)
        # Objects first: [B M A] has the long axis innermost, and is seen as [B A M] by matching.
        intersection = pairwise_intersection(targets.boxes, anchors)
        iou = intersection_over_union(intersection, box_area(targets.boxes), area)
        in_crowd = intersection.mul_(targets.crowd[..., None]).amax(dim=1) >= self.positive_iou * area
        del intersection
        index, positive, negative = match(
            iou.mT,
            targets.valid,
            positive_iou=self.positive_iou,
            negative_iou=self.negative_iou,
            low_quality=self.low_quality,
        )
        return _Assignment(
            boxes=targets.boxes.gather(1, index[..., None].expand(-1, -1, 4)),
            labels=targets.labels.gather(1, index),
            positive=positive,
            negative=negative & ~in_crowd,
        )


def _with_one_padding(targets: Targets) -> Targets:
    """A batch without any object, as one whose only object is padding: nothing after this needs to know."""
    boxes, labels, valid, crowd = targets
    return Targets(F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1)), F.pad(valid, (0, 1)), F.pad(crowd, (0, 1)))
