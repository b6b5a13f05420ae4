"""Answers to imbalance that are older or simpler than focusing: weights of classes, and hard examples only."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from retina.losses.common import check_range, reduce_loss, refuse
from retina.ops.kernels.elementwise_cpu import is_fusable


def class_balanced_weights(counts: Tensor | Sequence[int], *, beta: float = 0.999) -> Float[Tensor, "C"]:
    """(1 - beta) / (1 - beta^n_c) for a class with n_c examples, scaled to the mean 1: for `weight` of a softmax loss.

    (1 - beta^n) / (1 - beta) is the effective number of n examples that overlap: n for a beta near 1, at most
    1 / (1 - beta). beta 0 weighs all classes alike, beta 1 by inverse frequency. A class without examples gets 0 and
    does not count for the mean.

    Raises ValueError for counts that are negative or all 0, and for beta outside [0, 1].
    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, equations 3 and 5.
    """
    check_range("beta", beta, 0, 1)
    counts = torch.as_tensor(counts).cpu().double()
    refuse(~((counts >= 0) & counts.isfinite()), counts, "counts must be at least 0")
    present = counts > 0
    if counts.dim() != 1 or not present.any():
        raise ValueError(f"counts must be one number of examples per class, not all 0, got shape {list(counts.shape)}")
    if beta == 1:
        effective = counts
    elif beta == 0:
        effective = present.double()
    else:
        effective = -torch.expm1(counts * math.log(beta)) / (1 - beta)
    weights = torch.where(present, 1 / effective, 0)
    return (weights * present.sum() / weights.sum()).float()


def hardest(losses: Float[Tensor, "*shape"], *, fraction: float) -> Bool[Tensor, "*shape"]:
    """The `fraction` of all elements with the greatest loss, rounded up; which of equal ones is open.

    An element with loss 0, such as an ignored one, is never among them. No shape depends on the data.
    Raises ValueError unless the fraction is in (0, 1].
    Source: Shrivastava et al., Training Region-based Object Detectors with Online Hard Example Mining, CVPR 2016 (there
    after NMS of the regions, as `retina.losses.classification.OHEM` has it).
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    return _greatest(losses, math.ceil(fraction * losses.numel())) & (losses > 0)


def hardest_negatives(
    losses: Float[Tensor, "*shape"], positive: Bool[Tensor, "*shape"], *, ratio: float = 3.0
) -> Bool[Tensor, "*shape"]:
    """All positives, and of the others the hardest, at most `ratio` times as many.

    As for `hardest`, elements with loss 0 are left out and no shape depends on the data. Without positives nothing is
    kept. Raises ValueError unless the ratio is finite and at least 0.
    Source: Liu et al., SSD, ECCV 2016, section 2.2 (1:3).
    """
    check_range("ratio", ratio)
    negatives = losses.masked_fill(positive, 0)
    return (positive | _greatest(negatives, positive.sum() * ratio)) & (losses > 0)


def _greatest(losses: Tensor, number: Tensor | int) -> Tensor:
    """A mask of so many of all elements, rounded up. On a CPU they are not sorted, since there the number is known."""
    values = losses.detach().flatten()
    kept = torch.zeros_like(values, dtype=torch.bool)
    if is_fusable(values, values):
        places = values.topk(min(math.ceil(number), len(values)), sorted=False).indices
        return kept.index_fill_(0, places, True).reshape(losses.shape)
    order = values.argsort(descending=True)
    return kept.scatter(0, order, torch.arange(len(order), device=order.device) < number).reshape(losses.shape)


class OHEMLoss(nn.Module):
    """The mean of another loss over its hardest elements (`retina.losses.balance`).

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
        mask = self._kept(losses, targets)
        return reduce_loss(torch.where(mask, losses, 0), "mean", mask.sum())

    def _kept(self, losses: Tensor, targets: Tensor) -> Tensor:
        if self.fraction is not None:
            return hardest(losses, fraction=self.fraction)
        assert self.negatives_per_positive is not None
        if targets.numel() != losses.numel():
            raise ValueError(
                f"targets must be one per value of the loss, got shape {list(targets.shape)} for {list(losses.shape)}"
            )
        positive = (targets > 0) & (targets != getattr(self.loss, "ignore_index", -100))
        return hardest_negatives(losses, positive.reshape(losses.shape), ratio=self.negatives_per_positive)
