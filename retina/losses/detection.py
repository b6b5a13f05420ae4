"""The training criterion: match anchors with objects, then a loss on classes and a box loss on the positives.

Everything is batched over images, and no shape or branch depends on the data, so a GPU never waits for Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from retina.losses.boxes import BoxLoss, smooth_l1
from retina.losses.classification import ClassLoss, Focal
from retina.losses.common import check_range
from retina.losses.soft_targets import distribution_focal_loss
from retina.ops.anchors import Anchors, covered_anchors
from retina.ops.assigners import Assigner, MaxIoU
from retina.ops.boxes import decode, encode_distances, paired_iou
from retina.types import Assignment, Losses, Predictions, Targets


@dataclass(frozen=True, kw_only=True)
class DetectionLoss:
    """RetinaNet's criterion. Returns sums, and what the caller divides them by over the whole optimizer step.

    Anchors of all levels are matched together per image (`retina.ops.matching`), because an object's best
    anchor is its best over all levels. An anchor that is not positive and has at least `positive_iou` of its own area
    inside one crowd region (half of it with other assigners than `MaxIoU`) is ignored, as COCO scores crowds.

    Anchors on cells that no image covers (`Predictions.sizes`) are ignored too: so the loss of an image does not depend
    on the others of its batch.

    What the head predicts of its boxes' fit (`quality`) and as distributions (`bins`) is trained at the positives. The
    loss of the one is added to that of the classes, as both make the score, the loss of the other to the box loss.

    An assigner that gives target scores itself (`TaskAligned`) thereby weighs the box and distribution losses, and
    their sum takes the place of the number of positives. With `box_weighting` the weights of these two losses are
    others, and they are divided by the sum of weights.

    Without objects, in an image or the whole batch (M = 0 too), the losses and gradients are finite and the box loss is
    0. Computed in float32 for narrower predictions.

    Args:
        assigner: which anchors stand for which objects.
        classification: loss of the class logits. If its `needs_target_scores` is true, and the assigner gave none, the
            target score is the IoU of each positive's predicted box with its object.
        box_loss: `smooth_l1`, `giou` or any callable like them.
        box_weight: factor of the box loss.
        box_weighting: weights of the positives in the box and distribution losses: the `centerness` of the anchor in
            its object (ATSS), or its `score`, the highest it predicts of any class (GFL). None: the assigner's target
            scores, or 1.
        quality: what the quality branch predicts: the `centerness` of the anchor in its object, or the `iou` of its
            predicted box. None: the head has no such branch.
        quality_weight: factor of the branch's binary cross entropy.
        distribution_weight: factor of the distribution focal loss, averaged over the four sides. None: the head
            predicts no distributions.
        warm_start: another of these, which `at` gives for the first `warm_start_share` of a run. TOOD begins with ATSS,
            because the first predictions say nothing of which anchors are good.

    Raises ValueError for hyper-parameters out of range and, when called, for a head that they do not fit.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, sections 3 and 4; centerness: Tian et al.,
    FCOS, ICCV 2019, equation 3; distributions and weights by score: Li et al., Generalized Focal Loss, NeurIPS 2020,
    section 3; divisors: the authors' code, which is in mmdetection (atss_head.py, gfl_head.py, tood_head.py).
    """

    assigner: Assigner = field(default_factory=MaxIoU)
    classification: ClassLoss = field(default_factory=Focal)
    box_loss: BoxLoss = smooth_l1
    box_weight: float = 1.0
    box_weighting: Literal["centerness", "score"] | None = None
    quality: Literal["centerness", "iou"] | None = None
    quality_weight: float = 1.0
    distribution_weight: float | None = None
    warm_start: "DetectionLoss | None" = None
    warm_start_share: float = 1 / 3

    def __post_init__(self) -> None:
        for name in ("assigner", "classification", "box_loss"):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a callable, got {getattr(self, name)!r}")
        self.box_loss(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4))  # raises for settings out of range
        for name in ("box_weight", "quality_weight", "distribution_weight"):
            check_range(name, getattr(self, name) or 0)
        check_range("warm_start_share", self.warm_start_share, 0, 1)
        if self.quality not in ("centerness", "iou", None):
            raise ValueError(f"quality must be centerness, iou or None, got {self.quality!r}")
        if self.box_weighting not in ("centerness", "score", None):
            raise ValueError(f"box_weighting must be centerness, score or None, got {self.box_weighting!r}")

    def __call__(self, predictions: Predictions, targets: Targets) -> Losses:
        self.check_head(quality=predictions.quality is not None, bins=predictions.bins is not None)
        if predictions.bins is not None and not isinstance(predictions.anchors, Anchors):
            raise ValueError("distributions need anchors that know their strides (retina.ops.anchors.Anchors)")
        targets = pad_if_empty(targets)
        assignment = _without_padding(predictions, self.assigner(predictions, targets))
        scores = assignment.target_scores
        positives = _Positives(predictions, targets, assignment)
        weights = self._box_weights(predictions, positives, scores)
        if scores is None and getattr(self.classification, "needs_target_scores", False):
            assignment = assignment._replace(target_scores=positives.among_anchors(positives.iou()))
        labels = targets.labels.gather(1, assignment.matched)
        box = self.box_loss(positives.deltas, positives.anchors, positives.boxes)
        box = self.box_weight * positives.sum(box, weights)
        if self.distribution_weight is not None:
            box = box + self.distribution_weight * positives.sum(_distribution_loss(predictions, positives), weights)
        classification = self.classification(predictions, labels, assignment)
        if self.quality:
            quality = positives.sum(self._quality_loss(predictions, positives))
            classification = classification + self.quality_weight * quality
        num_positives = (assignment.positive if scores is None else scores).sum(dtype=torch.float32)
        box_normalizer = positives.sum(weights) if self.box_weighting and weights is not None else None
        return Losses(classification, box, num_positives, box_normalizer)

    def at(self, progress: float) -> "DetectionLoss":
        """The criterion for this point of a run, from 0 to 1."""
        return self.warm_start if self.warm_start is not None and progress < self.warm_start_share else self

    def check_head(self, *, quality: bool, bins: bool) -> None:
        """Raises ValueError unless these losses and a head with or without a quality branch and distributions fit."""
        if self.quality and not quality:
            raise ValueError(
                f"quality is {self.quality!r}, but the head has no quality branch (model.head_quality=true)"
            )
        if quality and not self.quality:
            raise ValueError("the head has a quality branch, which nothing trains: set quality to centerness or iou")
        if self.distribution_weight is not None and not bins:
            raise ValueError("distribution_weight is set, but the head predicts no distributions (model.box_bins=17)")
        if bins and self.distribution_weight is None:
            raise ValueError(
                "the head predicts distributions, which nothing trains: set distribution_weight (0.25 in Generalized "
                "Focal Loss), or take another head (model=retinanet)"
            )

        if self.warm_start is not None:
            self.warm_start.check_head(quality=quality, bins=bins)

    def check_classes(self, num_classes: int) -> None:
        """Raises ValueError for a list of alphas that is longer or shorter."""
        if self.warm_start is not None:
            self.warm_start.check_classes(num_classes)
        alpha = getattr(self.classification, "alpha", None)
        if isinstance(alpha, Sequence) and len(alpha) != num_classes:
            raise ValueError(f"classification.alpha has {len(alpha)} values for {num_classes} classes")

    def _box_weights(
        self, predictions: Predictions, positives: "_Positives", target_scores: Float[Tensor, "B A"] | None
    ) -> Float[Tensor, "*p"] | None:
        """Without a gradient; None where every positive counts 1."""
        if self.box_weighting == "centerness":
            return positives.centerness()
        if self.box_weighting == "score":
            highest = torch.cat([logits.detach().amax(dim=-1) for logits in predictions.logits], dim=1)
            return positives.take(highest).sigmoid()
        return None if target_scores is None else positives.take(target_scores)

    def _quality_loss(self, predictions: Predictions, positives: "_Positives") -> Float[Tensor, "*p"]:
        assert predictions.quality is not None
        logits = positives.take(torch.cat(predictions.quality, dim=1))
        targets = positives.iou() if self.quality == "iou" else positives.centerness()
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _distribution_loss(predictions: Predictions, positives: "_Positives") -> Float[Tensor, "*p"]:
    assert predictions.bins is not None
    assert isinstance(predictions.anchors, Anchors)
    levels = zip(predictions.anchors, predictions.anchors.strides, strict=True)
    strides = positives.of_anchors(torch.cat([level.new_full((len(level), 1), stride) for level, stride in levels]))
    logits = positives.take(torch.cat(predictions.bins, dim=1))
    distances = encode_distances(positives.boxes, positives.anchors) / strides
    return distribution_focal_loss(logits, distances).mean(dim=-1)


def _without_padding(predictions: Predictions, assignment: Assignment) -> Assignment:
    """The assignment, in which anchors beyond the images' content are ignored."""
    inside = covered_anchors(predictions)
    if inside is None:
        return assignment
    return assignment._replace(positive=assignment.positive & inside, negative=assignment.negative & inside)


