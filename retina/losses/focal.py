"""The focal loss: of a sigmoid (binary, multi-label) and of a softmax (one of C classes), for targets of any kind.

`class_focal_loss` is the fast sum of the first in a detector: one pass over the logits gives loss and gradient, in the
forms of `retina.ops.kernels` (`focal_cpu` has the formulas).

float32 inside for narrower dtypes. Values and gradients are finite for logits of any size and any gamma >= 0, although
the slope of (1 - p_t)^gamma is infinite at p_t = 1 for gamma below 1. Class indices build no one-hot tensor.

All raise ValueError for shapes that do not fit, values out of range, and an alpha or weight of the wrong length. The
values of targets are looked at on a CPU only; see `retina.losses.common` for what happens elsewhere.

Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equations 1 to 5 and footnote 1 (many classes).
"""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from retina.losses.common import (
    LossModule,
    along_classes,
    at_least_float32,
    check_range,
    class_axis,
    class_indices,
    element_targets,
    fused_loss,
    per_class,
    reduce_loss,
)
from retina.ops.kernels import focal_cpu
from retina.ops.kernels.elementwise_cpu import is_fusable, log_softmax_of_classes, sigmoid_focal_terms


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float | Tensor | Sequence[float] | None = 0.25,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "none",
) -> Tensor:
    """alpha_t (1 - p_t)^gamma CE, with p_t the probability of the truth, for every logit by itself.

    A soft target y has CE = -y log p - (1 - y) log(1 - p), 1 - p_t = y (1 - p) + (1 - y) p and alpha_t likewise.

    Args:
        logits: of any shape with targets of the same shape, or (N, C, d1, d2, ...) with class indices.
        targets: of the logits' shape: floating-point in [0, 1] (multi-hot, or soft), bool, or integers 0 and 1. Or
            class indices (N, d1, ...) or (N, 1, d1, ...): that class is a positive, the other C - 1 are negatives.
        alpha: weight of positives, 1 - alpha that of negatives; one number, or one per class; None: weight 1 on both.
        gamma: focusing exponent >= 0; 0 is the (balanced) binary cross entropy.
        ignore_index: integer targets of this value count for nothing.
        reduction: "none", "sum", or "mean" over the logits that count (weighted or not), 0 if none does.
    """
    alpha = check_focal(alpha, gamma)
    logits = at_least_float32(logits)
    if targets.shape == logits.shape:
        targets, counted = element_targets(logits, targets, ignore_index)
        if counted is None and not isinstance(alpha, Tensor) and is_fusable(logits, targets):
            plain = partial(_focal_of_targets, alpha=alpha, gamma=gamma)
            return fused_loss(sigmoid_focal_terms(alpha, gamma), plain, logits, targets, reduction)
        loss = _focal_of_targets(logits, targets, alpha, gamma)
    else:
        index, counted = class_indices(logits, targets, ignore_index)
        axis = class_axis(logits)
        positive, negative = _weights(logits, alpha)
        if isinstance(positive, Tensor):
            positive = positive.expand_as(logits).gather(axis, index)
        loss_of_true = focal_of_error(-logits.gather(axis, index), gamma) * positive
        loss = (focal_of_error(logits, gamma) * negative).scatter(axis, index, loss_of_true)
        counted = counted.expand_as(logits)
    if counted is not None:
        loss = torch.where(counted, loss, 0)
    return reduce_loss(loss, reduction, loss.numel() if counted is None else counted.sum())


def _weights(logits: Tensor, alpha: float | Tensor | None) -> tuple[float | Tensor, float | Tensor]:
    """Of positives and of negatives, to be multiplied with tensors of the logits' shape."""
    if alpha is None:
        return 1.0, 1.0
    positive = along_classes(alpha, logits, "alpha") if isinstance(alpha, Tensor) else alpha
    return positive, 1 - positive


def _focal_of_targets(logits: Tensor, targets: Tensor, alpha: float | Tensor | None, gamma: float) -> Tensor:
    """The plain form, for targets of the logits' shape."""
    wrong = torch.sigmoid(logits) * (1 - targets) + torch.sigmoid(-logits) * targets
    loss = clear_of_zero(wrong) ** gamma * binary_cross_entropy(logits, targets)
    if alpha is None:
        return loss
    positive, negative = _weights(logits, alpha)
    return loss * (positive * targets + negative * (1 - targets))


