"""The weights of convolutions in the type of autocast, by one kernel for each stage. Beside the road.

autocast casts each weight by a kernel of its own, and each gradient back. Stage by stage, because the gradients of a
stage are there together: with several processes they travel while the backward pass goes on."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DEVICES = ("cuda",)


@contextmanager
def weights_cast(parts: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the block, on a GPU under autocast, the convolutions of these modules have weights in its type."""
    replaced: list[nn.Conv2d] = []
    casts = device.type in DEVICES and torch.is_autocast_enabled(device.type)
    if casts and not torch.compiler.is_compiling():
        dtype = torch.get_autocast_dtype(device.type)
        for part in parts:
            convs = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
            for trained in (True, False):
                group = [conv for conv in convs if conv.weight.requires_grad == trained and conv.weight.dtype != dtype]
                weights = _Cast.apply(dtype, *(conv.weight for conv in group)) if group else ()
                for conv, weight in zip(group, weights, strict=True):
                    conv.__dict__["weight"] = weight  # found before the parameter, which stays where it is
                replaced += group
    try:
        yield
    finally:
        for conv in replaced:
            del conv.__dict__["weight"]


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> Any:
        results = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(results, list(weights))
        ctx.set_materialize_grads(False)
        ctx.weights = weights  # their shapes and layouts; they outlive the graph
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        there = [grad for grad in grads if grad is not None]
        pairs = zip(grads, ctx.weights, strict=True)
        results = [None if grad is None else torch.empty_like(weight) for grad, weight in pairs]
        torch._foreach_copy_([result for result in results if result is not None], there)
        return None, *results
