"""Exponential moving average of weights, which evaluates better than the last step's (Polyak and Juditsky, 1992)."""

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """A second copy of a model whose floating-point state follows the first: e <- d e + (1 - d) w.

    The decay d grows as (1 + t) / (10 + t) up to `decay`, so that the random start is soon forgotten. Buffers that are
    integers (counters) are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.floating = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        """The averaged tensors."""

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """`step` is the 0-based number of the update just made."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = self.model.state_dict(), model.state_dict()
        torch._foreach_lerp_(self.floating, [v for v in theirs.values() if v.is_floating_point()], 1 - decay)
        for key, value in ours.items():
            if not value.is_floating_point():
                value.copy_(theirs[key])
