"""The closed form of `retina.losses.focal` as one Triton kernel: loss and gradient from one read of the logits.

Nothing here reads a number back to the host. Imported only for tensors on a GPU, where triton exists.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_BLOCK = 4096  # elements of a program
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
_SCALE_PROGRAMS = 2048  # several per multiprocessor of any GPU


def loss_and_grad(
    logits: Float[Tensor, "N K"],
    labels: Int64[Tensor, "N 1"],
    positive: Bool[Tensor, "N 1"],
    negative: Bool[Tensor, "N 1"],
    positive_weight: float,
    negative_weight: float,
    gamma: float,
    *,
    grad: Float[Tensor, "N K"] | None,
) -> Float[Tensor, ""]:
    """The loss in float32, a sum of the sums of blocks; its gradient is written into `grad`, a contiguous tensor."""
    num_classes = logits.shape[1]
    inputs = logits.contiguous(), labels.contiguous(), positive.contiguous(), negative.contiguous()
    blocks = triton.cdiv(logits.numel(), _BLOCK)
    losses = torch.empty(blocks, device=logits.device)
    if blocks == 0:
        return losses.sum()
    with torch.cuda.device_of(logits):
        _focal_kernel[(blocks,)](
            *inputs, losses if grad is None else grad, losses, logits.numel(), positive_weight, negative_weight, gamma,
            num_classes=num_classes, group_size=math.gcd(num_classes, 16), with_grad=grad is not None, block=_BLOCK,
            **_OPTIONS,
        )  # fmt: skip
    return losses.sum()


def scale_(grad: Float[Tensor, "N K"], factor: Float[Tensor, ""]) -> Float[Tensor, "N K"]:
    """Multiplies in place. The device looks at the factor itself: where it is 1, nothing is read or written.

    So a loss that is not scaled before `backward` costs one read and one write of the logits in all, against two reads
    and one write if the gradient were computed in `backward`, where the factor is known; another factor costs one read
    and one write more."""
    size = grad.numel()
    programs = min(_SCALE_PROGRAMS, triton.cdiv(size, _BLOCK))
    if programs:
        with torch.cuda.device_of(grad):
            _scale_kernel[(programs,)](grad, factor, size, block=_BLOCK, **_OPTIONS)
    return grad


@triton.jit
@no_type_check  # or a type checker's import hook would hide the source from triton
def _focal_kernel(
    logits, labels, positive, negative, grad, losses, size, positive_weight, negative_weight, gamma: tl.constexpr,
    num_classes: tl.constexpr, group_size: tl.constexpr, with_grad: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # Groups of neighbours within one anchor, so that its label and role are read once for all of them.
    groups_of_anchor: tl.constexpr = num_classes // group_size
    first = tl.program_id(0).to(tl.int64) * (block // group_size)
    first_anchor = first // groups_of_anchor
    index = tl.arange(0, block // group_size)
    exists = index < size // group_size - first
    group = (first - first_anchor * groups_of_anchor).to(tl.int32) + index
    anchor = group // groups_of_anchor
    label = tl.load(labels + first_anchor + anchor, mask=exists, other=0).to(tl.int32)
    is_positive = tl.load(positive + first_anchor + anchor, mask=exists, other=0) != 0
    is_negative = tl.load(negative + first_anchor + anchor, mask=exists, other=0) != 0
    label = tl.where(is_positive, label, -1) - (group - anchor * groups_of_anchor) * group_size
    weight = tl.where(is_positive | is_negative, negative_weight, 0.0)

    neighbour = tl.arange(0, group_size)[None, :]
    place = index[:, None] * group_size + neighbour
    x = tl.load(logits + first * group_size + place, mask=exists[:, None], other=0.0).to(tl.float32)
    is_label = neighbour == label[:, None]
    weight = tl.where(is_label, positive_weight, weight[:, None])

    # With e = exp(-|z|) nothing overflows. What counts here is the number of instructions: exp2 and rsqrt are one each,
    # where exp and a division guard against numbers that cannot occur.
    z = tl.where(is_label, -x, x)
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    root = tl.rsqrt(1.0 + e)
    larger = root * root
    smaller = e * larger
    s = tl.where(z > 0, larger, smaller)
    complement = tl.where(z > 0, smaller, larger)
    log1p = _log1p(e)
    softplus = tl.maximum(z, 0.0) + log1p
    power = tl.where(is_label, -weight, weight)  # the loss grows against x for a positive
    if gamma == 2:
        power = power * s * s
    elif gamma != 0:
        power = power * tl.exp(-gamma * (tl.maximum(-z, 0.0) + log1p))  # since log s = -softplus(-z)
    tl.store(losses + tl.program_id(0), tl.sum(tl.sum(tl.abs(power * softplus), axis=1), axis=0))
    if with_grad:
        slope = power * (gamma * complement * softplus + s)
        tl.store(grad + first * group_size + place, slope.to(grad.dtype.element_ty), mask=exists[:, None])


@triton.jit
@no_type_check
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1, with a relative error below 2e-7: a minimax polynomial for log(1 + e) / e.

    Half the instructions of `tl.log`, which sees the rounded 1 + e and so loses the small ones."""
    p = 0.00523268804 * e - 0.0295052137
    p = p * e + 0.0782259107
    p = p * e - 0.136632428
    p = p * e + 0.191060051
    p = p * e - 0.24842982
    p = p * e + 0.333190978
    p = p * e - 0.499994934
    p = p * e + 0.99999994
    return p * e


@triton.jit
@no_type_check
def _scale_kernel(grad, factor, size, block: tl.constexpr):
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * block, size, tl.num_programs(0) * block):
            place = start + tl.arange(0, block)
            value = tl.load(grad + place, mask=place < size).to(tl.float32) * scale
            tl.store(grad + place, value.to(grad.dtype.element_ty), mask=place < size)
