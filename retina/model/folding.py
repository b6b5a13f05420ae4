"""Convolutions that do the work of the norm behind them, while the statistics of the norm are fixed. Beside the road.

With scale = gamma / sqrt(var + eps) per output channel, norm(conv(x, w)) = conv(x, w scale) + (beta - mean scale): the
small weights are scaled instead of the large activations. The state dict keeps the names and shapes of a convolution
and a norm. Gradients reach the weights through the scale. Nothing is cached between calls, so weights and statistics
may change at any time.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from retina.ops.kernels.norm import normalize_content


class FoldedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """The identity: the convolution before it applies its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """In training a BatchNorm2d; in evaluation the identity, because the convolution before it applies the learned
    statistics."""

    def forward(self, x: Tensor, mask: Float[Tensor, "B 1 H W"] | None = None) -> Tensor:
        """With a mask, the statistics are those of the cells where it is 1."""
        if not self.training:
            return x
        if mask is None:
            if x.numel() > x.shape[1]:
                return super().forward(x)
            mask = x.new_ones((1, 1, 1, 1))  # torch refuses a single value per channel, whose variance is 0
        out, mean, var = normalize_content(x, mask, self.weight, self.bias, groups=None, eps=self.eps)
        if not self.track_running_stats:
            return out
        count = mask.sum()
        unbiased = var[0] * (count / (count - 1).clamp(min=1))
        with torch.no_grad():
            for statistic, value in ((self.running_mean, mean[0]), (self.running_var, unbiased)):
                assert statistic is not None
                statistic.lerp_(value.to(statistic), self.momentum or 0.0)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        return out


FoldedNorm = FoldedFrozenBatchNorm2d | FoldedBatchNorm2d


class FoldingConv2d(nn.Conv2d):
    """A convolution without bias that also applies the norm behind it, unless that norm is training."""

    folded: tuple[FoldedNorm]
    """The norm, which stays a child of the same parent; in a tuple, so that it is not registered as a child here."""

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.folded
        if isinstance(norm, FoldedBatchNorm2d) and norm.training:
            return super().forward(x)
        weight, bias = fold(self.weight, norm)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def fold(weight: Tensor, norm: FoldedNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals the one with `weight` followed by `norm` with its statistics."""
    statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
    gamma, beta, mean, var = (tensor for tensor in statistics if tensor is not None)
    scale = gamma * (var + norm.eps).rsqrt()
    return weight * scale.view(-1, 1, 1, 1), beta - mean * scale


def fold_norms(module: nn.Module) -> None:
    """Makes every convolution within `module` do the work of the BatchNorm right behind it."""
    for parent in module.modules():
        for (name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if type(conv) is nn.Conv2d and conv.bias is None and isinstance(norm, FoldedNorm):
                assert conv.out_channels == norm.weight.numel(), f"{name} is not what comes before {norm_name}"
                conv.__class__ = FoldingConv2d
                conv.folded = (norm,)  # type: ignore[assignment]  # it is a FoldingConv2d by now


@torch.no_grad()
def merge_norms(module: nn.Module) -> None:
    """Puts the statistics into the weights permanently, for inference: no weight is scaled per forward any more.

    The state dict changes: a merged convolution gains a bias and loses its norm."""
    for parent in module.modules():
        for (_, conv), (norm_name, _) in pairwise(list(parent.named_children())):
            if isinstance(conv, FoldingConv2d):
                conv.weight, conv.bias = map(nn.Parameter, fold(conv.weight, conv.folded[0]))
                del conv.folded
                conv.__class__ = nn.Conv2d  # type: ignore[assignment]
                setattr(parent, norm_name, nn.Identity())


def freeze(module: nn.Module) -> None:
    """No gradients, and BatchNorm turned into its frozen form, so that `train()` cannot thaw its statistics."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FoldedFrozenBatchNorm2d(child.num_features, eps=child.eps)
            state = {key: value for key, value in child.state_dict().items() if key != "num_batches_tracked"}
            frozen.load_state_dict(state)
            setattr(module, name, frozen)
        else:
            freeze(child)
