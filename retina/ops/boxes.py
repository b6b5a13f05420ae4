"""Box geometry: areas, overlaps, clipping, and boxes as what a head predicts.

Boxes are `(x1, y1, x2, y2)` in pixels with x1 <= x2 and y1 <= y2; a pixel column is one unit wide, so a box of width 1
has x2 - x1 = 1. A side that is negative counts as 0, and a box without area overlaps nothing: 0, never NaN.
"""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor

SMALLEST_AREA = 1e-7
"""px^2. Far below any real box, and large enough that the gradient of a division by it stays finite."""


def box_area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Width x height in px^2; 0 for inverted boxes."""
    width, height = box_sides(boxes).clamp(min=0).unbind(-1)
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

    Differentiable; without a common area there is no gradient. Value and gradient are finite for boxes without area;
    two equal ones have 0.
    """
    return paired_iou_and_union(boxes1, boxes2)[0]


def paired_iou_and_union(
    boxes1: Float[Tensor, "*#batch 4"], boxes2: Float[Tensor, "*#batch 4"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """`paired_iou`, and the union in px^2."""
    high, low = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]), torch.maximum(boxes1[..., :2], boxes2[..., :2])
    width, height = (high - low).clamp(min=0).unbind(-1)  # no `prod`: its gradient at 0 asks for the count of zeros
    intersection = width * height
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return intersection / union.clamp(min=SMALLEST_AREA), union


def box_sides(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 2"]:
    """Width and height."""
    return boxes[..., 2:] - boxes[..., :2]


def clip_boxes(boxes: Float[Tensor, "*batch 4"], size: Num[Tensor, "*#batch 2"]) -> Float[Tensor, "*batch 4"]:
    """Boxes cut to an image of `size` (height, width): 0 <= x <= width and 0 <= y <= height.

    A box outside becomes one without area on the border. NaN stays NaN.
    """
    limit = size.to(boxes).flip(-1)
    return torch.minimum(boxes.clamp(min=0), torch.cat((limit, limit), dim=-1))


LARGEST_LOG_SCALE = math.log(1000 / 16)
"""A decoded box is at most 62.5 times its anchor: a wild prediction must not overflow exp (as in torchvision)."""

SMALLEST_ENCODED_SIDE = 1e-6
"""px. Padding has no size, and log 0 is not finite; real boxes are never this small."""


def encode(boxes: Float[Tensor, "*#batch 4"], anchors: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Deltas (dx, dy, dw, dh) that lead from anchors to boxes.

    With centres (x, y) and sides (w, h): dx = (x - x_a) / w_a, dw = log(w / w_a), and the same along y, with unit
    weights as in torchvision's RetinaNet. Finite for boxes without area (padding), which the caller masks.
    Source: Girshick et al., R-CNN, CVPR 2014, appendix C, equations 6 to 9.
    """
    anchor_size, size = box_sides(anchors), box_sides(boxes)
    anchor_centre, centre = anchors[..., :2] + 0.5 * anchor_size, boxes[..., :2] + 0.5 * size
    shift = (centre - anchor_centre) / anchor_size
    return torch.cat((shift, (size.clamp(min=SMALLEST_ENCODED_SIDE) / anchor_size).log()), dim=-1)


def decode(deltas: Float[Tensor, "*#batch 4"], anchors: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Boxes from deltas: the inverse of `encode`, with dw and dh cut at `LARGEST_LOG_SCALE`.

    Computed in the wider of both dtypes, so bfloat16 deltas give float32 boxes. Not clipped to any image.
    """
    deltas = deltas.to(torch.promote_types(deltas.dtype, anchors.dtype))
    anchor_size = box_sides(anchors)
    anchor_centre = anchors[..., :2] + 0.5 * anchor_size
    centre = deltas[..., :2] * anchor_size + anchor_centre
    half = 0.5 * (deltas[..., 2:].clamp(max=LARGEST_LOG_SCALE).exp() * anchor_size)
    return torch.cat((centre - half, centre + half), dim=-1)


def encode_distances(
    boxes: Float[Tensor, "*#batch 4"], anchors: Float[Tensor, "*#batch 4"]
) -> Float[Tensor, "*batch 4"]:
    """Pixels from the anchor's centre to the left, top, right and bottom of the box; negative where it is outside.

    Source: Tian et al., FCOS, ICCV 2019, equation 1.
    """
    centre = 0.5 * (anchors[..., :2] + anchors[..., 2:])
    return torch.cat((centre - boxes[..., :2], boxes[..., 2:] - centre), dim=-1)
