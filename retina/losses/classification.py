"""Classification losses of a detector: sums over all anchors that are positive or negative.

Cross entropy is `Focal(gamma=0, alpha=None)`, alpha-balanced cross entropy `Focal(gamma=0, alpha=0.75)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import nms

from retina.losses.common import check_range
from retina.losses.focal import check_focal, class_focal_loss, focal_of_error
from retina.losses.soft_targets import quality_focal_loss, varifocal_loss
from retina.losses.summed_ghm import summed_ghm_loss
from retina.ops.boxes import pairwise_iou
from retina.types import Assignment, Predictions

Labels = Int64[Tensor, "B A"]
Scalar = Float[Tensor, ""]


@runtime_checkable
class ClassLoss(Protocol):
    """What `DetectionLoss` needs of a classification loss."""

    def __call__(self, predictions: Predictions, labels: Labels, assigned: Assignment) -> Scalar:
        """The sum over anchors and classes; anchors that are neither positive nor negative count for nothing. `labels`
        are those of the objects that the anchors belong to, and say something at positive anchors only.

        A loss whose attribute `needs_target_scores` is true also reads `assigned.target_scores`, then a tensor."""
        ...


@dataclass(frozen=True, kw_only=True)
class Focal:
    """The focal loss (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5).

    Args:
        alpha: weight of positives, 1 - alpha being that of negatives; one number, or one per class; None for weight 1
            on both.
        gamma: focusing exponent; 0 is the (balanced) cross entropy.

    Raises ValueError for values out of range and, when called, for another number of classes than alpha has."""

    alpha: float | Sequence[float] | None = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_focal(self.alpha, self.gamma)

    def __call__(self, predictions: Predictions, labels: Labels, assigned: Assignment) -> Scalar:
        # Level by level: one tensor of all logits would be a second copy of the largest tensor of the step.
        counts = [len(anchors) for anchors in predictions.anchors]
        parts = (part.split(counts, dim=1) for part in (labels, assigned.positive, assigned.negative))
        levels = zip(predictions.logits, *parts, strict=True)
        return torch.stack([class_focal_loss(*level, alpha=self.alpha, gamma=self.gamma) for level in levels]).sum()

    def of_positives(self, logits: Float[Tensor, "B A"], assigned: Assignment) -> Float[Tensor, "B A"]:
        """The loss of anchors as positives of their labels, given the logits of those, without the weight alpha."""
        return focal_of_error(-logits, self.gamma)

    def class_weights(self, ones: Float[Tensor, "K"]) -> tuple[Float[Tensor, "K"], Float[Tensor, "K"]]:
        """Weights of the positives and of the negatives of each class, where `ones` are."""
        if self.alpha is None:
            return ones, ones
        alpha = ones * torch.as_tensor(self.alpha, dtype=ones.dtype).to(ones.device, non_blocking=True)
        return alpha, 1 - alpha


class _QualityLoss:
    """A loss in which positives have a quality: `of_positives` at their labels, and everywhere else the focal loss
    p^gamma BCE(p, 0), times alpha if there is one."""

    gamma: float
    needs_target_scores: ClassVar[bool] = True

    def of_positives(self, logits: Float[Tensor, "B A"], assigned: Assignment) -> Float[Tensor, "B A"]:
        raise NotImplementedError

    def class_weights(self, ones: Float[Tensor, "K"]) -> tuple[Float[Tensor, "K"], Float[Tensor, "K"]]:
        return ones, getattr(self, "alpha", 1.0) * ones

    def __call__(self, predictions: Predictions, labels: Labels, assigned: Assignment) -> Scalar:
        loss = self.of_positives(logits_of_labels(predictions, labels, assigned), assigned)
        of_negatives = Focal(alpha=0.0, gamma=self.gamma)(predictions, labels, assigned)
        return torch.where(assigned.positive, loss, 0).sum() + getattr(self, "alpha", 1.0) * of_negatives


@dataclass(frozen=True, kw_only=True)
class QualityFocal(_QualityLoss):
    """The quality focal loss: |y - p|^gamma BCE(p, y), where y is a positive's target score at its label, 0 elsewhere.

    Args:
        gamma: focusing exponent; 0 is the cross entropy with soft targets.

    Raises ValueError for values out of range.
    Source: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 2."""

    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_focal(None, self.gamma)

    def of_positives(self, logits: Float[Tensor, "B A"], assigned: Assignment) -> Float[Tensor, "B A"]:
        return quality_focal_loss(logits, _target_scores(assigned), gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class Varifocal(_QualityLoss):
    """The varifocal loss: q BCE(p, q) at a positive's label, target score q, and alpha p^gamma BCE(p, 0) elsewhere.

    Args:
        alpha: weight of the negatives.
        gamma: focusing exponent of the negatives.

    Raises ValueError for values out of range.
    Source: Zhang et al., VarifocalNet, CVPR 2021, equation 2."""

    alpha: float = 0.75
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_focal(self.alpha, self.gamma)

    def of_positives(self, logits: Float[Tensor, "B A"], assigned: Assignment) -> Float[Tensor, "B A"]:
        return varifocal_loss(logits, _target_scores(assigned), alpha=self.alpha, gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class GHM:
    """GHM-C: the cross entropy, divided by how many anchors and classes have a gradient of that length.

    The published loss is a mean already. It is multiplied with the batch's positives (at least 1), by which the caller
    divides. One histogram over all images and levels, without memory of earlier batches. Holds a gradient as large as
    the logits, and beside it a part of them at a time.

    Args:
        num_bins: of the histogram of gradient lengths.

    Raises ValueError for no bins.
    Source: Li, Liu and Wang, Gradient Harmonized Single-stage Detector, AAAI 2019, equation 10."""

    num_bins: int = 30

    def __post_init__(self) -> None:
        check_range("num_bins", self.num_bins, 1)

    def __call__(self, predictions: Predictions, labels: Labels, assigned: Assignment) -> Scalar:
        loss = summed_ghm_loss(predictions.logits, labels, assigned, num_bins=self.num_bins)
        return loss * assigned.positive.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class OHEM:
    """Online hard example mining, as the focal loss was compared with it: cross entropy of few anchors per image.

    An anchor is as hard as its cross entropy, summed over classes. From hard to easy, an anchor is taken if it overlaps
    none taken before by more than `nms_iou`, until there are `batch_size`. With `one_to_three`, positives and negatives
    are taken apart: at most a quarter are positives, and three negatives go with each of them (or with none, three).

    Only the 64 x `batch_size` hardest anchors of an image are looked at: of the paper's, none overlaps more than 52
    others by 0.5, so no more are needed. A GPU takes them one by one, in `batch_size` small steps without waiting.

    Args:
        batch_size: anchors taken from one image.

    Raises ValueError for values out of range.
    Source: Shrivastava, Gupta and Girshick, Training Region-based Object Detectors with Online Hard Example Mining,
    CVPR 2016; settings: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, table 2d."""

    batch_size: int = 128
    nms_iou: float = 0.5
    one_to_three: bool = False

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 4)
        check_range("nms_iou", self.nms_iou, 0, 1)

    def __call__(self, predictions: Predictions, labels: Labels, assigned: Assignment) -> Scalar:
        with torch.no_grad():
            logits_of_true = logits_of_labels(predictions, labels, assigned).float()
            hardness = sum_over_classes(predictions, F.softplus) - torch.where(assigned.positive, logits_of_true, 0)
        anchors = torch.cat(list(predictions.anchors))
        positive, negative = assigned.positive, assigned.negative
        if self.one_to_three:
            quarter = self.batch_size // 4
            positive = self._hardest(hardness, positive, anchors, quarter)
            limit = 3 * positive.sum(dim=1, keepdim=True).clamp(min=1)
            negative = self._hardest(hardness, negative, anchors, 3 * quarter, limit)
        else:
            hardest = self._hardest(hardness, positive | negative, anchors, self.batch_size)
            positive, negative = positive & hardest, negative & hardest
        taken = assigned._replace(positive=positive, negative=negative)
        return Focal(alpha=None, gamma=0.0)(predictions, labels, taken)

    @torch.no_grad()
    def _hardest(
        self,
        hardness: Float[Tensor, "B A"],
        eligible: Bool[Tensor, "B A"],
        anchors: Float[Tensor, "A 4"],
        count: int,
        limit: Int64[Tensor, "B 1"] | None = None,
    ) -> Bool[Tensor, "B A"]:
        """The `count` hardest anchors of each image after suppression, or only the first `limit` of them."""
        hardness, index = hardness.masked_fill(~eligible, -torch.inf).topk(min(64 * count, len(anchors)), dim=1)
        boxes, left = anchors[index], hardness > -torch.inf
        on_cpu = left.device.type == "cpu" and not torch.compiler.is_compiling()
        order = (_suppress_on_cpu if on_cpu else _suppress)(boxes, left, count, self.nms_iou)
        taken = order < (count if limit is None else limit)
        return torch.zeros_like(eligible).scatter(1, index, taken)


def _suppress(
    boxes: Float[Tensor, "B P 4"], left: Bool[Tensor, "B P"], count: int, nms_iou: float
) -> Int64[Tensor, "B P"]:
    """0, 1, 2, ... for the first `count` boxes that overlap none before, and `count` or more for all others.

    Boxes come in the order in which they are to be taken; those of `left` alone count."""
    places = torch.arange(left.shape[1], device=left.device)
    order = torch.full_like(places, count).expand_as(left)
    for number in range(count):
        place = torch.where(left, places, len(places)).amin(dim=1, keepdim=True)
        taken = places == place  # nothing where none is left
        box = boxes.gather(1, place.clamp(max=len(places) - 1)[..., None].expand(-1, -1, 4))
        left = left & ~taken & (pairwise_iou(box, boxes)[:, 0] <= nms_iou)
        order = torch.where(taken, number, order)
    return order


def _suppress_on_cpu(
    boxes: Float[Tensor, "B P 4"], left: Bool[Tensor, "B P"], count: int, nms_iou: float
) -> Int64[Tensor, "B P"]:
    """The same, image by image; more boxes are compared only if too few of the first remain."""
    order = torch.full(left.shape, count)
    for image, candidates, available in zip(order, boxes, left.sum(dim=1).tolist(), strict=True):
        num_compared = min(4 * count, available)
        while True:
            falling = -torch.arange(num_compared, dtype=torch.float32)
            survivors = nms(candidates[:num_compared], falling, nms_iou)
            if len(survivors) >= count or num_compared == available:
                break
            num_compared = min(4 * num_compared, available)
        image[survivors] = torch.arange(len(survivors))
    return order


def _target_scores(assigned: Assignment) -> Float[Tensor, "B A"]:
    """Of positives; 0 elsewhere."""
    if assigned.target_scores is None:
        raise ValueError(
            "this loss needs the target scores of positive anchors: an assigner that gives them, or DetectionLoss"
        )
    return torch.where(assigned.positive, assigned.target_scores, 0)


def sum_over_classes(predictions: Predictions, function: Callable[[Tensor], Tensor]) -> Float[Tensor, "B A"]:
    """The sum over the classes of each anchor of a function of the logits, in float32, without a copy of all."""
    on_cpu = predictions.logits[0].device.type == "cpu" and not torch.compiler.is_compiling()
    num_logits = 2**16 if on_cpu else 2**24  # at a time: in the second-level cache, or bounding the memory
    sums = []
    for logits in predictions.logits:
        rows = max(1, num_logits // max(1, len(logits) * logits.shape[-1]))
        sums += [function(part.float()).sum(dim=-1) for part in logits.split(rows, dim=1)]
    return torch.cat(sums, dim=1)


def logits_of_labels(predictions: Predictions, labels: Labels, assigned: Assignment) -> Float[Tensor, "B A"]:
    """The logit of each positive anchor's class; elsewhere, that of the first class."""
    counts = [len(anchors) for anchors in predictions.anchors]
    labels = torch.where(assigned.positive, labels, 0)[..., None]
    levels = zip(predictions.logits, labels.split(counts, dim=1), strict=True)
    return torch.cat([logits.gather(2, classes) for logits, classes in levels], dim=1).squeeze(2)
