"""Convolutions that do the work of the norm behind them, while its statistics are fixed.

With scale = gamma / sqrt(var + eps) per output channel, norm(conv(x, w)) = conv(x, w scale) + (beta - mean scale): the
small weights are scaled instead of the large activations. Names and shapes in the state dict stay those of a
convolution and a norm, gradients reach the weights through the scale, and nothing is remembered between calls, so
weights and statistics may change at any time.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class FoldedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """The identity: the convolution before it applies its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """In training a BatchNorm2d; in evaluation the identity, for then the convolution before it applies the statistics
    that this one has learned."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


FoldedNorm = FoldedFrozenBatchNorm2d | FoldedBatchNorm2d


class FoldingConv2d(nn.Conv2d):
    """A convolution without bias that applies the norm behind it too, unless that one is training.

    It only refers to the norm, which stays a child of the same parent."""

    def __init__(self, conv: nn.Conv2d, norm: FoldedNorm) -> None:
        """Takes over the weights of `conv`."""
        with torch.device("meta"):  # draws no random numbers
            super().__init__(**_geometry(conv), bias=False)
        self.weight = conv.weight
        self._norm = (norm,)  # in a tuple, or it would be registered as a child

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        if isinstance(norm, FoldedBatchNorm2d) and norm.training:
            return super().forward(x)
        weight, bias = fold(self.weight, norm)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def merged(self) -> nn.Conv2d:
        """The convolution that this one and its norm are now."""
        with torch.device("meta"):
            conv = nn.Conv2d(**_geometry(self))
        weight, bias = fold(self.weight, self._norm[0])
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        return conv


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"
    return {name: getattr(conv, name) for name in names}


def fold(weight: Tensor, norm: FoldedNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals the one with `weight` followed by `norm` with its statistics."""
    numbers = norm.weight, norm.bias, norm.running_mean, norm.running_var
    gamma, beta, mean, var = (value for value in numbers if value is not None)
    scale = gamma * (var + norm.eps).rsqrt()
    return weight * scale.view(-1, 1, 1, 1), beta - mean * scale


def fold_norms(module: nn.Module) -> None:
    """Has every convolution within `module` do the work of the BatchNorm right behind it."""
    for parent in module.modules():
        for (name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if type(conv) is nn.Conv2d and conv.bias is None and isinstance(norm, FoldedNorm):
                assert conv.out_channels == norm.weight.numel(), f"{name} is not what comes before {norm_name}"
                setattr(parent, name, FoldingConv2d(conv, norm))


@torch.no_grad()
def merge_norms(module: nn.Module) -> None:
    """Puts the statistics into the weights for good, for inference: then even the small weights need no work.

    The state dict changes: such a convolution gains a bias and loses its norm."""
    for parent in module.modules():
        for (name, conv), (norm_name, _) in pairwise(list(parent.named_children())):
            if isinstance(conv, FoldingConv2d):
                setattr(parent, name, conv.merged())
                setattr(parent, norm_name, nn.Identity())
