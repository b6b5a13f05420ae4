"""Which object each anchor is responsible for: `match` says the rule, on a matrix of IoUs, and `match_in_matrix` adds
that for crowds. `retina.ops.kernels.matching_forms.match_boxes` gives the same without such a matrix where it can."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.ops.boxes import box_area, intersection_over_union, pairwise_intersection


class Matches(NamedTuple):
    """One entry per anchor. An anchor that is neither positive nor negative is ignored: no loss sees it."""

    index: Int64[Tensor, "*batch A"]  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """The object of highest IoU, the first among equals. Meaningful where positive; in 0..M-1 everywhere if M > 0."""
    positive: Bool[Tensor, "*batch A"]
    negative: Bool[Tensor, "*batch A"]


def match(
    iou: Float[Tensor, "*batch A M"],
    valid: Bool[Tensor, "*batch M"],
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    low_quality: bool = True,
) -> Matches:
    """Assigns every anchor to its best object or to the background, or ignores it.

    With v the anchor's highest IoU over valid objects: positive if v >= `positive_iou`, negative if v < `negative_iou`,
    ignored between. With `low_quality`, all anchors that tie for the best IoU of some valid object are positive too, as
    long as that IoU is above 0; they keep their own best object, which need not be the one that made them positive.
    Without valid objects (or with M = 0) every anchor is negative.

    Equal to torchvision's and detectron2's Matcher, except for an object that overlaps no anchor at all: there, all
    anchors "tie" at IoU 0 and would become positive; here that object matches none.

    The layout of `iou` is free: a transposed [M A] matrix is the faster one. Shapes never depend on the data.
    Raises ValueError for thresholds out of order, see `check_thresholds`.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4; low-quality matches: Ren et al.,
    Faster R-CNN, NeurIPS 2015, section 3.1.2, rule (i).
    """
    check_thresholds(positive_iou, negative_iou)
    if iou.shape[-1] == 0:
        none = torch.zeros(iou.shape[:-1], dtype=torch.bool, device=iou.device)
        return Matches(none.long(), none, ~none)

    iou = iou.masked_fill(~valid[..., None, :], -1.0)
    best, index = iou.max(dim=-1)
    positive = best >= positive_iou
    negative = best < negative_iou
    if low_quality and iou.shape[-2] > 0:
        best_of_object = iou.amax(dim=-2, keepdim=True)
        unreachable = best_of_object.masked_fill(best_of_object <= 0, torch.inf)
        best_of_some = (iou == unreachable).any(dim=-1)
        positive = positive | best_of_some
        negative = negative & ~best_of_some
    return Matches(index, positive, negative)


def match_in_matrix(
    anchors: Float[Tensor, "A 4"],
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    crowd: Bool[Tensor, "B M"],
    inside: Bool[Tensor, "B A"] | None,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
) -> Matches:
    """`match` of the anchors of all levels together with the valid boxes of each image, and the rule for crowds: an
    anchor that is not positive, and has at least `positive_iou` of its own area inside one crowd region, is ignored.
    So is one that is not `inside`, as if it did not exist."""
    area = box_area(anchors)
    # Objects first: [B M A] has the long axis innermost, and is seen as [B A M] by `match`.
    intersection = pairwise_intersection(boxes, anchors)
    if inside is not None:
        intersection = intersection.masked_fill_(~inside[:, None], 0)
    in_crowd = ((intersection >= positive_iou * area) & crowd[..., None]).any(dim=1)
    iou = intersection_over_union(intersection, box_area(boxes), area)
    del intersection
    index, positive, negative = match(
        iou.mT, valid, positive_iou=positive_iou, negative_iou=negative_iou, low_quality=low_quality
    )
    return Matches(index, positive, negative & ~in_crowd if inside is None else negative & ~in_crowd & inside)


def check_thresholds(positive_iou: float, negative_iou: float) -> None:
    """Raises ValueError unless 0 <= negative_iou <= positive_iou <= 1 and positive_iou > 0."""
    if not (0 <= negative_iou <= positive_iou <= 1 and positive_iou > 0):
        raise ValueError(
            "need 0 <= negative_iou <= positive_iou <= 1 and positive_iou > 0, "
            f"got negative_iou {negative_iou} and positive_iou {positive_iou}"
        )
