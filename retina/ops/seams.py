"""Detections of overlapping tiles put together: what an edge cuts counts only where nothing whole covers it. Beside the
road."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import batched_nms

from retina.ops.boxes import box_area, pairwise_intersection
from retina.types import Detections

_AT_EDGE = 0.01
"""Of a tile's side: a box that comes so near to an edge is taken for cut, because boxes are not exact."""
_SAME = 0.5
"""Of the smaller of two boxes, of which one is cut: so much in common, and they are one object."""


def is_cut(boxes: Float[Tensor, "D 4"], window: tuple[int, int, int, int], size: tuple[int, int]) -> Bool[Tensor, "D"]:
    """Whether boxes, in pixels of their tile, come near to an edge of it that is not the image's.

    window: top, left, bottom, right of the tile in an image of `size` (height, width)."""
    top, left, bottom, right = window
    height, width = bottom - top, right - left
    near_y, near_x = max(1.0, _AT_EDGE * height), max(1.0, _AT_EDGE * width)
    cut = torch.zeros(len(boxes), dtype=torch.bool)
    for inside, reaches in (
        (left > 0, boxes[:, 0] <= near_x),
        (top > 0, boxes[:, 1] <= near_y),
        (right < size[1], boxes[:, 2] >= width - near_x),
        (bottom < size[0], boxes[:, 3] >= height - near_y),
    ):
        cut |= reaches if inside else False
    return cut


def merge(
    detections: Detections, cut: Bool[Tensor, "D"], *, nms_iou: float, class_agnostic: bool = False
) -> Detections:
    """One detection of each object, best first. Whole ones suppress each other as in `postprocess`; a cut one stays
    only where no better one of its class covers half of the smaller of both."""
    boxes, scores, labels = detections
    groups = torch.zeros_like(labels) if class_agnostic else labels
    whole = (~cut).nonzero().squeeze(1)
    kept = whole[batched_nms(boxes[whole].double(), scores[whole].double(), groups[whole], nms_iou)]
    areas = box_area(boxes)
    stays = torch.zeros_like(cut).index_fill(0, kept, True)
    pieces = cut.nonzero().squeeze(1)
    for row in pieces[scores[pieces].argsort(descending=True, stable=True)].tolist():
        others = (stays & (groups == groups[row])).nonzero().squeeze(1)
        shared = pairwise_intersection(boxes[row : row + 1], boxes[others])[0]
        stays[row] = not (shared > _SAME * torch.minimum(areas[row], areas[others])).any()
    chosen = stays.nonzero().squeeze(1)
    chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
    return Detections(boxes[chosen], scores[chosen], labels[chosen])
