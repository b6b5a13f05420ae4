"""The sigmoid focal loss: binary and multi-label, for targets of any kind. `class_focal` is its fast sum in a detector.

Source of all here: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equations 1 to 5.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from retina.ops.loss_common import (
    along_classes,
    as_tensor,
    at_least_float32,
    class_axis,
    class_indices,
    element_targets,
    per_class,
    reduce_loss,
)


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

    Args:
        logits: of any shape with targets of the same shape, or (N, C, d1, d2, ...) with class indices.
        targets: of the logits' shape: floating-point in [0, 1] (multi-hot, or soft), bool, or integers 0 and 1. Or
            class indices (N, d1, ...) or (N, 1, d1, ...): the logit of that class is a positive, the other C - 1 are
            negatives; no one-hot tensor is built.
        alpha: weight of positives, 1 - alpha being that of negatives; one number, or one per class; None for weight 1
            on both.
        gamma: focusing exponent >= 0; 0 is the (balanced) binary cross entropy.
        ignore_index: integer targets of this value count for nothing.
        reduction: "none", "sum", or "mean" over the logits that count (weighted or not), 0 if none does.

    A soft target y has CE = -y log p - (1 - y) log(1 - p), 1 - p_t = y (1 - p) + (1 - y) p and alpha_t likewise.
    float32 inside for narrower dtypes. Value and gradient are finite for logits of any size and for 0 < gamma < 1,
    where the slope of (1 - p_t)^gamma is infinite at p_t = 1.

    Raises ValueError for shapes that do not fit, values out of range, and alpha of the wrong length. Targets are looked
    at on a CPU only; see `retina.ops.loss_common` for what happens elsewhere.
    """
    check_focal(alpha, gamma)
    logits = at_least_float32(logits)
    positive: float | Tensor
    if isinstance(alpha, Tensor | Sequence):
        positive = along_classes(as_tensor(alpha), logits, "alpha")
    else:
        positive = 1.0 if alpha is None else alpha
    negative = 1.0 if alpha is None else 1 - positive
    if targets.shape == logits.shape:
        targets, counted = element_targets(logits, targets, ignore_index)
        wrong = torch.sigmoid(logits) * (1 - targets) + torch.sigmoid(-logits) * targets
        loss = clear_of_zero(wrong) ** gamma * binary_cross_entropy(logits, targets)
        if alpha is not None:
            loss = loss * (positive * targets + negative * (1 - targets))
    else:
        index, counted = class_indices(logits, targets, ignore_index)
        axis = class_axis(logits)
        if isinstance(positive, Tensor):
            positive = positive.expand_as(logits).gather(axis, index)
        own = focal_of_error(-logits.gather(axis, index), gamma) * positive
        loss = (focal_of_error(logits, gamma) * negative).scatter(axis, index, own)
        counted = counted.expand_as(logits)
    if counted is not None:
        loss = torch.where(counted, loss, 0)
    return reduce_loss(loss, reduction, loss.numel() if counted is None else counted.sum())


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


def check_focal(alpha: float | Tensor | Sequence[float] | None, gamma: float) -> None:
    """Raises ValueError unless alpha (or each class's) is None or in [0, 1], and gamma is finite and at least 0."""
    if isinstance(alpha, Tensor | Sequence):
        per_class(alpha, "alpha", most=1.0)
    elif alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1] or None, got {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be finite and at least 0, got {gamma}")
