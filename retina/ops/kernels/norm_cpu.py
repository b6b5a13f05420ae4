"""Normalisation by statistics over content on a CPU: large maps go image by image, so that one stays in the cache."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_LARGE = 2**17
"""Elements of an image from which its own passes cost more than the calls that they take."""


def goes_by_image(x: Float[Tensor, "B C H W"]) -> bool:
    # first whether a graph is written: sizes are symbols there, which no number can be compared with
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x[0].numel() >= _LARGE


class NormalizeByImage(torch.autograd.Function):
    """`normalize_content` of large maps, which reads each image once for its statistics and once for the result.

    The sum of squares is put together from those around each image's own mean m_i, of n_i cells (Chan, Golub and
    LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979):

        sum (x - m)^2 = sum_i [sum (x_i - m_i)^2 + n_i (m_i - m)^2]

    The gradient is the one in `retina/ops/kernels/norm.py`, with c = x - m computed again from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, groups: int | None, eps: float) -> Any:
        sizes = _content_sizes(mask)
        means, squares = torch.zeros(2, *x.shape[:2], dtype=torch.float64)
        wide = torch.promote_types(x.dtype, torch.float32)
        for i, size in enumerate(sizes):
            cells = _cells(x, i, size)
            means[i] = cells.sum(dim=(0, 1), dtype=wide) / max(1, size[0] * size[1])
            squares[i] = _centred(cells, means[i].to(wide)).square_().sum(dim=(0, 1))
        counts = means.new_tensor([[height * width] for height, width in sizes]).expand_as(means)
        count = pool(counts, groups).clamp(min=1)
        mean = pool(counts * means, groups) / count
        var = pool(squares + counts * (means - mean).square(), groups) / count
        rstd = (var + eps).rsqrt()
        out, center, factor, shift = torch.empty_like(x), mean.to(wide), (weight * rstd).to(wide), bias.to(wide)
        for i, size in enumerate(sizes):
            normal = _centred(_cells(x, i, size), center[i]).mul_(factor[i]).add_(shift)
            _write(out, i, size, normal, shift)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.sizes, ctx.groups = sizes, groups
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        x, weight, mean, rstd, count = ctx.saved_tensors
        sums, products = mean.new_zeros(2, *mean.shape)
        wide = torch.promote_types(x.dtype, torch.float32)
        center = mean.to(wide)
        for i, size in enumerate(ctx.sizes):
            gradient = _cells(grad, i, size).to(wide)
            sums[i] = gradient.sum(dim=(0, 1))
            products[i] = _centred(_cells(x, i, size), center[i]).mul_(gradient).sum(dim=(0, 1))
        slope = (-pool(weight * products, ctx.groups) * rstd**3 / count).to(wide)
        shift = (-pool(weight * sums, ctx.groups) * rstd / count).to(wide)
        factor, dx, zero = (weight * rstd).to(wide), torch.empty_like(x), x.new_zeros(())
        for i, size in enumerate(ctx.sizes):
            part = _centred(_cells(x, i, size), center[i]).mul_(slope[i]).add_(shift[i])
            gradient = _cells(grad, i, size).to(wide)
            _write(dx, i, size, part.addcmul_(gradient, factor[i].expand_as(gradient)), zero)
        return dx, None, (products * rstd).sum(dim=0).to(weight), sums.sum(dim=0).to(weight), None, None


def pool(values: Float[Tensor, "B C"], groups: int | None) -> Float[Tensor, "B C"]:
    """Sums over all that share statistics, in every place that shares them."""
    if groups is None:
        return values.sum(dim=0, keepdim=True).expand_as(values)
    grouped = values.unflatten(1, (groups, -1))
    return grouped.sum(dim=2, keepdim=True).expand_as(grouped).flatten(1)


def _content_sizes(mask: Float[Tensor, "B 1 H W"]) -> list[list[int]]:
    """(height, width) of the content at the top left of each image."""
    mask = mask[:, 0]
    return torch.stack((mask.amax(dim=2).sum(dim=1), mask.amax(dim=1).sum(dim=1)), dim=1).long().tolist()


def _cells(x: Tensor, image: int, size: Sequence[int]) -> Float[Tensor, "h w C"]:
    """The content of an image, in the order of channels_last memory."""
    return x[image, :, : size[0], : size[1]].permute(1, 2, 0)


def _centred(cells: Tensor, mean: Float[Tensor, "C"]) -> Float[Tensor, "h w C"]:
    """A new tensor, in the type of the mean."""
    return cells - mean if cells.dtype == mean.dtype else cells.to(mean.dtype).sub_(mean)


def _write(out: Tensor, image: int, size: Sequence[int], cells: Float[Tensor, "h w C"], beyond: Tensor) -> None:
    height, width = size
    _cells(out, image, size).copy_(cells)
    everything = _cells(out, image, out.shape[2:])
    everything[height:] = beyond
    everything[:height, width:] = beyond
