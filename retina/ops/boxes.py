"""Box geometry: areas, overlaps, clipping and COCO's `xywh`.

Boxes are `(x1, y1, x2, y2)` in pixels with x1 <= x2 and y1 <= y2; a pixel column is one unit wide, so a box of width 1
has x2 - x1 = 1. A side that is negative counts as 0, and a box without area overlaps nothing: 0, never NaN.
"""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor

# px^2. Far below any real box, and large enough that the gradient of a division by it stays finite.
_SMALLEST_AREA = 1e-7
_SMALLEST_SIDE = 1e-3  # px, likewise for angles


def box_area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Width x height in px^2; 0 for inverted boxes."""
    width, height = _sides(boxes).clamp(min=0).unbind(-1)
    return width * height


def pairwise_intersection(
    boxes1: Float[Tensor, "*#batch N 4"], boxes2: Float[Tensor, "*#batch M 4"]
) -> Float[Tensor, "*batch N M"]:
    """Area in px^2 that every box of one set shares with every box of the other."""
    left1, top1, right1, bottom1 = boxes1[..., :, None, :].unbind(-1)
    left2, top2, right2, bottom2 = boxes2[..., None, :, :].unbind(-1)
    # In place, because with N anchors of a batch each of these is hundreds of megabytes.
    width = torch.minimum(right1, right2).sub_(torch.maximum(left1, left2)).clamp_(min=0)
    height = torch.minimum(bottom1, bottom2).sub_(torch.maximum(top1, top2)).clamp_(min=0)
    return width * height


def intersection_over_union(
    intersection: Float[Tensor, "*batch N M"], area1: Float[Tensor, "*#batch N"], area2: Float[Tensor, "*#batch M"]
) -> Float[Tensor, "*batch N M"]:
    """IoU from known intersections: `intersection / (area1 + area2 - intersection)`, 0 without area."""
    union = (area1[..., :, None] + area2[..., None, :]).sub_(intersection)
    return intersection / union.clamp_(min=torch.finfo(union.dtype).tiny)


def pairwise_iou(
    boxes1: Float[Tensor, "*#batch N 4"], boxes2: Float[Tensor, "*#batch M 4"]
) -> Float[Tensor, "*batch N M"]:
    """Intersection over union of every box of one set with every box of the other, in [0, 1].

    Bit-equal to `torchvision.ops.box_iou` for boxes with area; 0 where it gives NaN. The larger set should come second:
    its axis is then the contiguous one.
    """
    return intersection_over_union(pairwise_intersection(boxes1, boxes2), box_area(boxes1), box_area(boxes2))


def paired_iou(boxes1: Float[Tensor, "*#batch 4"], boxes2: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Intersection over union of boxes pair by pair, in [0, 1].

    Differentiable, as are its three extensions below; without a common area there is no gradient. Value and gradient
    are finite for boxes without area; two equal ones have 0.
    """
    intersection = _intersection(*_corners(boxes1, boxes2))
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return intersection / union.clamp(min=_SMALLEST_AREA)


def generalized_iou(boxes1: Float[Tensor, "*#batch 4"], boxes2: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Generalized IoU of boxes pair by pair, in [-1, 1]: IoU - (hull - union) / hull.

    Differentiable. Value and gradient are finite for boxes without area; two equal ones have 0.
    Source: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019, Algorithm 1.
    """
    corners = _corners(boxes1, boxes2)
    intersection, (hull_width, hull_height) = _intersection(*corners), _sides_of_hull(*corners)
    hull = hull_width * hull_height
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return intersection / union.clamp(min=_SMALLEST_AREA) - (hull - union) / hull.clamp(min=_SMALLEST_AREA)


def distance_iou(boxes1: Float[Tensor, "*#batch 4"], boxes2: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Distance IoU of boxes pair by pair, in [-1, 1]: IoU - d^2 / c^2, with d the distance of the centres and c the
    diagonal of the hull.

    Differentiable. Value and gradient are finite for boxes without area; two equal ones have 0.
    Source: Zheng et al., Distance-IoU Loss, AAAI 2020, equation 7.
    """
    # Twice the distance along each axis.
    x, y = ((boxes1[..., :2] - boxes2[..., :2]) + (boxes1[..., 2:] - boxes2[..., 2:])).unbind(-1)
    width, height = _sides_of_hull(*_corners(boxes1, boxes2))
    diagonal = (width * width + height * height).clamp(min=_SMALLEST_AREA)
    return paired_iou(boxes1, boxes2) - 0.25 * (x * x + y * y) / diagonal


def complete_iou(boxes1: Float[Tensor, "*#batch 4"], boxes2: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """Complete IoU of boxes pair by pair: distance IoU - a v, with v = (2 / pi (atan(w1 / h1) - atan(w2 / h2)))^2 and
    a = v / (1 - IoU + v).

    Differentiable; a is taken as a constant, as published. Value and gradient are finite for boxes without area; two
    equal ones have 0. Source: Zheng et al., Distance-IoU Loss, AAAI 2020, equations 8 to 11.
    """
    angle1, angle2 = (torch.atan2(*_sides(boxes).clamp(min=_SMALLEST_SIDE).unbind(-1)) for boxes in (boxes1, boxes2))
    difference = (2 / math.pi) * (angle1 - angle2)
    aspect = difference * difference
    with torch.no_grad():
        weight = aspect / (1 - paired_iou(boxes1, boxes2) + aspect).clamp(min=_SMALLEST_AREA)
    return distance_iou(boxes1, boxes2) - weight * aspect


def _sides(boxes: Tensor) -> Tensor:
    return boxes[..., 2:] - boxes[..., :2]


def _corners(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upper left and lower right of the first boxes, then of the second."""
    return boxes1[..., :2], boxes1[..., 2:], boxes2[..., :2], boxes2[..., 2:]


def _intersection(low1: Tensor, high1: Tensor, low2: Tensor, high2: Tensor) -> Tensor:
    # No `prod`: its gradient at 0 asks for the count of zeros.
    width, height = (torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp(min=0).unbind(-1)
    return width * height


def _sides_of_hull(low1: Tensor, high1: Tensor, low2: Tensor, high2: Tensor) -> tuple[Tensor, ...]:
    return (torch.maximum(high1, high2) - torch.minimum(low1, low2)).clamp(min=0).unbind(-1)


def clip_boxes(boxes: Float[Tensor, "*batch 4"], size: Num[Tensor, "*#batch 2"]) -> Float[Tensor, "*batch 4"]:
    """Boxes cut to an image of `size` (height, width): 0 <= x <= width and 0 <= y <= height.

    A box outside becomes one without area on the border. NaN stays NaN.
    """
    limit = size.to(boxes).flip(-1)
    return torch.minimum(boxes.clamp(min=0), torch.cat((limit, limit), dim=-1))


def xywh_to_xyxy(boxes: Num[Tensor, "*batch 4"]) -> Num[Tensor, "*batch 4"]:
    """COCO's (left, top, width, height) to corners."""
    return torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), dim=-1)


def xyxy_to_xywh(boxes: Num[Tensor, "*batch 4"]) -> Num[Tensor, "*batch 4"]:
    """Corners to COCO's (left, top, width, height)."""
    return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), dim=-1)
