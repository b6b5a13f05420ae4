"""Norms, shifts and ReLU of maps: on a GPU, in channels_last memory, by the Triton kernels of `retina.ops.kernels.maps`
for all levels at once; else by torch's operations, which are also what the kernels are tested against."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Maps = Sequence[Float[Tensor, "B C _ _"]]
Masks = Sequence[Float[Tensor, "B 1 _ _"] | None]


class Norm(NamedTuple):
    """A norm with fixed statistics."""

    tensors: tuple[Float[Tensor, "C"], ...] = ()
    """Weight, bias, mean and variance; or a bias alone."""
    eps: float = 0.0


@lru_cache
def triton_is_there() -> bool:
    return find_spec("triton") is not None


def kernels_serve(maps: Maps) -> bool:
    """Whether the kernels take these maps."""
    return all(_is_on_gpu(x) and x.is_contiguous(memory_format=torch.channels_last) for x in maps) and triton_is_there()


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def norm_serves(maps: Maps, groups: int) -> bool:
    """Whether the kernels take these maps for a GroupNorm: tiles of a program have powers of 2 of both."""
    channels = maps[0].shape[1]
    return kernels_serve(maps) and channels & (channels - 1) == 0 == groups & (groups - 1) and channels <= 4096


def group_norm(
    maps: Maps, masks: Masks, weight: Float[Tensor, "C"], bias: Float[Tensor, "C"], groups: int, eps: float, relu: bool
) -> tuple[Tensor, ...]:
    """A GroupNorm whose statistics are those of the cells where a mask is 1 (None: all), then perhaps a ReLU; zero
    where the mask is. By the kernels alone."""
    given = [] if masks[0] is None else list(masks)
    return _GroupNorm.apply(weight, bias, groups, eps, relu, given, *maps)


def shift(
    maps: Maps,
    masks: Masks,
    norm: Norm,
    *,
    residuals: Maps = (),
    residual_norm: Norm | None = None,
    relu: bool = False,
) -> tuple[Tensor, ...]:
    """norm(maps) + residual_norm(residuals), then perhaps a ReLU; zero where the mask is: what comes behind
    convolutions, in one pass. By the kernels alone. The bias of one number per channel gets a gradient, statistics
    and their weights do not."""
    given = [] if masks[0] is None else list(masks)
    other = residual_norm or Norm()
    options = (list(norm.tensors), norm.eps, list(other.tensors), other.eps, relu)
    return _Shift.apply(norm.tensors[0], options, given, len(maps), *maps, *residuals)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        relu: bool,
        masks: list[Tensor],
        *maps: Tensor,
    ) -> Any:
        results, statistics = torch.ops.retina.group_norm(list(maps), masks, weight, bias, groups, eps, relu)
        ctx.relu, ctx.levels = relu, len(maps)
        ctx.save_for_backward(weight, bias, statistics, *maps, *masks)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, bias, statistics, *tensors = ctx.saved_tensors
        maps, masks = tensors[: ctx.levels], tensors[ctx.levels :]
        slopes, sums = torch.ops.retina.group_norm_backward(
            list(grads), maps, masks, weight, bias, statistics, ctx.relu
        )
        of_bias, of_weight = sums.to(weight.dtype).unbind()
        return of_weight, of_bias, None, None, None, None, *slopes


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bias: Tensor, options: tuple[Any, ...], masks: list[Tensor], levels: int, *tensors: Tensor
    ) -> Any:
        """bias: the first of the norm's tensors, for its gradient if there is no other."""
        maps, residuals = list(tensors[:levels]), list(tensors[levels:])
        results = torch.ops.retina.shift(maps, masks, residuals, *options)
        ctx.options, ctx.levels, ctx.added = options, levels, bool(residuals)
        ctx.save_for_backward(*(results if options[-1] else masks))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *options, relu = ctx.options
        kept = list(ctx.saved_tensors)
        results, masks = (kept, []) if relu else ([], kept)
        need = ctx.needs_input_grad
        wanted = [any(need[4 : 4 + ctx.levels]), any(need[4 + ctx.levels :]), need[0]]
        slopes, others, sums = torch.ops.retina.shift_backward(list(grads), results, masks, *options, wanted, relu)
        of_residuals = (others or slopes) if wanted[1] else [None] * (len(slopes) * ctx.added)
        return sums if wanted[2] else None, None, None, None, *slopes, *of_residuals


