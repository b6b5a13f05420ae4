"""The loss family as modules, for any model: in the place of nn.BCEWithLogitsLoss and nn.CrossEntropyLoss.

They hold settings and no state: `state_dict()` is empty, and weights of classes follow the logits' device by
themselves. Settings that do not fit raise ValueError when the module is made, shapes and targets when it is called.
Formulas, kinds of targets and edge cases are told where the functions are, under `retina.ops`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retina.ops.balance import hardest, hardest_negatives
from retina.ops.dice import check_dice, sigmoid_dice_loss, softmax_dice_loss
from retina.ops.focal import check_focal, sigmoid_focal_loss
from retina.ops.loss_common import check_reduction, element_targets, per_class, reduce_loss, refuse
from retina.ops.probabilities import logits_of_sigmoid, logits_of_softmax
from retina.ops.soft_focal import distribution_focal_loss, ghm_loss, quality_focal_loss, varifocal_loss
from retina.ops.softmax_focal import softmax_focal_loss


class _Loss(nn.Module):
    """A function of logits and targets with its settings, which are attributes of the module as well."""

    def __init__(self, function: Callable[..., Tensor], **settings: Any) -> None:
        super().__init__()
        self._function, self._names = function, tuple(settings)
        for name, value in settings.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._function(logits, targets, **self.settings())

    def extra_repr(self) -> str:
        settings = {n: value.tolist() if isinstance(value, Tensor) else value for n, value in self.settings().items()}
        return ", ".join(f"{name}={value}" for name, value in settings.items())


class SigmoidFocalLoss(_Loss):
    """`retina.ops.focal.sigmoid_focal_loss`, alpha_t (1 - p_t)^gamma (-log p_t): binary and multi-label.

    `alpha=None, gamma=0` is the binary cross entropy, `gamma=0` with an alpha the alpha-balanced one.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5.
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
        check_reduction(reduction)
        super().__init__(sigmoid_focal_loss, alpha=alpha, gamma=gamma, ignore_index=ignore_index, reduction=reduction)


class SoftmaxFocalLoss(_Loss):
    """`retina.ops.softmax_focal.softmax_focal_loss`, w_y (1 - p_y)^gamma (-log p_y): one of C classes, also per pixel
    or voxel, or several labels.

    `gamma=0` is the cross entropy, with a `weight` the balanced one; on log-probabilities it is nn.NLLLoss.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5 and footnote 1.
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
        check_reduction(reduction)
        super().__init__(softmax_focal_loss, weight=weight, gamma=gamma, ignore_index=ignore_index, reduction=reduction)


class SigmoidDiceLoss(_Loss):
    """`retina.ops.dice.sigmoid_dice_loss`, 1 - Dice^(1 / beta): one mask per image. Focal Dice with a beta above 1.

    Source: Milletari et al., V-Net, 3DV 2016; Wang and Chung, Focal Dice Loss, DLMIA 2018."""

    def __init__(
        self, beta: float = 1.0, *, smooth: float = 1.0, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        check_dice(beta, smooth)
        check_reduction(reduction)
        super().__init__(sigmoid_dice_loss, beta=beta, smooth=smooth, ignore_index=ignore_index, reduction=reduction)


class SoftmaxDiceLoss(_Loss):
    """`retina.ops.dice.softmax_dice_loss`, 1 - Dice^(1 / beta): one mask per image and class. Focal Dice with a beta
    above 1.

    Source: Milletari et al., V-Net, 3DV 2016; Wang and Chung, Focal Dice Loss, DLMIA 2018."""

    def __init__(
        self, beta: float = 1.0, *, smooth: float = 1.0, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        check_dice(beta, smooth)
        check_reduction(reduction)
        super().__init__(softmax_dice_loss, beta=beta, smooth=smooth, ignore_index=ignore_index, reduction=reduction)


class FocalPlusDiceLoss(nn.Module):
    """focal(logits, targets) + dice_weight dice(logits, targets): pixels and their overlap.

    Source: Zhu et al., AnatomyNet, Medical Physics 2019.
    """

    def __init__(self, focal: nn.Module, dice: nn.Module, *, dice_weight: float = 1.0) -> None:
        super().__init__()
        if not 0 <= dice_weight < float("inf"):
            raise ValueError(f"dice_weight must be finite and at least 0, got {dice_weight}")
        self.focal, self.dice, self.dice_weight = focal, dice, dice_weight

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        focal, dice = self.focal(logits, targets), self.dice(logits, targets)
        if focal.shape != dice.shape:
            raise ValueError("there is no sum of one focal loss per pixel and one Dice loss per mask: reduce both")
        return focal + self.dice_weight * dice


class FromSigmoid(nn.Module):
    """Another loss, for a model that ends in a sigmoid: it is given probabilities instead of logits, and takes
    log p - log(1 - p) for them (`retina.ops.probabilities`)."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        return self.loss(logits_of_sigmoid(probabilities), targets)