class _Positives:
    """The positive anchors of a batch: on a CPU the few themselves [P]; elsewhere every anchor [B A], masked before and
    after, so that no shape depends on the data and nothing is waited for."""

    def __init__(self, predictions: Predictions, targets: Targets, assignment: Assignment) -> None:
        self._mask, self._indices = assignment.positive, None
        if self._mask.device.type == "cpu" and not torch.compiler.is_compiling():
            # By way of numpy, since elsewhere their number would have to be waited for.
            self._indices = tuple(torch.from_numpy(indices) for indices in self._mask.numpy().nonzero())
            image, anchor = self._indices
            self.boxes = targets.boxes[image, assignment.matched[image, anchor]]
        else:
            self.boxes = targets.boxes.gather(1, assignment.matched[..., None].expand(-1, -1, 4))
        self.deltas = self.take(torch.cat(predictions.deltas, dim=1))
        self.anchors = self.of_anchors(torch.cat(list(predictions.anchors)))

    def take(self, values: Float[Tensor, "B A *n"]) -> Float[Tensor, "..."]:
        """What is predicted of them. Masked, since a wild value elsewhere must not put NaN into the gradient."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        if self._indices:
            return values[self._indices].to(dtype)
        mask = self._mask.reshape(*self._mask.shape, *[1] * (values.ndim - 2))
        return torch.where(mask, values, 0).to(dtype)

    def of_anchors(self, values: Float[Tensor, "A n"]) -> Float[Tensor, "*p n"]:
        """What is known of anchors, whatever their image."""
        return values[self._indices[1]] if self._indices else values

    def sum(self, losses: Float[Tensor, "*p"], weights: Float[Tensor, "*p"] | None = None) -> Float[Tensor, ""]:
        if weights is not None:
            losses = losses * weights
        return losses.sum() if self._indices else torch.where(self._mask, losses, 0).sum()

    def among_anchors(self, values: Float[Tensor, "*p"]) -> Float[Tensor, "B A"]:
        """Values of the positives among all anchors, 0 elsewhere."""
        if not self._indices:
            return torch.where(self._mask, values, 0)
        return torch.zeros(self._mask.shape, dtype=values.dtype).index_put(self._indices, values)

    def iou(self) -> Float[Tensor, "*p"]:
        """Of the predicted boxes with their objects, without a gradient."""
        with torch.no_grad():  # not as a decorator, which torch 2.14 cannot compile on a method
            return paired_iou(decode(self.deltas, self.anchors), self.boxes)

    def centerness(self) -> Float[Tensor, "*p"]:
        """1 for an anchor in the middle of its object, 0 on its border and outside."""
        before, after = encode_distances(self.boxes, self.anchors).split(2, dim=-1)
        x, y = (torch.minimum(before, after).clamp(min=0) / torch.maximum(before, after).clamp(min=1e-6)).unbind(-1)
        return (x * y).sqrt()


def pad_if_empty(targets: Targets) -> Targets:
    """The targets; where there is neither object nor crowd, one row of padding: an assigner needs a row to choose."""
    if targets.boxes.shape[1]:
        return targets
    boxes, labels, valid, crowd = targets
    return Targets(F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1)), F.pad(valid, (0, 1)), F.pad(crowd, (0, 1)))
