"""Boxes as offsets from anchors, and back."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_LOG_SCALE = math.log(1000 / 16)
"""A decoded box is at most 62.5 times its anchor: a wild prediction must not overflow exp (as in torchvision)."""

# px. Padding has no size, and log 0 is not finite; real boxes are never this small.
_SMALLEST_SIDE = 1e-6


def encode(boxes: Float[Tensor, "*#batch 4"], anchors: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Deltas (dx, dy, dw, dh) that lead from anchors to boxes.

    With centres (x, y) and sides (w, h): dx = (x - x_a) / w_a, dw = log(w / w_a), and the same along y, with unit
    weights as in torchvision's RetinaNet. Finite for boxes without area (padding), which the caller masks.
    Source: Girshick et al., R-CNN, CVPR 2014, appendix C, equations 6 to 9.
    """
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    anchor_centre = anchors[..., :2] + 0.5 * anchor_size
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    shift = (centre - anchor_centre) / anchor_size
    return torch.cat((shift, (size.clamp(min=_SMALLEST_SIDE) / anchor_size).log()), dim=-1)


def decode(deltas: Float[Tensor, "*#batch 4"], anchors: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Boxes from deltas: the inverse of `encode`, with dw and dh cut at `LARGEST_LOG_SCALE`.

    Computed in the wider of both dtypes, so bfloat16 deltas give float32 boxes. Not clipped to any image.
    """
    deltas = deltas.to(torch.promote_types(deltas.dtype, anchors.dtype))
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    anchor_centre = anchors[..., :2] + 0.5 * anchor_size
    centre = deltas[..., :2] * anchor_size + anchor_centre
    half = 0.5 * (deltas[..., 2:].clamp(max=LARGEST_LOG_SCALE).exp() * anchor_size)
    return torch.cat((centre - half, centre + half), dim=-1)
