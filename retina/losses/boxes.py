"""Box losses of the positive anchors: any callable like these can take their place.

The first two compare offsets from the anchor. The others decode the box and compare its overlap with the object's, and
so weigh large and small objects alike; their formulas are in `retina.ops.boxes`.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from retina.losses.common import check_range
from retina.ops.boxes import complete_iou, decode, distance_iou, encode, generalized_iou, paired_iou

Boxes = Float[Tensor, "*batch A 4"]
AnchorBoxes = Float[Tensor, "A 4"]
AnchorLosses = Float[Tensor, "*batch A"]
BoxLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(deltas [... A 4], anchors [A 4], boxes [... A 4]) -> [... A]: predicted offsets against the objects' boxes."""


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
