"""The focal loss of class labels in closed form, which costs little more than reading the logits.

With z the logit against the truth (x for a negative, -x for a positive), s = sigmoid(z) and a = 1 - alpha or alpha:

    loss        L     = a s^gamma softplus(z)
    derivative  dL/dz = a s^gamma (gamma (1 - s) softplus(z) + s)

Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5 and appendix B.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import repeat
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from retina.losses.common import as_tensor
from retina.losses.focal import check_focal, focal_of_error

# Elements per thread and chunk on CPU: a handful of float32 buffers of this size stay in the second-level cache. On
# other devices a chunk only bounds the memory of the buffers.
_CHUNK = 3 * 2**14
_CHUNK_OF_DEVICE = 2**24
_HUGE = 2**22  # two huge pages
# exp of it is finite in float32, and sigmoid of it is 1 in float64 too.
_SATURATED = 80.0


def class_focal_loss(
    logits: Float[Tensor, "*batch A K"],
    labels: Int64[Tensor, "*batch A"],
    positive: Bool[Tensor, "*batch A"],
    negative: Bool[Tensor, "*batch A"],
    *,
    alpha: float | Float[Tensor, "K"] | Sequence[float] | None = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Sum of the focal loss over the K classes of every anchor that is positive or negative.

    A positive anchor is a positive of its label's class and a negative of the others; a negative anchor is a negative
    of all; other anchors count for nothing. Labels are read at positive anchors only and must be in 0..K-1 there.

    Equals `retina.losses.focal.sigmoid_focal_loss` on the multi-hot targets, which are never built: loss and gradient
    come from one pass over the logits, in chunks or (with one alpha for all classes) in one Triton kernel, and the
    gradient takes the place that the logits' gradient needs anyway. A compiler is given the plain formula, which it
    fuses by itself. float32 inside for narrower dtypes; the sum is float32, or float64 for float64 logits. Shapes never
    depend on the data. Once differentiable.

    Raises ValueError for values out of range, and for an alpha per class that is not as long as there are classes.
    """
    check_focal(alpha, gamma)
    num_classes = logits.shape[-1]
    if isinstance(alpha, Tensor | Sequence):
        alpha = as_tensor(alpha)
        if len(alpha) != num_classes:
            raise ValueError(f"alpha must have one value per class, {num_classes}, got {len(alpha)}")
        alpha = alpha.to(logits.device, torch.promote_types(logits.dtype, torch.float32), non_blocking=True)
    weights: tuple[float | Tensor, float | Tensor] = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    logits, labels = logits.reshape(-1, num_classes), labels.reshape(-1, 1)
    positive, negative = positive.reshape(-1, 1), negative.reshape(-1, 1)
    if torch.compiler.is_compiling():
        own = positive & (labels == torch.arange(num_classes, device=logits.device))
        loss = focal_of_error(torch.where(own, -logits, logits), gamma)
        return (loss * torch.where(own, weights[0], (positive | negative) * weights[1])).sum()
    arguments = (logits, labels, positive, negative, *weights, gamma)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _ClassFocalLoss.apply(*arguments)
    return _loss_and_grad(*arguments, grad=None)


