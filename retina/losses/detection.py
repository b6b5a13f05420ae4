"""The training criterion: match anchors with objects, then a loss on classes and a box loss on the positives.

Everything is batched over images, and no shape or branch depends on the data, so a GPU never waits for Python.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from retina.losses.boxes import BoxLoss, smooth_l1
from retina.losses.classification import ClassLoss, Focal
from retina.ops.assigners import Assigner, MaxIoU
from retina.types import Assignment, Losses, Predictions, Targets


@dataclass(frozen=True, kw_only=True)
class DetectionLoss:
    """RetinaNet's criterion. Returns sums: dividing by the positives of the whole optimizer step is the caller's part.

    Anchors of all levels are matched together per image (see `retina.ops.matching.match_boxes`), since an object's best
    anchor is its best over all levels. An anchor that is not positive for an object, and has at least `positive_iou` of
    its own area inside one crowd region, is ignored: nobody knows what is there (COCO scores crowds by the same ratio).

    Without objects, in an image or the whole batch (M = 0 too), the losses and gradients are finite and the box loss is
    0. Computed in float32 for narrower predictions.

    Args:
        assigner: which anchors stand for which objects.
        classification: loss of the class logits.
        box_loss: `smooth_l1`, `giou` or any callable like them.
        box_weight: factor of the box loss.

    Raises ValueError for hyper-parameters out of range.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, sections 3 and 4.
    """

    assigner: Assigner = field(default_factory=MaxIoU)
    classification: ClassLoss = field(default_factory=Focal)
    box_loss: BoxLoss = smooth_l1
    box_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("assigner", "classification", "box_loss"):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a callable, got {getattr(self, name)!r}")
        if not 0 <= self.box_weight < float("inf"):
            raise ValueError(f"box_weight must be finite and at least 0, got {self.box_weight}")

    def __call__(self, predictions: Predictions, targets: Targets) -> Losses:
        if targets.boxes.shape[1] == 0:
            targets = _with_one_padding(targets)
        assigned = self.assigner(predictions, targets)
        labels = targets.labels.gather(1, assigned.matched)
        classification = self.classification(predictions, labels, assigned)

        deltas, anchors = torch.cat(predictions.deltas, dim=1), torch.cat(list(predictions.anchors))
        return Losses(
            classification=classification,
            box=self.box_weight * self._box(deltas, anchors, targets.boxes, assigned),
            num_positives=assigned.positive.sum(dtype=torch.float32),
        )

    def _box(
        self,
        deltas: Float[Tensor, "B A 4"],
        anchors: Float[Tensor, "A 4"],
        boxes: Float[Tensor, "B M 4"],
        assigned: Assignment,
    ) -> Float[Tensor, ""]:
        """Sum of the box loss over the positive anchors."""
        matched, positive = assigned.matched, assigned.positive
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        if deltas.device.type == "cpu" and not torch.compiler.is_compiling():
            # Only the few that count. By way of numpy, since elsewhere their number would have to be waited for.
            image, anchor = (torch.from_numpy(indices) for indices in positive.numpy().nonzero())
            chosen = boxes[image, matched[image, anchor]]
            return self.box_loss(deltas[image, anchor].to(dtype), anchors[anchor], chosen).sum()
        # Masked before and after: a wild delta of an anchor that does not count must not put NaN into the gradient.
        deltas = torch.where(positive[..., None], deltas, 0).to(dtype)
        chosen = boxes.gather(1, matched[..., None].expand(-1, -1, 4))
        return torch.where(positive, self.box_loss(deltas, anchors, chosen), 0).sum()


def _with_one_padding(targets: Targets) -> Targets:
    """A batch without any object, as one whose only object is padding: nothing after this needs to know."""
    boxes, labels, valid, crowd = targets
    return Targets(F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1)), F.pad(valid, (0, 1)), F.pad(crowd, (0, 1)))
