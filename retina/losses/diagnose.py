"""What the classification loss is made of, summed up cheaply while a detector trains.

An element is one class of one anchor that is positive or negative: positive for the class of the anchor's object,
negative for every other. p_t is the probability that is given to an element's truth.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from retina.losses.classification import (
    ClassLoss,
    Focal,
    Labels,
    QualityFocal,
    Scalar,
    Varifocal,
    logits_of_labels,
    sum_over_classes,
)
from retina.losses.detection import DetectionLoss
from retina.types import Assignment, Predictions

# Where the prior holds, the loss is about that of the prior and negatives score about the prior. With biases of 0 they
# score 50 times a prior of 0.01; with some outliers among the logits, the loss alone is far off.
_LOSS_TIMES = 10.0
_SCORE_TIMES = 4.0

Summand = Focal | QualityFocal | Varifocal
"""Losses that are a sum over elements, each by itself."""


class Diagnosis:
    """Takes the place of a criterion's classification loss: it returns what that returns, and adds up `diagnose` on the
    way, so that anchors need not be matched twice. Nothing is added up without gradients: `train_step` looks ahead so.
    """

    def __init__(self, classification: ClassLoss, *, prior: float) -> None:
        """`prior`: the score that a new head gives to every anchor."""
        self.classification, self.prior = classification, prior
        self.needs_target_scores = getattr(classification, "needs_target_scores", False)
        self.sums: Float[Tensor, "_"] | None = None
        """Of all batches so far, of this process alone, still on the device; None without any."""

    def __call__(self, predictions: Predictions, labels: Labels, assigned: Assignment) -> Scalar:
        loss = self.classification(predictions, labels, assigned)
        if not torch.is_grad_enabled():
            return loss
        known = loss if isinstance(self.classification, Summand) else None
        sums = diagnose(self.classification, predictions, labels, assigned, prior=self.prior, loss=known)
        self.sums = sums if self.sums is None else self.sums + sums
        return loss


def with_diagnosis(criterion: DetectionLoss, *, prior: float) -> tuple[DetectionLoss, Diagnosis]:
    """A criterion of the same losses, and the diagnosis that it adds up on the way."""
    diagnosis = Diagnosis(criterion.classification, prior=prior)
    return replace(criterion, classification=diagnosis), diagnosis


@torch.no_grad()
def diagnose(
    classification: ClassLoss,
    predictions: Predictions,
    labels: Labels,
    assigned: Assignment,
    *,
    prior: float,
    loss: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "_"]:
    """Sums that may be added over batches and processes, for `summarize`.

    In this order: positive elements, their p_t, negative elements, their scores (1 - p_t), the loss of the positives,
    of all, and of all if every score were `prior`; then the positive anchors of each level.

    The losses are those of a focal, quality focal or varifocal loss, and plain cross entropy beside any other: what
    OHEM or GHM make of an element depends on all others. `loss` is that of all elements, where it is known. float32; no
    shape depends on the data; no level of logits is copied whole on a CPU.
    """
    summand = classification if isinstance(classification, Summand) else Focal(alpha=None, gamma=0.0)
    counts = [len(anchors) for anchors in predictions.anchors]
    positive, counted = assigned.positive, assigned.positive | assigned.negative
    of_level = [part.sum(dtype=torch.float32) for part in positive.split(counts, dim=1)]

    logits_of_true = logits_of_labels(predictions, labels, assigned).float()
    p_t = torch.where(positive, logits_of_true.sigmoid(), 0).sum()
    scores = torch.where(counted, sum_over_classes(predictions, torch.sigmoid), 0).sum()
    num_positives, num_counted = torch.stack(of_level).sum(), counted.sum(dtype=torch.float32)
    num_negatives = num_counted * predictions.logits[0].shape[-1] - num_positives
    at_start = torch.full_like(logits_of_true, math.log(prior) - math.log1p(-prior))
    labels = torch.where(positive, labels, 0)
    ones = logits_of_true.new_ones(predictions.logits[0].shape[-1])
    positive_weight, negative_weight = summand.class_weights(ones)
    positives_loss, from_prior = (
        torch.where(positive, positive_weight[labels] * summand.of_positives(logits, assigned), 0).sum()
        for logits in (logits_of_true, at_start)
    )
    weight_of_negatives = num_counted * negative_weight.sum() - torch.where(positive, negative_weight[labels], 0).sum()
    at_prior = from_prior + weight_of_negatives * prior**summand.gamma * -math.log1p(-prior)
    if loss is None:
        loss = summand(predictions, labels, assigned)
    return torch.stack(
        [num_positives, p_t, num_negatives, scores - p_t, positives_loss, loss.detach().float(), at_prior, *of_level]
    )


def summarize(sums: Sequence[float], levels: Sequence[int]) -> dict[str, float]:
    """What to log of the sums of `diagnose`; what cannot be said without positives is left out.

    `p_t_positives` and `p_t_negatives`, means over elements; `loss_share_of_positives`; `loss_over_prior`, the loss
    over that of a head that gives every anchor the prior (1 at the start, if the initialisation is as in the paper);
    `positives_p3` and so on: positive anchors of each level."""
    num_positives, p_t, num_negatives, scores, positives_loss, loss, at_prior, *of_level = sums
    summary: dict[str, float] = {}
    if num_positives:
        summary |= {
            "p_t_positives": p_t / num_positives,
            "loss_share_of_positives": positives_loss / loss if loss else 0.0,
        }
    if num_negatives:
        summary["p_t_negatives"] = 1 - scores / num_negatives
    if at_prior:
        summary["loss_over_prior"] = loss / at_prior
    return summary | {f"positives_p{level}": count for level, count in zip(levels, of_level, strict=True)}


def prior_is_lost(summary: dict[str, float], prior: float) -> str | None:
    """A warning if the first steps of training do not start from the prior, given what `summarize` says of them.

    With biases of 0 instead of -log((1 - prior) / prior), the loss of all easy negatives together is hundreds of times
    that of the positives, and the first updates only unlearn it, or diverge (Lin et al., Focal Loss for Dense Object
    Detection, ICCV 2017, section 3.3)."""
    ratio, score = summary.get("loss_over_prior", 1.0), 1 - summary.get("p_t_negatives", 1.0)
    if not (ratio > _LOSS_TIMES or score > _SCORE_TIMES * prior):  # NaN is reported elsewhere
        return None
    return (
        f"the prior-probability initialisation is lost: negatives score {score:.2g} instead of {prior:g}, and the "
        f"classification loss is {ratio:,.1f} times what that would give - give the head's last bias "
        "-log((1 - prior) / prior) again, or model.prior the value that it was made with"
    )
