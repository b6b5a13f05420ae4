"""One operation for `retina.ops.matching.match_in_matrix` and the faster forms of it."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retina.ops.anchors import Anchors
from retina.ops.matching import Matches, check_thresholds, match_in_matrix


def match_boxes(
    anchors: tuple[Float[Tensor, "_ 4"], ...],
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    crowd: Bool[Tensor, "B M"],
    inside: Bool[Tensor, "B A"] | None = None,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    low_quality: bool = True,
) -> Matches:
    """`match` of the anchors of all levels together [B A] with the valid boxes of each image, and the rule for crowds.

    An anchor that is not positive, and has at least `positive_iou` of its own area inside one crowd region, is ignored.
    So is one that is not `inside`, as if it did not exist; None: all are. Where an anchor is not positive, its index
    may be any. Boxes are finite.

    Three forms give the same to the last bit: on a CPU windows in the grid of the anchors, if they are `Anchors`; on a
    GPU Triton's kernels, where Triton is installed; else the matrix. To a dispatcher or compiler this is one operation,
    whose shapes depend on the shapes of its arguments alone.
    """
    check_thresholds(positive_iou, negative_iou)
    grid: list[int] = []  # height, width and stride of each level: an operation takes flat lists only
    if isinstance(anchors, Anchors):
        levels = zip(anchors.shapes, anchors.strides, strict=True)
        grid = [number for (height, width), stride in levels for number in (height, width, stride)]
    rule = positive_iou, negative_iou, low_quality
    return Matches(*_match_boxes(list(anchors), grid, boxes, valid, crowd, inside, *rule))


@torch.library.custom_op(
    "retina::match_boxes",
    mutates_args=(),
    schema="(Tensor[] anchors, int[] grid, Tensor boxes, Tensor valid, Tensor crowd, "
    "Tensor? inside, float positive_iou, float negative_iou, bool low_quality) -> (Tensor, Tensor, Tensor)",
)
def _match_boxes(
    anchors: list[Tensor], grid: list[int], boxes: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if boxes.is_cuda and _triton_is_there():
        from retina.ops.kernels.matching import match_on_gpu

        return match_on_gpu(torch.cat(anchors), boxes, *arguments)
    if boxes.device.type == "cpu" and grid:
        from retina.ops.kernels.matching_cpu import match_in_windows

        shapes = tuple(zip(grid[0::3], grid[1::3], strict=True))
        return match_in_windows(Anchors(anchors, shapes, tuple(grid[2::3])), boxes, *arguments)
    return match_in_matrix(torch.cat(anchors), boxes, *arguments)


@_match_boxes.register_fake
def _shapes_of_matches(
    anchors: list[Tensor], grid: list[int], boxes: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    shape = len(boxes), sum(map(len, anchors))
    index = boxes.new_empty(shape, dtype=torch.int64)
    return index, torch.empty_like(index, dtype=torch.bool), torch.empty_like(index, dtype=torch.bool)


@lru_cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None
