"""The training criterion: match anchors with objects, then focal loss on classes and a box loss on the positives.

Everything is batched over images, and no shape or branch depends on the data, so a GPU never waits for Python.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.ops.boxes import generalized_iou
from retina.ops.coding import decode, encode
from retina.ops.focal import check_focal, class_focal_loss
from retina.ops.matching import check_thresholds, match_boxes
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


@dataclass(frozen=True, kw_only=True)
class DetectionLoss:
    """RetinaNet's criterion. Returns sums: dividing by the positives of the whole optimizer step is the caller's part.

    Anchors of all levels are matched together per image (see `retina.ops.matching.match_boxes`), since an object's best
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
        if targets.boxes.shape[1] == 0:
            targets = _with_one_padding(targets)
        index, positive, negative = match_boxes(
            predictions.anchors,
            targets.boxes,
            targets.valid,
            targets.crowd,
            positive_iou=self.positive_iou,
            negative_iou=self.negative_iou,
            low_quality=self.low_quality,
        )
        # Level by level: one tensor of all logits would be a second copy of the largest tensor of the step.
        counts = [len(anchors) for anchors in predictions.anchors]
        labels = targets.labels.gather(1, index)
        levels = zip(
            predictions.logits, *(part.split(counts, dim=1) for part in (labels, positive, negative)), strict=True
        )
        classification = [class_focal_loss(*level, alpha=self.alpha, gamma=self.gamma) for level in levels]

        deltas, anchors = torch.cat(predictions.deltas, dim=1), torch.cat(list(predictions.anchors))
        return Losses(
            classification=torch.stack(classification).sum(),
            box=self.box_weight * self._box(deltas, anchors, targets.boxes, index, positive),
            num_positives=positive.sum(dtype=torch.float32),
        )

    def _box(
        self,
        deltas: Float[Tensor, "B A 4"],
        anchors: Float[Tensor, "A 4"],
        boxes: Float[Tensor, "B M 4"],
        index: Int64[Tensor, "B A"],
        positive: Bool[Tensor, "B A"],
    ) -> Float[Tensor, ""]:
        """Sum of the box loss over the positive anchors."""
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        if deltas.device.type == "cpu" and not torch.compiler.is_compiling():
            # Only the few that count. By way of numpy, since elsewhere their number would have to be waited for.
            image, anchor = (torch.from_numpy(indices) for indices in positive.numpy().nonzero())
            chosen = boxes[image, index[image, anchor]]
            return self.box_loss(deltas[image, anchor].to(dtype), anchors[anchor], chosen).sum()
        # Masked before and after: a wild delta of an anchor that does not count must not put NaN into the gradient.
        deltas = torch.where(positive[..., None], deltas, 0).to(dtype)
        chosen = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return torch.where(positive, self.box_loss(deltas, anchors, chosen), 0).sum()


def _with_one_padding(targets: Targets) -> Targets:
    """A batch without any object, as one whose only object is padding: nothing after this needs to know."""
    boxes, labels, valid, crowd = targets
    return Targets(F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1)), F.pad(valid, (0, 1)), F.pad(crowd, (0, 1)))
