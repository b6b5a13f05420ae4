"""Which anchors stand for which objects: rules behind one interface."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from retina._lazy import lazy
from retina.ops.anchors import covered_anchors
from retina.ops.kernels.matching_forms import match_boxes
from retina.ops.matching import check_thresholds
from retina.types import Assignment, Predictions, Targets

if TYPE_CHECKING:  # beside the road
    from retina.ops.adaptive_assigners import ATSS as ATSS
    from retina.ops.adaptive_assigners import TaskAligned as TaskAligned
else:
    __getattr__, __dir__, _ = lazy(__name__)


@runtime_checkable
class Assigner(Protocol):
    """What `DetectionLoss` needs of a rule."""

    def __call__(self, predictions: Predictions, targets: Targets) -> Assignment:
        """`targets` have at least one object, or padding. Nothing is differentiated through a rule. Anchors that are no
        `covered_anchors` should win nothing, so that images do not depend on each other; no loss sees them."""
        ...


@dataclass(frozen=True, kw_only=True)
class MaxIoU:
    """The paper's rule: positive from `positive_iou` on, negative below `negative_iou`, ignored between; with
    `low_quality` every object also gets its best anchors. See `retina.ops.matching`.

    Raises ValueError for thresholds out of order.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4 "Anchors"."""

    positive_iou: float = 0.5
    negative_iou: float = 0.4
    low_quality: bool = True

    def __post_init__(self) -> None:
        check_thresholds(self.positive_iou, self.negative_iou)

    def __call__(self, predictions: Predictions, targets: Targets) -> Assignment:
        index, positive, negative = match_boxes(
            predictions.anchors,
            targets.boxes,
            targets.valid,
            targets.crowd,
            covered_anchors(predictions),
            positive_iou=self.positive_iou,
            negative_iou=self.negative_iou,
            low_quality=self.low_quality,
        )
        return Assignment(index, positive, negative)
