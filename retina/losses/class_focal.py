"""The focal loss of class labels in closed form: one pass over the logits gives loss and gradient, in the forms of
`retina.ops.kernels` (`focal_cpu` has the formulas)."""

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from retina.losses.common import as_tensor
from retina.losses.focal import check_focal, focal_of_error
from retina.ops.kernels import focal_cpu


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

    Equals `retina.losses.focal.sigmoid_focal_loss` on the multi-hot targets, which are never built. One pass over the
    logits, in chunks or (with one alpha for all classes) in a Triton kernel, gives the loss and the gradient, which is
    stored where the logits' gradient needs a tensor anyway. A compiler is given the plain formula, which it fuses by
    itself. float32 inside for narrower dtypes; the sum is float32, or float64 for float64 logits. Shapes never depend
    on the data. Once differentiable.

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
        true = positive & (labels == torch.arange(num_classes, device=logits.device))
        loss = focal_of_error(torch.where(true, -logits, logits), gamma)
        return (loss * torch.where(true, weights[0], (positive | negative) * weights[1])).sum()
    arguments = (logits, labels, positive, negative, *weights, gamma)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _ClassFocalLoss.apply(*arguments)
    return _loss_and_grad(*arguments, grad=None)


class _ClassFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> Tensor:
        # Half precision waits for the loss scale in `backward`: without it, the gradients of easy negatives underflow.
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        ctx.grad = focal_cpu.empty_like(logits, dtype)
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


def _triton_kernels(tensor: Tensor) -> ModuleType | None:
    if not tensor.is_cuda or tensor.dtype == torch.float64 or find_spec("triton") is None:
        return None
    from retina.ops.kernels import focal

    return focal


def _loss_and_grad(logits: Tensor, *arguments: Any, grad: Tensor | None) -> Float[Tensor, ""]:
    kernels = None if any(isinstance(weight, Tensor) for weight in arguments[3:5]) else _triton_kernels(logits)
    return (kernels or focal_cpu).loss_and_grad(logits, *arguments, grad=grad)
