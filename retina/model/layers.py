"""Convolutions with all that comes behind them: on a GPU in one pass over the map (`retina.ops.kernels.map_forms`),
else one operation after another. Beside the road."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retina.model.content import Content, GroupNorm
from retina.model.folding import FoldedBatchNorm2d, FoldingConv2d
from retina.ops.kernels.map_forms import Norm, group_norm, kernels_serve, norm_serves, shift

Masks = Sequence[Tensor | None]


def convolve(
    conv: nn.Conv2d,
    maps: Sequence[Tensor],
    masks: Masks,
    *,
    norm: GroupNorm | None = None,
    residuals: Sequence[Tensor] = (),
    relu: bool = False,
) -> tuple[Tensor, ...]:
    """conv(map) of every level, then the norm, plus the residual, the ReLU; zero where the mask is.

    masks: 1 within the content, perhaps a cell larger than the result; None for each: no zeros are written."""
    if norm is None and conv.bias is not None and kernels_serve(maps):
        results = [bare(conv, x) for x in maps]
        return shift(results, _fitted(masks, results), Norm((conv.bias,)), residuals=residuals, relu=relu)
    if norm is not None and conv.bias is None and norm_serves(maps, norm.num_groups) and not residuals:
        results = [bare(conv, x) for x in maps]
        return group_norm(results, _fitted(masks, results), norm.weight, norm.bias, norm.num_groups, norm.eps, relu)
    return tuple(
        _finish(conv(x), mask, norm, residuals[level] if residuals else None, relu)
        for level, (x, mask) in enumerate(zip(maps, masks, strict=True))
    )


def _finish(x: Tensor, mask: Tensor | None, norm: GroupNorm | None, residual: Tensor | None, relu: bool) -> Tensor:
    x = x if norm is None else norm(x, mask)
    x = x if residual is None else x.add_(residual)  # in place: the backward pass does not need the output
    x = (
        x if mask is None else x.mul_(_fitted([mask], [x])[0].to(x.dtype))
    )  # before the ReLU, which needs its own result
    return F.relu_(x) if relu else x


def _fitted(masks: Masks, maps: Sequence[Tensor]) -> list[Any]:
    pairs = zip(masks, maps, strict=True)
    return [mask if mask is None else mask[..., : x.shape[2], : x.shape[3]].contiguous() for mask, x in pairs]


def norm_relu(
    conv: nn.Conv2d,
    norm: nn.Module,
    x: Tensor,
    content: Content,
    stride: int,
    *,
    keep: bool = True,
    shortcut: tuple[Tensor, nn.Sequential | None] | None = None,
) -> Tensor:
    """The ReLU of the norm of a convolution, to which a shortcut is added: a map, or what its convolution and norm make
    of it. `stride`: of the result, which is zero beyond the content with `keep`."""
    residual, layers = shortcut or (None, None)
    pairs = [(conv, norm), *([tuple(layers)] if layers is not None else [])]
    if kernels_serve([x]) and all(_is_fixed(*pair) for pair in pairs):
        mask = content.mask(stride) if keep else None
        added = [] if residual is None else [residual if layers is None else bare(layers[0], residual)]
        first, *others = [_statistics(norm) for _, norm in pairs]
        options: dict[str, Any] = {"residuals": added, "residual_norm": others[0] if others else None}
        return shift([bare(conv, x)], [mask], first, relu=True, **options)[0]
    out = run_norm(norm, conv(x), content, stride)
    if residual is not None:
        out += residual if layers is None else run_norm(layers[1], layers[0](residual), content, stride)
    return F.relu_(content.keep(out, stride) if keep else out)


def run_norm(norm: nn.Module, x: Tensor, content: Content, stride: int) -> Tensor:
    """The norm of a map of this stride, whose own statistics are those of the content."""
    with_mask = isinstance(norm, (FoldedBatchNorm2d, GroupNorm))
    return norm(x, content.mask(stride)) if with_mask else norm(x)


def _is_fixed(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the statistics and weights of the norm are fixed and have no gradient."""
    if not isinstance(conv, FoldingConv2d) or (isinstance(norm, FoldedBatchNorm2d) and norm.training):
        return False
    return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in norm.parameters()))


def _statistics(norm: Any) -> Norm:
    return Norm((norm.weight, norm.bias, norm.running_mean, norm.running_var), norm.eps)


def bare(conv: Any, x: Tensor) -> Tensor:
    """The convolution without its bias or the norm that is folded into it."""
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