class FromSoftmax(nn.Module):
    """Another loss, for a model that ends in a softmax: it is given probabilities instead of logits, and takes log p
    for them (`retina.ops.probabilities`)."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        return self.loss(logits_of_softmax(probabilities), targets)


class OHEMLoss(nn.Module):
    """The mean of another loss over its hardest elements (`retina.ops.balance`).

    Args:
        loss: of one value per element, such as `SoftmaxFocalLoss(gamma=0.0, reduction="none")`.
        fraction: of all elements, the ignored too, so many of the hardest are kept.
        negatives_per_positive: instead, all positives (targets above 0) and so many times as many of the hardest
            negatives are; 3 in SSD.

    Source: Shrivastava et al., CVPR 2016 (fraction); Liu et al., SSD, ECCV 2016, section 2.2 (negatives_per_positive).
    """

    def __init__(
        self, loss: nn.Module, *, fraction: float | None = None, negatives_per_positive: float | None = None
    ) -> None:
        super().__init__()
        if (fraction is None) == (negatives_per_positive is None):
            raise ValueError("either fraction or negatives_per_positive must be given")
        self.loss, self.fraction, self.negatives_per_positive = loss, fraction, negatives_per_positive
        self._kept(torch.zeros(1), torch.zeros(1))  # settings out of range are refused here already

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = self.loss(logits, targets)
        if losses.dim() == 0 and logits.dim() > 0:
            raise ValueError("the loss whose hardest elements are kept must have reduction='none'")
        kept = self._kept(losses, targets)
        return reduce_loss(torch.where(kept, losses, 0), "mean", kept.sum())

    def _kept(self, losses: Tensor, targets: Tensor) -> Tensor:
        if self.fraction is not None:
            return hardest(losses, fraction=self.fraction)
        assert self.negatives_per_positive is not None
        if targets.numel() != losses.numel():
            raise ValueError(
                "positives and negatives are told apart by one target per loss: targets of shape "
                f"{list(targets.shape)} are not those of losses of shape {list(losses.shape)}"
            )
        positive = (targets > 0) & (targets != getattr(self.loss, "ignore_index", -100))
        return hardest_negatives(losses, positive.reshape(losses.shape), ratio=self.negatives_per_positive)


class _SoftTargets(_Loss):
    """A function of every logit and its target in [0, 1]."""

    def __init__(self, function: Callable[..., Tensor], reduction: str, **settings: Any) -> None:
        check_reduction(reduction)
        function(torch.zeros(0), torch.zeros(0), **settings)  # settings out of range are refused here already
        super().__init__(function, **settings)
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets, _ = element_targets(logits, targets)
        return reduce_loss(super().forward(logits, targets), self.reduction, logits.numel())


class QualityFocalLoss(_SoftTargets):
    """`retina.ops.soft_focal.quality_focal_loss`, |y - p|^gamma BCE(p, y), for targets anywhere in [0, 1].

    Source: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 2."""

    def __init__(self, gamma: float = 2.0, *, reduction: str = "mean") -> None:
        super().__init__(quality_focal_loss, reduction, gamma=gamma)


class VarifocalLoss(_SoftTargets):
    """`retina.ops.soft_focal.varifocal_loss`, y BCE(p, y) or alpha p^gamma BCE(p, 0), for targets anywhere in [0, 1].

    Source: Zhang et al., VarifocalNet, CVPR 2021, equation 2."""

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0, *, reduction: str = "mean") -> None:
        super().__init__(varifocal_loss, reduction, alpha=alpha, gamma=gamma)


class GHMLoss(_SoftTargets):
    """The sum of `retina.ops.soft_focal.ghm_loss`, BCE(p, y) / density(|p - y|), over all logits: a mean by itself.

    Source: Li, Liu and Wang, Gradient Harmonized Single-stage Detector, AAAI 2019, section GHM-C Loss."""

    def __init__(self, num_bins: int = 30) -> None:
        super().__init__(_ghm, "sum", num_bins=num_bins)


def _ghm(logits: Tensor, targets: Tensor, *, num_bins: int) -> Tensor:
    return ghm_loss(logits, targets, torch.ones_like(logits, dtype=torch.bool), num_bins=num_bins)


class DistributionFocalLoss(nn.Module):
    """`retina.ops.soft_focal.distribution_focal_loss`, the cross entropy of the two bins beside y in the ratio that
    makes y their mean, of logits (..., R) over R bins and targets (...) in bins.

    Source: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 6."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        refuse(targets.isnan(), targets, "targets must be numbers")
        loss = distribution_focal_loss(logits, targets)
        return reduce_loss(loss, self.reduction, loss.numel())
