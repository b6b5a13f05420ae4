"""Boxes as offsets from anchors, and back; and as distances from an anchor's centre to their four sides."""

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


def encode_distances(
    boxes: Float[Tensor, "*#batch 4"], anchors: Float[Tensor, "*#batch 4"]
) -> Float[Tensor, "*batch 4"]:
    """Pixels from the anchor's centre to the left, top, right and bottom of the box; negative where it is outside.

    Source: Tian et al., FCOS, ICCV 2019, equation 1.
    """
    centre = 0.5 * (anchors[..., :2] + anchors[..., 2:])
    return torch.cat((centre - boxes[..., :2], boxes[..., 2:] - centre), dim=-1)


def distances_to_deltas(
    distances: Float[Tensor, "*#batch 4"], sides: Float[Tensor, "*#batch 2"]
) -> Float[Tensor, "*batch 4"]:
    """The deltas of the box at these distances from the anchor's centre: `decode` of them is that box.

    With distances l, t, r, b and the anchor's `sides` w_a, h_a in the same unit: dx = (r - l) / (2 w_a),
    dw = log((l + r) / w_a), and the same along y. A side of the box below 1e-6 counts as 1e-6. A box of more than 62.5
    times its anchor's sides comes back smaller, as `decode` cuts it.
    """
    before, after = distances[..., :2], distances[..., 2:]
    size = (before + after).clamp(min=_SMALLEST_SIDE)
    return torch.cat((0.5 * (after - before) / sides, (size / sides).log()), dim=-1)


def mean_distances(logits: Float[Tensor, "*batch R"]) -> Float[Tensor, "*batch"]:
    """Means, in 0..R-1, of the distributions over the distances 0, 1, ..., R-1 whose logits these are.

    float32 for narrower logits. Source: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 5.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    distances = torch.arange(logits.shape[-1], device=logits.device, dtype=dtype)
    return (logits.softmax(dim=-1, dtype=dtype) * distances).sum(dim=-1)


def even_distribution(means: Float[Tensor, "*batch"], num_bins: int) -> Float[Tensor, "*batch R"]:
    """Logits of distributions over the distances 0, 1, ..., R-1 that have these means, and are as even as that allows
    (of largest entropy, so logits are linear in the distance). The other way round from `mean_distances`.

    Means are held within 0.5..R-1.5, so that no distance is out of the question. float32; no gradient.
    """
    means = means.detach().double().clamp(0.5, num_bins - 1.5)
    distances = torch.arange(num_bins, device=means.device, dtype=torch.float64)
    low, high = torch.full_like(means, -4), torch.full_like(means, 4)  # the slopes of means 0.02 and
    for _ in range(50):
        slope = 0.5 * (low + high)
        below = mean_distances(slope[..., None] * distances) < means
        low, high = torch.where(below, slope, low), torch.where(below, high, slope)
    return (low[..., None] * distances).float()