_library = torch.library.Library("retina", "FRAGMENT")
_library.define(
    "group_norm(Tensor[] maps, Tensor[] masks, Tensor weight, Tensor bias, int groups, float eps, bool relu) "
    "-> (Tensor[], Tensor)"
)
_library.define(
    "group_norm_backward(Tensor[] grads, Tensor[] maps, Tensor[] masks, Tensor weight, Tensor bias, Tensor statistics, "
    "bool relu) -> (Tensor[], Tensor)"
)
_library.define(
    "shift(Tensor[] maps, Tensor[] masks, Tensor[] residuals, Tensor[] norm, float eps, Tensor[] residual_norm, "
    "float residual_eps, bool relu) -> Tensor[]"
)
_library.define(
    "shift_backward(Tensor[] grads, Tensor[] results, Tensor[] masks, Tensor[] norm, float eps, "
    "Tensor[] residual_norm, float residual_eps, bool[] wanted, bool relu) -> (Tensor[], Tensor[], Tensor)"
)


def _channels_last(maps: Sequence[Tensor]) -> list[Tensor]:
    return [x.contiguous(memory_format=torch.channels_last) for x in maps]


@torch.library.impl(_library, "group_norm", "CompositeExplicitAutograd")
def _group_norm(maps: list[Tensor], masks: list[Tensor], *arguments: Any) -> tuple[list[Tensor], Tensor]:
    from retina.ops.kernels.maps import norm_forward

    return norm_forward(_channels_last(maps), masks, *arguments)


@torch.library.impl(_library, "group_norm_backward", "CompositeExplicitAutograd")
def _group_norm_backward(
    grads: list[Tensor], maps: list[Tensor], masks: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], Tensor]:
    from retina.ops.kernels.maps import norm_backward

    return norm_backward(_channels_last(grads), _channels_last(maps), masks, *arguments)


@torch.library.impl(_library, "shift", "CompositeExplicitAutograd")
def _shift(maps: list[Tensor], masks: list[Tensor], residuals: list[Tensor], *arguments: Any) -> list[Tensor]:
    from retina.ops.kernels.maps import shift_forward

    return shift_forward(_channels_last(maps), masks, _channels_last(residuals), *arguments)


@torch.library.impl(_library, "shift_backward", "CompositeExplicitAutograd")
def _shift_backward(
    grads: list[Tensor], results: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    from retina.ops.kernels.maps import shift_backward

    return shift_backward(_channels_last(grads), _channels_last(results), *arguments)


def _same(maps: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.channels_last) for x in maps]


@torch.library.register_fake("retina::group_norm", lib=_library)
def _(maps: list[Tensor], masks: object, weight: Tensor, bias: object, groups: int, *_: object) -> Any:
    return _same(maps), weight.new_empty((len(maps[0]), len(maps), 3, groups), dtype=torch.float32)


@torch.library.register_fake("retina::group_norm_backward", lib=_library)
def _(grads: list[Tensor], *_: object) -> Any:
    return _same(grads), grads[0].new_empty((2, grads[0].shape[1]), dtype=torch.float32)


@torch.library.register_fake("retina::shift", lib=_library)
def _(maps: list[Tensor], *_: object) -> Any:
    return _same(maps)


@torch.library.register_fake("retina::shift_backward", lib=_library)
def _(grads: list[Tensor], *arguments: Any) -> Any:
    norm, _, residual_norm, _, wanted, _ = arguments[2:]
    two = wanted[1] and (len(norm) == 4 or bool(residual_norm))
    return _same(grads), _same(grads) if two else [], norm[0].new_empty(len(norm[0]), dtype=torch.float32)
