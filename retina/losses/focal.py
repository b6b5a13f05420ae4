"""The focal loss: of a sigmoid (binary, multi-label) and of a softmax (one of C classes), for targets of any kind.

`class_focal` is the fast sum of the first in a detector.

Source of all here: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equations 1 to 5.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from retina.losses.common import (
    LossModule,
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
    at on a CPU only; see `retina.losses.common` for what happens elsewhere.
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
        loss_of_true = focal_of_error(-logits.gather(axis, index), gamma) * positive
        loss = (focal_of_error(logits, gamma) * negative).scatter(axis, index, loss_of_true)
        counted = counted.expand_as(logits)
    if counted is not None:
        loss = torch.where(counted, loss, 0)
    return reduce_loss(loss, reduction, loss.numel() if counted is None else counted.sum())


class SigmoidFocalLoss(LossModule):
    """`sigmoid_focal_loss`, alpha_t (1 - p_t)^gamma (-log p_t): binary and multi-label.

    `alpha=None, gamma=0` is the binary cross entropy, `gamma=0` with an alpha the alpha-balanced one.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] | Tensor | None = 0.25,
        gamma: float = 2.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        if isinstance(alpha, Sequence | Tensor):
            alpha = per_class(alpha, "alpha", most=1.0)
        check_focal(alpha, gamma)
        super().__init__(sigmoid_focal_loss, alpha=alpha, gamma=gamma, ignore_index=ignore_index, reduction=reduction)


def softmax_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
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
        reduction: "none", "sum", or "mean", which as in `F.cross_entropy` with class indices divides by the sum of the
            weights w_y of the positions that count, not by their number; 0 if none counts. Labels are divided by the
            same, so that one-hot and index are one loss. (`F.cross_entropy` divides those by the number of positions.)

    float32 inside for narrower dtypes. Value and gradient are finite for logits of any size and any gamma >= 0. Indices
    build no one-hot tensor.

    Raises ValueError for shapes that do not fit, values out of range, and a weight of the wrong length. Targets are
    looked at on a CPU only; see `retina.losses.common` for what happens elsewhere.

    Sources: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5 and footnote 1 (many classes);
    Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, ECCV 2018 (1 / k for each of k labels).
    """
    check_focal(None, gamma)
    axis = class_axis(logits)
    log_p = at_least_float32(logits).log_softmax(axis)
    if weight is not None:
        per_class(weight, "weight")
        weight = along_classes(weight, log_p, "weight").expand_as(log_p)
    if targets.shape == logits.shape:
        labels, counted = element_targets(log_p, targets, ignore_index)
        if counted is not None:
            labels = labels * counted.all(axis, keepdim=True)
        share = labels / labels.sum(axis, keepdim=True).clamp(min=torch.finfo(labels.dtype).tiny)
    else:
        index, counted = class_indices(logits, targets, ignore_index)
        share, log_p = counted.to(log_p.dtype), log_p.gather(axis, index)
        weight = None if weight is None else weight.gather(axis, index)
    if weight is not None:
        share = share * weight
    log_p = torch.where(share > 0, log_p, 0)  # infinite for a class that is masked out, and 0 times that is NaN
    # -expm1(log p) is 1 - p without the cancellation.
    loss = (share * clear_of_zero(-log_p.expm1()) ** gamma * -log_p).sum(axis)
    return reduce_loss(loss, reduction, share.sum())


class SoftmaxFocalLoss(LossModule):
    """`softmax_focal_loss`, w_y (1 - p_y)^gamma (-log p_y): one of C classes, also per pixel or voxel,
    or several labels.

    `gamma=0` is the cross entropy, with a `weight` the balanced one; on log-probabilities it is nn.NLLLoss.
    """

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
        super().__init__(softmax_focal_loss, weight=weight, gamma=gamma, ignore_index=ignore_index, reduction=reduction)


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
