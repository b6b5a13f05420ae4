"""Box losses of the positive anchors: any callable like these can take their place.

The first two compare offsets from the anchor. The others decode the box and compare its overlap with the object's, and
so weigh large and small objects alike. All are differentiable, finite with their gradients also for boxes without area.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from retina.losses.common import check_range
from retina.ops.boxes import SMALLEST_AREA, box_sides, decode, encode, paired_iou, paired_iou_and_union

Boxes = Float[Tensor, "*batch A 4"]
AnchorBoxes = Float[Tensor, "A 4"]
AnchorLosses = Float[Tensor, "*batch A"]
BoxLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(deltas [... A 4], anchors [A 4], boxes [... A 4]) -> [... A]: predicted offsets against the objects' boxes."""
_SMALLEST_SIDE = 1e-3  # px, for angles whose gradient is finite


def smooth_l1(deltas: Boxes, anchors: AnchorBoxes, boxes: Boxes, *, beta: float = 0.0) -> AnchorLosses:
    """Smooth L1 between predicted and encoded deltas, summed over the 4 coordinates.

    Per coordinate with difference d: d^2 / (2 beta) if |d| < beta, else |d| - beta / 2; beta 0 is plain L1, as
    torchvision and detectron2 train RetinaNet. Choose beta with `functools.partial(smooth_l1, beta=0.1)`.
    Raises ValueError for a negative or infinite beta.
    Source: Girshick, Fast R-CNN, ICCV 2015, equations 2 and 3.
    """
    check_range("beta", beta)
    return F.smooth_l1_loss(deltas, encode(boxes, anchors), beta=beta, reduction="none").sum(dim=-1)


def l1(deltas: Boxes, anchors: AnchorBoxes, boxes: Boxes) -> AnchorLosses:
    """Absolute difference between predicted and encoded deltas, summed over the 4 coordinates: smooth L1 of beta 0."""
    return smooth_l1(deltas, anchors, boxes)


def iou(deltas: Boxes, anchors: AnchorBoxes, boxes: Boxes) -> AnchorLosses:
    """1 - IoU of the decoded box with the object's box, in [0, 1]; no gradient where they do not overlap."""
    return 1 - paired_iou(decode(deltas, anchors), boxes)


def giou(deltas: Boxes, anchors: AnchorBoxes, boxes: Boxes) -> AnchorLosses:
    """1 - generalized IoU of the decoded box with the object's box, in [0, 2]."""
    return 1 - generalized_iou(decode(deltas, anchors), boxes)


def diou(deltas: Boxes, anchors: AnchorBoxes, boxes: Boxes) -> AnchorLosses:
    """1 - distance IoU of the decoded box with the object's box, in [0, 2]."""
    return 1 - distance_iou(decode(deltas, anchors), boxes)


def ciou(deltas: Boxes, anchors: AnchorBoxes, boxes: Boxes) -> AnchorLosses:
    """1 - complete IoU of the decoded box with the object's box, in [0, 2.5)."""
    return 1 - complete_iou(decode(deltas, anchors), boxes)


def generalized_iou(boxes1: Float[Tensor, "*#batch 4"], boxes2: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Generalized IoU of boxes pair by pair, in [-1, 1]: IoU - (hull - union) / hull.

    Source: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019, Algorithm 1.
    """
    iou, union = paired_iou_and_union(boxes1, boxes2)
    width, height = _hull(boxes1, boxes2)
    hull = width * height
    return iou - (hull - union) / hull.clamp(min=SMALLEST_AREA)


def distance_iou(boxes1: Float[Tensor, "*#batch 4"], boxes2: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Distance IoU of boxes pair by pair, in [-1, 1]: IoU - d^2 / c^2, with d the distance of the centres and c the
    diagonal of the hull.

    Source: Zheng et al., Distance-IoU Loss, AAAI 2020, equation 7.
    """
    # Twice the distance along each axis.
    x, y = ((boxes1[..., :2] - boxes2[..., :2]) + (boxes1[..., 2:] - boxes2[..., 2:])).unbind(-1)
    width, height = _hull(boxes1, boxes2)
    diagonal = (width * width + height * height).clamp(min=SMALLEST_AREA)
    return paired_iou(boxes1, boxes2) - 0.25 * (x * x + y * y) / diagonal


def complete_iou(boxes1: Float[Tensor, "*#batch 4"], boxes2: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Complete IoU of boxes pair by pair: distance IoU - a v, with v = (2 / pi (atan(w1 / h1) - atan(w2 / h2)))^2 and
    a = v / (1 - IoU + v), which is a constant to the gradient, as published.

    Source: Zheng et al., Distance-IoU Loss, AAAI 2020, equations 8 to 11.
    """
    angle1, angle2 = (torch.atan2(*box_sides(boxes).clamp(min=_SMALLEST_SIDE).unbind(-1)) for boxes in (boxes1, boxes2))
    difference = (2 / math.pi) * (angle1 - angle2)
    aspect = difference * difference
    with torch.no_grad():
        weight = aspect / (1 - paired_iou(boxes1, boxes2) + aspect).clamp(min=SMALLEST_AREA)
    return distance_iou(boxes1, boxes2) - weight * aspect


def _hull(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, ...]:
    """Width and height of the smallest box around both, pair by pair."""
    high, low = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]), torch.minimum(boxes1[..., :2], boxes2[..., :2])
    return (high - low).clamp(min=0).unbind(-1)
