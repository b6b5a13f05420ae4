"""The focal loss: the plain formula, and a closed form for class labels that costs little more than reading the logits.

With z the logit against the truth (x for a negative, -x for a positive), s = sigmoid(z) and a = 1 - alpha or alpha:

    loss        L     = a s^gamma softplus(z)
    derivative  dL/dz = a s^gamma (gamma (1 - s) softplus(z) + s)

Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5 and appendix B.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements per thread and chunk on CPU: a handful of float32 buffers of this size stay in the second-level cache.
_CHUNK = 2**16


def sigmoid_focal_loss(
    logits: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"], *, alpha: float | None = 0.25, gamma: float = 2.0
) -> Float[Tensor, "*shape"]:
    """Focal loss of every element: alpha_t (1 - p_t)^gamma CE, with p_t the probability of the truth.

    Args:
        targets: multi-hot, or soft in [0, 1].
        alpha: weight of positives, 1 - alpha being that of negatives; None for weight 1 on both.
        gamma: focusing exponent >= 0; 0 is the binary cross entropy.

    float32 inside for narrower dtypes. Value and gradient are finite for logits of any size and for 0 < gamma < 1,
    where the slope of (1 - p_t)^gamma is infinite at p_t = 1.
    """
    check_focal(alpha, gamma)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    # 1 - p_t without the cancellation, and away from 0, where a power below 1 has no derivative.
    wrong = torch.sigmoid(logits) * (1 - targets) + torch.sigmoid(-logits) * targets
    loss = wrong.clamp(min=torch.finfo(wrong.dtype).tiny) ** gamma * cross_entropy
    return loss if alpha is None else loss * (alpha * targets + (1 - alpha) * (1 - targets))


def class_focal_loss(
    logits: Float[Tensor, "*batch A K"],
    labels: Int64[Tensor, "*batch A"],
    positive: Bool[Tensor, "*batch A"],
    negative: Bool[Tensor, "*batch A"],
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Sum of the focal loss over the K classes of every anchor that is positive or negative.

    A positive anchor is a positive of its label's class and a negative of the others; a negative anchor is a negative
    of all; other anchors count for nothing. Labels are read at positive anchors only and must be in 0..K-1 there.

    Equals `sigmoid_focal_loss` on the multi-hot targets, which are never built: loss and gradient come from one pass
    over the logits, in chunks on CPU, and the gradient takes the place the logits' gradient needs anyway. float32
    inside for narrower dtypes; the sum is float32, or float64 for float64 logits. Shapes never depend on the data. Once
    differentiable.
    """
    check_focal(alpha, gamma)
    num_classes = logits.shape[-1]
    counted = (positive | negative).reshape(-1, 1)
    positive = positive.reshape(-1, 1)
    labels = torch.where(positive, labels.reshape(-1, 1), 0)
    weights = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    arguments = (logits.reshape(-1, num_classes), labels, positive, counted, *weights, gamma)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _ClassFocalLoss.apply(*arguments)
    return _sum_over_chunks(*arguments, grad=None)


class _ClassFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> Tensor:
        # Half precision waits for the loss scale in `backward`: without it, the gradients of easy negatives underflow.
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        grad = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        loss = _sum_over_chunks(logits, *arguments, grad=grad)
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # Nobody else will read the buffer unless the graph is retained, so it becomes the logits' gradient without a
        # copy.
        grad = grad * upstream if _graph_is_retained() else grad.mul_(upstream)
        return grad.to(ctx.dtype), None, None, None, None, None, None


def _graph_is_retained() -> bool:
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _sum_over_chunks(
    logits: Float[Tensor, "N K"],
    labels: Int64[Tensor, "N 1"],
    positive: Bool[Tensor, "N 1"],
    counted: Bool[Tensor, "N 1"],
    positive_weight: float,
    negative_weight: float,
    gamma: float,
    *,
    grad: Float[Tensor, "N K"] | None,
) -> Float[Tensor, ""]:
    """The loss; its gradient is written into `grad`. On a GPU there is one chunk, and a compiler fuses by itself."""
    rows = max(1, logits.shape[0])
    if not torch.compiler.is_compiling() and logits.device.type == "cpu":
        rows = max(1, _CHUNK * torch.get_num_threads() // logits.shape[1])
    losses = []
    for start in range(0, max(1, logits.shape[0]), rows):
        chunk = slice(start, start + rows)
        x, label, is_positive = logits[chunk], labels[chunk], positive[chunk]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = counted[chunk] * negative_weight

        # Every element as a negative; then the one element of each positive anchor's own class anew.
        value, slope = _value_and_slope(x, gamma)
        positive_value, positive_slope = _value_and_slope(-x.gather(1, label), gamma)
        value.scatter_(1, label, value.gather(1, label).masked_fill(is_positive, 0))
        losses.append((value.sum(dim=1, keepdim=True) * weight).sum())
        losses.append(positive_weight * (positive_value * is_positive).sum())
        if grad is not None:
            out = torch.mul(slope, weight, out=grad[chunk])
            own = torch.where(is_positive, -positive_weight * positive_slope, out.gather(1, label))
            out.scatter_(1, label, own.to(out.dtype))
    return torch.stack(losses).sum()


def _value_and_slope(z: Float[Tensor, "N k"], gamma: float) -> tuple[Float[Tensor, "N k"], Float[Tensor, "N k"]]:
    """The two formulas at the top of this file, without a. In place: this reads and writes memory, nothing else."""
    s = torch.sigmoid(z)
    power = s.pow(gamma)
    value = F.softplus(z, threshold=40).mul_(power)  # above the default threshold of 20 it would be short by 2e-9
    slope = power.mul_(s)
    slope.addcmul_(s.sub_(1), value, value=-gamma)
    return value, slope


def check_focal(alpha: float | None, gamma: float) -> None:
    """Raises ValueError unless alpha is None or in [0, 1], and gamma is finite and at least 0."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1] or None, got {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be finite and at least 0, got {gamma}")
