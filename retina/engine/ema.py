"""Exponential moving average of weights, which evaluates better than the last step's (Polyak and Juditsky, 1992)."""

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """A second copy of a model whose floating-point state follows the first: e <- d e + (1 - d) w.

    The decay d grows as (1 + t) / (10 + t) up to `decay`, so that the random start is soon forgotten. Buffers that are
    integers (counters) are copied. The model must stay where it is: its tensors are changed in place only."""

    floating: list[Tensor]
    """The averaged tensors."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.floating, self._counters = _by_kind(self.model)
        self._followed, self._followed_counters = _by_kind(model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """`step` is the 0-based number of the update just made."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.floating, self._followed, 1 - decay)
        if self._counters:
            torch._foreach_copy_(self._counters, self._followed_counters)


def _by_kind(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a model's state, floating-point ones and others."""
    values = list(model.state_dict().values())
    return [v for v in values if v.is_floating_point()], [v for v in values if not v.is_floating_point()]
