"""The focal loss's successors in detectors: targets that say how well a box fits, weights by gradient density, and
boxes as distributions. Elementwise, from logits, with p = sigmoid(logit) and BCE(p, y) the binary cross entropy.

float32 inside for narrower dtypes; finite with finite gradient for logits of any size and any gamma >= 0. All raise
ValueError for shapes that do not fit and settings out of range. The functions do not check what the targets' values
are, because a detector computes them itself; the modules do.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.losses.common import (
    LossModule,
    SoftTargetLoss,
    at_least_float32,
    check_range,
    fused_loss,
    reduce_loss,
    refuse,
)
from retina.losses.focal import binary_cross_entropy, clear_of_zero
from retina.ops.kernels.elementwise_cpu import Terms, is_fusable, quality_focal_terms, varifocal_terms


def quality_focal_loss(
    logits: Float[Tensor, "*shape"], targets: Float[Tensor, "..."], *, gamma: float = 2.0, reduction: str = "none"
) -> Float[Tensor, "..."]:
    """|y - p|^gamma BCE(p, y): the focal loss for a target y anywhere in [0, 1], such as the IoU of the predicted box.

    On targets 0 and 1 it is the focal loss without alpha; gamma 0 is the binary cross entropy. For gamma < 1 the slope
    is infinite where p meets a soft target; 0 is taken there.
    Source: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 2 (there beta is our gamma).
    """
    check_range("gamma", gamma)
    plain = partial(_quality_focal, gamma=gamma)
    return _reduced(quality_focal_terms(gamma), plain, logits, targets, reduction)


def _quality_focal(logits: Tensor, targets: Tensor, *, gamma: float) -> Tensor:
    return clear_of_zero(_distance(logits, targets)) ** gamma * binary_cross_entropy(logits, targets)


class QualityFocalLoss(SoftTargetLoss):
    """`quality_focal_loss`, |y - p|^gamma BCE(p, y), for targets anywhere in [0, 1]."""

    function = staticmethod(quality_focal_loss)

    def __init__(self, gamma: float = 2.0, *, reduction: str = "mean") -> None:
        check_range("gamma", gamma)
        super().__init__(gamma=gamma, reduction=reduction)


def varifocal_loss(
    logits: Float[Tensor, "*shape"],
    targets: Float[Tensor, "..."],
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Float[Tensor, "..."]:
    """q BCE(p, q) where the target q > 0, alpha p^gamma BCE(p, 0) where it is 0.

    Only negatives are weighted down, also by alpha >= 0; positives count by their quality. The weight carries gradient.
    Source: Zhang et al., VarifocalNet, CVPR 2021, equation 2.
    """
    _check_varifocal(alpha, gamma)
    plain = partial(_varifocal, alpha=alpha, gamma=gamma)
    return _reduced(varifocal_terms(alpha, gamma), plain, logits, targets, reduction)


def _varifocal(logits: Tensor, targets: Tensor, *, alpha: float, gamma: float) -> Tensor:
    negative = alpha * clear_of_zero(torch.sigmoid(logits)) ** gamma
    return torch.where(targets > 0, targets, negative) * binary_cross_entropy(logits, targets)


class VarifocalLoss(SoftTargetLoss):
    """`varifocal_loss`, y BCE(p, y) or alpha p^gamma BCE(p, 0), for targets anywhere in [0, 1]."""

    function = staticmethod(varifocal_loss)

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0, *, reduction: str = "mean") -> None:
        _check_varifocal(alpha, gamma)
        super().__init__(alpha=alpha, gamma=gamma, reduction=reduction)


def _check_varifocal(alpha: float, gamma: float) -> None:
    check_range("alpha", alpha)
    check_range("gamma", gamma)


def ghm_loss(
    logits: Float[Tensor, "*shape"],
    targets: Float[Tensor, "..."],
    valid: Bool[Tensor, "*shape"] | None = None,
    *,
    num_bins: int = 30,
) -> Float[Tensor, "*shape"]:
    """BCE(p, y) / density(g), with g = |p - y| the length of the gradient; 0 where not `valid` (None: all are).

    The density of g is the number of valid elements in its bin of width 1 / num_bins, times num_bins. So elements of
    one bin share the weight of one, however many they are, and the sum of this is the published loss: it is a mean
    already (N cancels), to be divided by nothing. No average over past batches; densities carry no gradient.
    (mmdetection multiplies by the number of bins that are not empty, not by all.)
    Source: Li, Liu and Wang, Gradient Harmonized Single-stage Detector, AAAI 2019, section GHM-C Loss.
    """
    check_range("num_bins", num_bins, 1)
    valid = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid
    if valid.shape != logits.shape:
        raise ValueError(f"valid must have the shape of the logits {list(logits.shape)}, got {list(valid.shape)}")
    logits, targets = _of_one_dtype(logits, targets)
    cross_entropy = binary_cross_entropy(logits, targets)
    bins = gradient_bins(logits.detach(), targets, valid, num_bins)
    counts = torch.zeros(num_bins + 1, dtype=torch.int64, device=logits.device)  # float32 counts up to 2^24
    counts = counts.scatter_add(0, bins.flatten(), counts.new_ones(()).expand(bins.numel()))
    density = (counts * num_bins).clamp(min=1).to(logits.dtype)
    return torch.where(valid, cross_entropy / density[bins], 0)


def gradient_bins(logits: Tensor, targets: Tensor, valid: Tensor, num_bins: int) -> Int64[Tensor, "..."]:
    """The bin of |p - y|, 0..num_bins - 1; `num_bins` for what is not valid."""
    bins = (_distance(logits, targets) * num_bins).long().clamp(max=num_bins - 1)
    return torch.where(valid, bins, num_bins)


class GHMLoss(SoftTargetLoss):
    """The sum of `ghm_loss`, BCE(p, y) / density(|p - y|), over all logits: a mean by itself."""

    function = staticmethod(ghm_loss)

    def __init__(self, num_bins: int = 30) -> None:
        check_range("num_bins", num_bins, 1)
        super().__init__(num_bins=num_bins)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits, targets).sum()


def distribution_focal_loss(
    logits: Float[Tensor, "*shape R"], distances: Float[Tensor, "..."], *, reduction: str = "none"
) -> Float[Tensor, "..."]:
    """-(i + 1 - y) log S_i - (y - i) log S_(i+1), with S the softmax over R bins and i <= y <= i + 1 the bins beside y.

    Draws the distribution to the two bins beside the true distance, in the ratio that makes y its mean.

    Args:
        logits: of the distances 0, 1, ..., R - 1, at least two.
        distances: in bins, clamped to [0, R - 1].

    Source: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 6.
    """
    last = logits.shape[-1] - 1 if logits.dim() else 0
    if last < 1:
        raise ValueError(f"a distribution needs at least 2 bins, got logits of shape {list(logits.shape)}")
    if logits.shape[:-1] != distances.shape:
        raise ValueError(
            f"there must be one distance per distribution, got {list(distances.shape)} for logits of "
            f"shape {list(logits.shape)}"
        )
    log_probability = at_least_float32(logits).log_softmax(dim=-1)
    distances = distances.to(log_probability.dtype).clamp(0, last)
    left = distances.floor().clamp(max=last - 1)
    beside = left.long()[..., None] + torch.arange(2, device=logits.device)
    to_right = distances - left
    loss = -(log_probability.gather(-1, beside) * torch.stack((1 - to_right, to_right), dim=-1)).sum(dim=-1)
    return reduce_loss(loss, reduction, loss.numel())


class DistributionFocalLoss(LossModule):
    """`distribution_focal_loss`, of logits (..., R) over R bins and targets (...) in bins."""

    function = staticmethod(distribution_focal_loss)

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        refuse(targets.isnan(), targets, "targets must be numbers")
        return super().forward(logits, targets)


def _reduced(
    terms: Terms, plain: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, reduction: str
) -> Tensor:
    """The loss from its closed form where that may be, else from the plain one."""
    logits, targets = _of_one_dtype(logits, targets)
    if is_fusable(logits, targets):
        return fused_loss(terms, plain, logits, targets, reduction)
    return reduce_loss(plain(logits, targets), reduction, logits.numel())


def _of_one_dtype(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or float64."""
    if logits.shape != targets.shape:
        raise ValueError(f"targets must have the shape of the logits {list(logits.shape)}, got {list(targets.shape)}")
    logits = at_least_float32(logits)
    return logits, targets.to(logits.dtype)


def _distance(logits: Tensor, targets: Tensor) -> Tensor:
    """|p - y|, to the last digit for y of 0 and 1."""
    return (torch.sigmoid(logits) * (1 - targets) - torch.sigmoid(-logits) * targets).abs()
