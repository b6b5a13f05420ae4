"""Sides of a box as distributions over distances from the anchor's centre (Li et al., Generalized Focal Loss, NeurIPS
2020), which a head may predict instead of deltas. Beside the road."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from retina.ops.boxes import SMALLEST_ENCODED_SIDE


def distances_to_deltas(
    distances: Float[Tensor, "*#batch 4"], sides: Float[Tensor, "*#batch 2"]
) -> Float[Tensor, "*batch 4"]:
    """The deltas of the box at these distances from the anchor's centre: `decode` of them is that box.

    With distances l, t, r, b and the anchor's `sides` w_a, h_a in the same unit: dx = (r - l) / (2 w_a),
    dw = log((l + r) / w_a), and the same along y. A side of the box below 1e-6 counts as 1e-6. A box of more than 62.5
    times its anchor's sides comes back smaller, as `decode` cuts it.
    """
    before, after = distances[..., :2], distances[..., 2:]
    size = (before + after).clamp(min=SMALLEST_ENCODED_SIDE)
    return torch.cat((0.5 * (after - before) / sides, (size / sides).log()), dim=-1)


def mean_distances(logits: Float[Tensor, "*batch R"]) -> Float[Tensor, "*batch"]:
    """Means, in 0..R-1, of the distributions over the distances 0, 1, ..., R-1 whose logits these are.

    float32 for narrower logits. Source: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 5.
    """
    if logits.is_cuda and logits.dtype != torch.float64:
        return _MeanDistances.apply(logits)
    return _means(logits)[0]


def _means(logits: Float[Tensor, "*batch R"]) -> tuple[Tensor, Tensor, Tensor]:
    """Means, probabilities and distances."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    distances = torch.arange(logits.shape[-1], device=logits.device, dtype=dtype)
    probabilities = logits.softmax(dim=-1, dtype=dtype)
    return (probabilities * distances).sum(dim=-1), probabilities, distances


class _MeanDistances(torch.autograd.Function):
    """With p the probabilities and m the mean of the distances n, dm / dlogit_n = p_n (n - m).

    Keeps the logits, which are there anyway, and no probabilities: of a whole pyramid these are 5 MB an image."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return _means(logits)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        means, probabilities, distances = _means(logits)
        slopes = probabilities.mul_((distances - means[..., None]).mul_(grad[..., None]))
        return slopes.to(logits.dtype)


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
