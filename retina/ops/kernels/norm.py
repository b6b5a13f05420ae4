"""Normalisation by statistics over the content of images, where the rest of their canvas is padding."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from retina.ops.kernels.norm_cpu import NormalizeByImage, goes_by_image, pool


def normalize_content(
    x: Float[Tensor, "B C H W"],
    mask: Float[Tensor, "B 1 H W"],
    weight: Float[Tensor, "C"],
    bias: Float[Tensor, "C"],
    *,
    groups: int | None,
    eps: float,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """weight (x - mean) / sqrt(var + eps) + bias, with mean and variance over the cells where `mask` is 1, not 0.

    groups: statistics per image and group of channels (GroupNorm); None: per channel over all images (BatchNorm).

    Returns the result, and without gradient the mean and the (biased) variance of each image and channel. Equals
    `F.group_norm` and `F.batch_norm` of the content alone up to rounding; sums over images and channels are float64.
    Where there is no content, the result is the bias. Beyond the content it is no number to rely on, and its gradient
    must be zero there, as it is behind a product with the mask."""
    function = NormalizeByImage if goes_by_image(x) else NormalizeWhole
    return function.apply(x, mask, weight, bias, groups, eps)


class NormalizeWhole(torch.autograd.Function):
    """With g the gradient of the result, c = x - mean, n the number of elements that share it, r = 1 / sqrt(var + eps):

        dx = weight r g - (r / n) sum(weight g) - c (r^3 / n) sum(weight g c)

    The eager autograd of the same sums takes twice the passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, groups: int | None, eps: float) -> Any:
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        x, mask = x.to(wide), mask.to(wide)
        count = pool(mask.sum(dim=(1, 2, 3), dtype=torch.float64)[:, None].expand(x.shape[:2]), groups).clamp(min=1)
        x = x * mask
        mean = pool(x.sum(dim=(2, 3)).double(), groups) / count
        # Squares of differences, because those of `x` lose the variance of a large mean. `var_mean`, `vector_norm` and
        # products of matrices take ten times as long in channels_last memory.
        centred = x.sub_(_per_channel(mean, x)).mul_(mask)
        var = pool((centred * centred).sum(dim=(2, 3)).double(), groups) / count
        rstd = (var + eps).rsqrt()
        ctx.save_for_backward(centred.to(dtype), mask, weight, rstd, count)
        ctx.groups = groups
        ctx.mark_non_differentiable(mean, var)
        result = torch.addcmul(_per_channel(bias[None], x), centred, _per_channel(weight * rstd, x))
        return result.to(dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        centred, mask, weight, rstd, count = ctx.saved_tensors
        dtype, grad, centred = grad.dtype, grad.to(mask.dtype), centred.to(mask.dtype)
        sums, products = grad.sum(dim=(2, 3)).double(), (grad * centred).sum(dim=(2, 3)).double()
        slope = -pool(weight * products, ctx.groups) * rstd**3 / count
        shift = -pool(weight * sums, ctx.groups) * rstd / count
        dx = (grad * _per_channel(weight * rstd, grad)).addcmul_(centred, _per_channel(slope, grad))
        dx = dx.addcmul_(_per_channel(shift, grad), mask)
        return dx.to(dtype), None, (products * rstd).sum(dim=0).to(weight), sums.sum(dim=0).to(weight), None, None


def _per_channel(values: Float[Tensor, "B C"], like: Tensor) -> Float[Tensor, "B C 1 1"]:
    return values.to(like.dtype)[..., None, None]