class SigmoidFocalLoss(LossModule):
    """`sigmoid_focal_loss`, alpha_t (1 - p_t)^gamma (-log p_t): binary and multi-label.

    `alpha=None, gamma=0` is the binary cross entropy, `gamma=0` with an alpha the alpha-balanced one.
    """

    function = staticmethod(sigmoid_focal_loss)

    def __init__(
        self,
        alpha: float | Sequence[float] | Tensor | None = 0.25,
        gamma: float = 2.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        alpha = check_focal(alpha, gamma)
        super().__init__(alpha=alpha, gamma=gamma, ignore_index=ignore_index, reduction=reduction)


def softmax_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | Sequence[float] | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "none",
) -> Tensor:
    """w_y (1 - p_y)^gamma (-log p_y), with p the softmax over the classes and y the true class; one value per position.

    Args:
        logits: (N, C), dense (N, C, d1, d2, ...), or (C) alone. Log-probabilities are logits too.
        targets: class indices (N, d1, ...) or (N, 1, d1, ...); or labels (N, C, d1, ...) of the logits' shape: one-hot,
            soft, or multi-hot. Several labels of a position count as their mean: the sum over classes of
            t_c w_c (1 - p_c)^gamma (-log p_c) with t scaled to the sum 1. A position without any counts for nothing.
        weight: of each class, >= 0.
        gamma: focusing exponent >= 0; 0 is the weighted cross entropy (with indices and no reduction, to the last bit).
        ignore_index: a position whose target has this value counts for nothing.
        reduction: "none", "sum", or "mean", which divides by the sum of the weights w_y of the positions that count, as
            `F.cross_entropy` does with class indices (but not with labels); 0 if none counts.

    Source of 1 / k for each of k labels: Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, ECCV
    2018.
    """
    check_focal(None, gamma)
    axis = class_axis(logits)
    logits = at_least_float32(logits)
    if targets.shape == logits.shape:
        log_p = logits.log_softmax(axis)
        labels, counted = element_targets(log_p, targets, ignore_index)
        if counted is not None:
            labels = labels * counted.all(axis, keepdim=True)
        share = labels / labels.sum(axis, keepdim=True).clamp(min=torch.finfo(labels.dtype).tiny)
    else:
        index, counted = class_indices(logits, targets, ignore_index)
        # Without focusing, this is torch's cross entropy to the last bit.
        log_p = log_softmax_of_classes(logits, index, axis) if gamma else logits.log_softmax(axis).gather(axis, index)
        share = counted.to(log_p.dtype)
    if weight is not None:
        weight = along_classes(per_class(weight, "weight"), logits, "weight").expand_as(logits)
        share = share * (weight if log_p.shape == logits.shape else weight.gather(axis, index))
    log_p = torch.where(share > 0, log_p, 0)  # infinite for a class that is masked out, and 0 times that is NaN
    # -expm1(log p) is 1 - p without the cancellation.
    loss = (share * clear_of_zero(-log_p.expm1()) ** gamma * -log_p).sum(axis)
    return reduce_loss(loss, reduction, share.sum())


class SoftmaxFocalLoss(LossModule):
    """`softmax_focal_loss`, w_y (1 - p_y)^gamma (-log p_y): one of C classes, also per pixel, or several labels.

    `gamma=0` is the cross entropy, with a `weight` the balanced one; on log-probabilities it is nn.NLLLoss.
    """

    function = staticmethod(softmax_focal_loss)

    def __init__(
        self,
        weight: Sequence[float] | Tensor | None = None,
        gamma: float = 2.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        weight = None if weight is None else per_class(weight, "weight")
        check_focal(None, gamma)
        super().__init__(weight=weight, gamma=gamma, ignore_index=ignore_index, reduction=reduction)


def focal_of_error(z: Float[Tensor, "*shape"], gamma: float) -> Float[Tensor, "*shape"]:
    """s^gamma softplus(z) with s = sigmoid(z): the focal loss where z is the logit against the truth (x for a negative,
    -x for a positive), so that s = 1 - p_t and softplus(z) = -log p_t. float32 inside for narrower dtypes."""
    z = at_least_float32(z)
    return clear_of_zero(torch.sigmoid(z)) ** gamma * -F.logsigmoid(-z)


def binary_cross_entropy(logits: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """-y log p - (1 - y) log(1 - p), to the last digits.

    `F.binary_cross_entropy_with_logits` computes x - log sigmoid(x) for y = 0, where two numbers cancel: in float32 it
    is wrong by 0.8 % at x = -10, and 0 from x = -17 on."""
    return -targets * F.logsigmoid(logits) - (1 - targets) * F.logsigmoid(-logits)


def clear_of_zero(base: Tensor) -> Tensor:
    """At 0, a power below 1 has no derivative. Here it gets 0."""
    return base.clamp(min=torch.finfo(base.dtype).tiny)


def check_focal(alpha: float | Tensor | Sequence[float] | None, gamma: float) -> float | Tensor | None:
    """Alpha, as a tensor where there is one per class.

    Raises ValueError unless alpha (or each class's) is None or in [0, 1], and gamma is finite and at least 0."""
    check_range("gamma", gamma)
    if isinstance(alpha, Tensor | Sequence):
        return per_class(alpha, "alpha", high=1.0)
    if alpha is not None:
        check_range("alpha", alpha, 0, 1)
    return alpha


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

    Equals `sigmoid_focal_loss` on the multi-hot targets, which are never built. One pass over the logits, in chunks or
    (with one alpha for all classes) in a Triton kernel, gives the loss and the gradient, which is stored where the
    logits' gradient needs a tensor anyway. A compiler is given the plain formula, which it fuses by itself. The sum is
    float32, or float64 for float64 logits. Shapes never depend on the data. Once differentiable.
    """
    alpha = check_focal(alpha, gamma)
    num_classes = logits.shape[-1]
    if isinstance(alpha, Tensor):
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
