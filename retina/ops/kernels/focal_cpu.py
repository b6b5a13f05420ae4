"""The focal loss of class labels and its gradient in chunks that stay in a CPU's cache; on a device without Triton too.

With z the logit against the truth (x for a negative, -x for a positive), s = sigmoid(z) and a = 1 - alpha or alpha:

    loss        L     = a s^gamma softplus(z)
    derivative  dL/dz = a s^gamma (gamma (1 - s) softplus(z) + s)

Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5 and appendix B.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from itertools import repeat

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

# Elements per thread and chunk on CPU: a handful of float32 buffers of this size stay in the second-level cache. On
# other devices a chunk only bounds the memory of the buffers.
CHUNK = 3 * 2**14
_CHUNK_OF_DEVICE = 2**24
_HUGE = 2**22  # two huge pages
# exp of it is finite in float32, and sigmoid of it is 1 in float64 too.
_SATURATED = 80.0


def empty_like(logits: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """On huge pages, where Linux has them: faulting in a page of 4 KiB costs as much as the loss of its 1024 logits."""
    size = logits.numel() * dtype.itemsize
    if logits.device.type == "cpu" and size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(logits.shape)
    return torch.empty(logits.shape, dtype=dtype, device=logits.device)


def loss_and_grad(
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

    The loss of each anchor's label (of class 0, where there is no label) is computed apart, and takes the place of what
    the chunks compute there: they treat every class as a negative.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    counted = (positive | negative).to(dtype)
    labels = torch.where(positive, labels, 0)
    per_class = negative_weight if isinstance(negative_weight, Tensor) else None
    weights = counted if per_class is not None else counted * negative_weight
    x = logits.gather(1, labels).to(dtype)
    power, factor, softplus = focal_terms(torch.where(positive, -x, x), gamma, [torch.empty_like(x) for _ in range(4)])
    power *= torch.where(positive, _of_labels(positive_weight, labels), counted * _of_labels(negative_weight, labels))
    losses = [(power * softplus).sum()]
    label_grad = torch.where(positive, -power, power).mul_(factor)
    del power, factor, softplus

    elements = CHUNK * torch.get_num_threads() if logits.device.type == "cpu" else _CHUNK_OF_DEVICE
    rows = max(1, elements // logits.shape[1])
    shape = (min(rows, len(logits)), logits.shape[1])
    buffers = [logits.new_empty(shape, dtype=dtype) for _ in range(4)]
    if grad is not None:
        label_grad = label_grad.to(grad.dtype)
    zeros = label_grad.new_zeros((shape[0], 1), dtype=dtype)
    chunks = zip(*(part.split(rows) for part in (logits, weights, labels, label_grad)), strict=True)
    outs = repeat(None) if grad is None else grad.split(rows)
    for (x, weight, label, grad_of_label), out in zip(chunks, outs, strict=False):
        if len(x) < rows:
            buffers = [buffer[: len(x)] for buffer in buffers]
        if out is not None and out.dtype == dtype:
            buffers[-1] = out  # one tensor less in the cache
        power, factor, softplus = focal_terms(x.to(dtype), gamma, buffers)
        if per_class is not None:
            power *= per_class
        power.mul_(weight).scatter_(1, label, zeros[: len(x)])
        losses.append(softplus.mul_(power).sum())
        if out is not None:
            torch.mul(power, factor, out=out).scatter_(1, label, grad_of_label)
    return torch.stack(losses).sum()


def _of_labels(weight: float | Float[Tensor, "K"], labels: Int64[Tensor, "N 1"]) -> float | Float[Tensor, "N 1"]:
    return weight[labels] if isinstance(weight, Tensor) else weight


def focal_terms(
    z: Float[Tensor, "*shape"], gamma: float, buffers: Sequence[Float[Tensor, "*shape"]]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """s^gamma, gamma (1 - s) softplus(z) + s and softplus(z), of the formulas at the top, in the four buffers given.

    One exponential e and one logarithm: s = e / (1 + e), softplus(z) = log(1 + e). A z too large for e is its own
    softplus.
    """
    power, factor, complement, softplus = buffers
    e = torch.clamp(z, max=_SATURATED, out=factor).exp_()
    torch.maximum(torch.log1p(e, out=softplus), z, out=softplus)
    torch.add(e, z.new_ones(()), out=complement).reciprocal_()  # torch would make a tensor of a number
    s = e.mul_(complement)
    torch.pow(s, gamma, out=power)
    return power, s.addcmul_(complement, softplus, value=gamma), softplus