class _ClassFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> Tensor:
        # Half precision waits for the loss scale in `backward`: without it, the gradients of easy negatives underflow.
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        ctx.grad = _empty_like(logits, dtype)
        ctx.dtype = logits.dtype
        return _loss_and_grad(logits, *arguments, grad=ctx.grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.grad
        if grad is None:
            raise RuntimeError("the graph of this focal loss was freed by a backward without retain_graph=True")
        if torch._C._autograd._get_current_graph_task_keep_graph():
            grad = grad * upstream
        else:
            ctx.grad = None  # the last reference goes to autograd, which then need not copy
            kernels = _triton_kernels(grad)
            grad = kernels.scale_(grad, upstream) if kernels else grad.mul_(upstream)
        return grad.to(ctx.dtype), None, None, None, None, None, None


def _empty_like(logits: Float[Tensor, "N K"], dtype: torch.dtype) -> Float[Tensor, "N K"]:
    """On huge pages, where Linux has them: faulting in a page of 4 KiB costs as much as the loss of its 1024 logits."""
    size = logits.numel() * dtype.itemsize
    if logits.device.type == "cpu" and size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(logits.shape)
    return torch.empty(logits.shape, dtype=dtype, device=logits.device)


def _triton_kernels(tensor: Tensor) -> ModuleType | None:
    if not tensor.is_cuda or tensor.dtype == torch.float64 or find_spec("triton") is None:
        return None
    from retina.ops.kernels import focal as focal_triton

    return focal_triton


def _loss_and_grad(logits: Tensor, *arguments: Any, grad: Tensor | None) -> Float[Tensor, ""]:
    kernels = None if any(isinstance(weight, Tensor) for weight in arguments[3:5]) else _triton_kernels(logits)
    compute = kernels.loss_and_grad if kernels else _sum_over_chunks
    return compute(logits, *arguments, grad=grad)


def _sum_over_chunks(
    logits: Float[Tensor, "N K"],
    labels: Int64[Tensor, "N 1"],
    positive: Bool[Tensor, "N 1"],
    negative: Bool[Tensor, "N 1"],
    positive_weight: float | Float[Tensor, "K"],
    negative_weight: float | Float[Tensor, "K"],
    gamma: float,
    *,
    grad: Float[Tensor, "N K"] | None,
) -> Float[Tensor, ""]:
    """The loss; its gradient is written into `grad`.

    One class of every anchor goes apart, its label's (the first, where there is none). All others are negatives.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    counted = (positive | negative).to(dtype)
    labels = torch.where(positive, labels, 0)
    per_class = negative_weight if isinstance(negative_weight, Tensor) else None
    weights = counted if per_class is not None else counted * negative_weight
    own = logits.gather(1, labels).to(dtype)
    power, factor, softplus = _terms(torch.where(positive, -own, own), gamma, [torch.empty_like(own) for _ in range(4)])
    power *= torch.where(positive, _of_labels(positive_weight, labels), counted * _of_labels(negative_weight, labels))
    losses = [(power * softplus).sum()]
    own_grad = torch.where(positive, -power, power).mul_(factor)
    del power, factor, softplus

    rows = max(1, _elements_of_a_chunk(logits.device) // logits.shape[1])
    shape = (min(rows, len(logits)), logits.shape[1])
    buffers = [logits.new_empty(shape, dtype=dtype) for _ in range(4)]
    if grad is not None:
        own_grad = own_grad.to(grad.dtype)
    nothing = own_grad.new_zeros((shape[0], 1), dtype=dtype)
    chunks = zip(*(part.split(rows) for part in (logits, weights, labels, own_grad)), strict=True)
    outs = repeat(None) if grad is None else grad.split(rows)
    for (x, weight, label, own), out in zip(chunks, outs, strict=False):
        if len(x) < rows:
            buffers = [buffer[: len(x)] for buffer in buffers]
        if out is not None and out.dtype == dtype:
            buffers[-1] = out  # one tensor less in the cache
        power, factor, softplus = _terms(x.to(dtype), gamma, buffers)
        if per_class is not None:
            power *= per_class
        power.mul_(weight).scatter_(1, label, nothing[: len(x)])
        losses.append(softplus.mul_(power).sum())
        if out is not None:
            torch.mul(power, factor, out=out).scatter_(1, label, own)
    return torch.stack(losses).sum()


def _of_labels(weight: float | Float[Tensor, "K"], labels: Int64[Tensor, "N 1"]) -> float | Float[Tensor, "N 1"]:
    return weight[labels] if isinstance(weight, Tensor) else weight


def _elements_of_a_chunk(device: torch.device) -> int:
    return _CHUNK * torch.get_num_threads() if device.type == "cpu" else _CHUNK_OF_DEVICE


def _terms(
    z: Float[Tensor, "N k"], gamma: float, buffers: Sequence[Float[Tensor, "N k"]]
) -> tuple[Float[Tensor, "N k"], Float[Tensor, "N k"], Float[Tensor, "N k"]]:
    """s^gamma, gamma (1 - s) softplus(z) + s and softplus(z), of the formulas at the top, in the four buffers given.

    One exponential e and one logarithm: s = e / (1 + e), softplus(z) = log(1 + e). For a small e, 1 + e is rounded; the
    lost part, times the slope 1 / (1 + e) of the logarithm, is given back. A z too large for e is its own softplus.
    """
    power, factor, complement, softplus = buffers
    one = z.new_ones(())  # torch would make a tensor of a number at every use
    e = torch.clamp(z, max=_SATURATED, out=factor).exp_()
    torch.add(e, one, out=complement)
    torch.log(complement, out=softplus)
    lost = torch.sub(e, torch.sub(complement, one, out=power), out=power)
    complement.reciprocal_()
    torch.maximum(softplus.addcmul_(lost, complement), z, out=softplus)
    s = e.mul_(complement)
    torch.pow(s, gamma, out=power)
    return power, s.addcmul_(complement, softplus, value=gamma), softplus
