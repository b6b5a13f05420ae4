"""The sum of `retina.losses.soft_targets.ghm_loss` over a detector's logits, a part of them at a time: with a thousand
classes they are the largest tensor of a step, and plain autograd would keep ten of that size. Beside the road."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from retina.losses.focal import binary_cross_entropy
from retina.losses.soft_targets import gradient_bins
from retina.types import Assignment

_LOGITS_OF_DEVICE, _LOGITS = 2**25, 2**18
"""At a time, on a GPU and on a CPU."""


def summed_ghm_loss(
    logits: Sequence[Float[Tensor, "B _ K"]], labels: Int64[Tensor, "B A"], assigned: Assignment, *, num_bins: int
) -> Float[Tensor, ""]:
    """One histogram over all levels. Gradients reach the logits."""
    return _SummedGHM.apply(num_bins, labels, assigned.positive, assigned.negative, *logits)


class _SummedGHM(torch.autograd.Function):
    """The gradient of BCE(p, y) / density is (p - y) / density, as densities carry none."""

    @staticmethod
    def forward(ctx: Any, num_bins: int, labels: Tensor, positive: Tensor, negative: Tensor, *levels: Tensor) -> Tensor:
        roles = labels, positive, positive | negative
        counts = torch.zeros(num_bins + 1, dtype=torch.int64, device=labels.device)  # float32 counts up to 2^24
        for _, logits, targets, counted in _parts(levels, *roles):
            bins = gradient_bins(logits, targets, counted, num_bins).flatten()
            counts.scatter_add_(0, bins, counts.new_ones(()).expand(bins.numel()))
        weights = 1 / (counts * num_bins).clamp(min=1).to(torch.promote_types(levels[0].dtype, torch.float32))
        weights[num_bins:].zero_()  # of what does not count; in place, as a number would be waited for
        total = weights.new_zeros(())
        # half precision waits for the loss scale in `backward`: without it, small gradients underflow
        dtype = torch.float32 if levels[0].dtype == torch.float16 else levels[0].dtype
        slopes = [torch.empty_like(level, dtype=dtype) for level in levels]
        for (level, rows), logits, targets, counted in _parts(levels, *roles):
            weight = weights[gradient_bins(logits, targets, counted, num_bins)]
            total += torch.where(counted, binary_cross_entropy(logits, targets) * weight, 0).sum()
            slopes[level][:, rows] = torch.where(counted, (logits.sigmoid() - targets) * weight, 0)
        ctx.dtype = levels[0].dtype
        ctx.save_for_backward(*slopes)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, None, None, *((slope * grad).to(ctx.dtype) for slope in ctx.saved_tensors)


def _parts(
    levels: Sequence[Tensor], labels: Tensor, positive: Tensor, counted: Tensor
) -> Iterator[tuple[tuple[int, slice], Tensor, Tensor, Tensor]]:
    """Level and rows of some anchors, their logits, targets and which logits count, in float32 at least."""
    first = 0
    for number, level in enumerate(levels):
        most = _LOGITS if level.device.type == "cpu" else _LOGITS_OF_DEVICE
        step = max(1, most // max(1, len(level) * level.shape[-1]))
        classes = torch.arange(level.shape[-1], device=level.device)
        for start in range(0, level.shape[1], step):
            rows = slice(start, min(start + step, level.shape[1]))
            part = slice(first + rows.start, first + rows.stop)
            logits = level[:, rows].to(torch.promote_types(level.dtype, torch.float32))
            targets = positive[:, part, None] & (labels[:, part, None] == classes)
            yield (number, rows), logits, targets.to(logits.dtype), counted[:, part, None].expand_as(targets)
        first += level.shape[1]
