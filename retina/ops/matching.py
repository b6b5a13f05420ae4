"""Which object each anchor is responsible for: the rule on a matrix of IoUs; and on boxes, without that matrix."""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor

from retina.ops.anchors import Anchors
from retina.ops.boxes import box_area, intersection_over_union, pairwise_intersection, pairwise_iou


class Matches(NamedTuple):
    """One entry per anchor. An anchor that is neither positive nor negative is ignored: it teaches nothing."""

    index: Int64[Tensor, "*batch A"]  # type: ignore[assignment]  # the field's word; tuple.index is no loss
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
    """Assigns every anchor to its best object, to the background or to nobody.

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
        nothing = torch.zeros(iou.shape[:-1], dtype=torch.bool, device=iou.device)
        return Matches(nothing.long(), nothing, ~nothing)

    iou = iou.masked_fill(~valid[..., None, :], -1.0)
    best, index = iou.max(dim=-1)
    positive = best >= positive_iou
    negative = best < negative_iou
    if low_quality and iou.shape[-2] > 0:
        best_of_object = iou.amax(dim=-2, keepdim=True)
        unreachable = best_of_object.masked_fill(best_of_object <= 0, torch.inf)
        rescued = (iou == unreachable).any(dim=-1)
        positive = positive | rescued
        negative = negative & ~rescued
    return Matches(index, positive, negative)


def match_boxes(
    anchors: tuple[Float[Tensor, "_ 4"], ...],
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    crowd: Bool[Tensor, "B M"],
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    low_quality: bool = True,
) -> Matches:
    """`match` of the anchors of all levels together [B A] with the valid boxes of each image, and the rule for crowds.

    An anchor that is not positive, and has at least `positive_iou` of its own area inside one crowd region, is ignored.
    Where an anchor is not positive, its index may be any. Boxes are finite.

    The result is the same to the last bit, however it is reached: on a CPU through windows in the grid of the anchors,
    if they are `Anchors`; on a GPU in Triton's kernels, where there is Triton; else from the matrix. To a dispatcher or
    compiler it is one operation, whose shapes depend on the shapes of its arguments alone.
    """
    check_thresholds(positive_iou, negative_iou)
    grid = []
    if isinstance(anchors, Anchors):
        grid = [
            number
            for (height, width), stride in zip(anchors.shapes, anchors.strides, strict=True)
            for number in (height, width, stride)
        ]
    return Matches(*_match_boxes(list(anchors), grid, boxes, valid, crowd, positive_iou, negative_iou, low_quality))


@torch.library.custom_op(
    "retina::match_boxes",
    mutates_args=(),
    schema="(Tensor[] anchors, int[] grid, Tensor boxes, Tensor valid, Tensor crowd, "
    "float positive_iou, float negative_iou, bool low_quality) -> (Tensor, Tensor, Tensor)",
)
def _match_boxes(
    anchors: list[Tensor],
    grid: list[int],
    boxes: Tensor,
    valid: Tensor,
    crowd: Tensor,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = boxes, valid, crowd, positive_iou, negative_iou, low_quality
    if boxes.is_cuda and _triton_is_there():
        from retina.ops.kernels.matching import match_on_gpu

        return match_on_gpu(torch.cat(anchors), *arguments)
    if boxes.device.type == "cpu" and grid:
        shapes = tuple(zip(grid[0::3], grid[1::3], strict=True))
        return match_in_windows(Anchors(anchors, shapes, tuple(grid[2::3])), *arguments)
    return _match_in_matrix(torch.cat(anchors), *arguments)


@_match_boxes.register_fake
def _shapes_of_matches(
    anchors: list[Tensor], grid: list[int], boxes: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    shape = len(boxes), sum(map(len, anchors))
    index = boxes.new_empty(shape, dtype=torch.int64)
    return index, torch.empty_like(index, dtype=torch.bool), torch.empty_like(index, dtype=torch.bool)


def _match_in_matrix(
    anchors: Float[Tensor, "A 4"],
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    crowd: Bool[Tensor, "B M"],
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"], Bool[Tensor, "B A"]]:
    area = box_area(anchors)
    # Objects first: [B M A] has the long axis innermost, and is seen as [B A M] by `match`.
    intersection = pairwise_intersection(boxes, anchors)
    in_crowd = ((intersection >= positive_iou * area) & crowd[..., None]).any(dim=1)
    iou = intersection_over_union(intersection, box_area(boxes), area)
    del intersection
    index, positive, negative = match(
        iou.mT, valid, positive_iou=positive_iou, negative_iou=negative_iou, low_quality=low_quality
    )
    return index, positive, negative & ~in_crowd


@lru_cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None


def check_thresholds(positive_iou: float, negative_iou: float) -> None:
    """Raises ValueError unless 0 <= negative_iou <= positive_iou <= 1 and positive_iou > 0."""
    if not (0 <= negative_iou <= positive_iou <= 1 and positive_iou > 0):
        raise ValueError(
            "need 0 <= negative_iou <= positive_iou <= 1 and positive_iou > 0, "
            f"got negative_iou {negative_iou} and positive_iou {positive_iou}"
        )


# Anchors that are compared with every object of their image at a time: bounds the memory.
# Matching on a CPU, where the anchors stand on grids: only pairs that can count are looked at.
#
# IoU = i / (area_g + area_a - i), so an IoU of t between an object g and an anchor a takes an intersection i of at
# least
#
#     need = t / (1 + t) (area_g + area_a).
#
# The boxes share at most min(h_g, h_a) along y, hence at least need / min(h_g, h_a) along x, and the other way round.
# Of the anchors of one shape on one level, only those around a small rectangle of cells do: the window. Of 201,600
# anchors x 50 objects, a few thousand pairs remain.
#
# In numpy, as the number of pairs depends on the data; the overlaps themselves come from `retina.ops.boxes`.
_CHUNK = 4096


class _Grids(NamedTuple):
    """Where the anchors stand, one entry for each shape of anchor on each level (S = 45 for 9 on 5 levels)."""

    anchor: Float[ndarray, "S 4"]
    """The one around cell (0, 0)."""
    cells: Int64[ndarray, "S 2"]
    """Columns and rows."""
    stride: Int64[ndarray, "S"]
    first: Int64[ndarray, "S"]
    """Position of `anchor` among the anchors of all levels."""
    step: Int64[ndarray, "S"]
    """Positions from one cell to the next."""


class _Pairs(NamedTuple):
    """Boxes and anchors that may share enough, by ascending box."""

    box: Int64[ndarray, "P"]
    """Row of the boxes."""
    position: Int64[ndarray, "P"]
    """Of the anchor, among the anchors of all levels."""
    anchor: Float[ndarray, "P 4"]


def match_in_windows(
    anchors: Anchors,
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    crowd: Bool[Tensor, "B M"],
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"], Bool[Tensor, "B A"]]:
    """Index, positive and negative of `retina.ops.matching.match_boxes`, the same as from the whole matrix."""
    grids, num_anchors = _grids(anchors), sum(map(len, anchors))
    image, number = valid.numpy().nonzero()
    objects = boxes.numpy()[image, number]
    # Below this IoU, an anchor is what it would be without any overlap.
    floor = negative_iou if negative_iou > 0 else positive_iou
    least = np.full((len(objects), 1), floor)
    if low_quality:
        least = np.minimum(least, _iou_nearby(grids, objects))
    pairs = _pairs(grids, objects, least / (1 + least) * (_area(objects)[:, None] + _area(grids.anchor)))
    iou = _overlap(pairwise_iou, pairs.anchor, objects[pairs.box])

    # Places are those of [B A] in a row. As in `match`, the best IoU of an image without objects is -1.
    place = image[pairs.box] * num_anchors + pairs.position
    best = np.repeat(valid.numpy().any(axis=1).astype(iou.dtype) - 1, num_anchors)
    np.maximum.at(best, place, iou)
    index = np.zeros(len(best), dtype=np.int64)
    winners = np.flatnonzero(iou == best[place])[::-1]  # of equals, the first object is written last
    index[place[winners]] = number[pairs.box[winners]]
    positive, negative = best >= positive_iou, best < negative_iou
    if low_quality:
        best_of_object = np.zeros(len(objects), dtype=iou.dtype)
        np.maximum.at(best_of_object, pairs.box, iou)
        rescued = np.flatnonzero((iou == best_of_object[pairs.box]) & (iou > 0))
        positive[place[rescued]], negative[place[rescued]] = True, False
        # Below the floor, another object may overlap such an anchor more, without a window that reaches as low.
        rescued = rescued[best[place[rescued]] < floor]
        index[place[rescued]] = _best_objects(pairs.anchor[rescued], image[pairs.box[rescued]], boxes, valid)
    negative[_inside_crowds(grids, num_anchors, boxes.numpy(), crowd.numpy(), positive_iou)] = False
    shape = len(boxes), num_anchors
    return tuple(torch.from_numpy(part.reshape(shape)) for part in (index, positive, negative))  # type: ignore


def _grids(anchors: Anchors) -> _Grids:
    around_origin, rows, first = [], [], 0
    for level, (height, width), stride in zip(anchors, anchors.shapes, anchors.strides, strict=True):
        step = len(level) // max(1, height * width)
        around_origin.append(level[:step].numpy())
        rows += [(width, height, stride, first + n, step) for n in range(step)]
        first += len(level)
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    return _Grids(np.concatenate(around_origin), table[:, :2], table[:, 2], table[:, 3], table[:, 4])


def _anchor_at(grids: _Grids, grid: Int64[ndarray, "*n"], cell: Int64[ndarray, "*n 2"]) -> Float[ndarray, "*n 4"]:
    """The anchor of a grid around cell (column, row), in the arithmetic of `AnchorGenerator`."""
    centre = (cell * grids.stride[grid][..., None]).astype(grids.anchor.dtype)
    return grids.anchor[grid] + np.concatenate((centre, centre), axis=-1)


def _iou_nearby(grids: _Grids, objects: Float[ndarray, "N 4"]) -> Float[ndarray, "N 1"]:
    """A lower bound of each object's highest IoU with any anchor: the highest with those nearest to its centre."""
    to_centre = (objects[:, None, :2] + objects[:, None, 2:] - grids.anchor[:, :2] - grids.anchor[:, 2:]) / 2
    cell = np.rint(to_centre / grids.stride[:, None]).clip(0, grids.cells - 1).astype(np.int64)
    anchor = _anchor_at(grids, np.broadcast_to(np.arange(len(grids.anchor)), cell.shape[:2]), cell)
    return _overlap(pairwise_iou, anchor, objects[:, None]).max(axis=1, initial=0, keepdims=True)


def _pairs(grids: _Grids, boxes: Float[ndarray, "N 4"], need: Float[ndarray, "N S"]) -> _Pairs:
    """All pairs whose intersection is at least `need`, and a few others. Boxes without area have none."""
    boxes, around_origin = boxes.astype(np.float64), grids.anchor.astype(np.float64)
    sides, anchor_sides = boxes[:, 2:] - boxes[:, :2], around_origin[:, 2:] - around_origin[:, :2]
    # Pixels, far more than float32 shifts an anchor's corners; as a share of its sides, more than it changes an IoU.
    slack = 2.0**-20 * (grids.cells * grids.stride[:, None] + np.abs(around_origin).max(axis=1, keepdims=True))
    need = need * (1 - np.minimum(1, 4 * (slack / np.maximum(anchor_sides, slack)).sum(axis=1)))
    shared = np.minimum(sides[:, None], anchor_sides)
    box, grid = ((need <= shared.prod(axis=-1)) & (shared > 0).all(axis=-1)).nonzero()

    share = need[box, grid, None] / shared[box, grid, ::-1]
    low = boxes[box, :2] + share - around_origin[grid, 2:] - slack[grid]
    high = boxes[box, 2:] - share - around_origin[grid, :2] + slack[grid]
    stride = grids.stride[grid, None]
    corner = np.ceil(low / stride).clip(0, grids.cells[grid]).astype(np.int64)
    columns, rows = (np.floor(high / stride).clip(-1, grids.cells[grid] - 1).astype(np.int64) + 1 - corner).clip(0).T

    count = columns * rows
    window = np.repeat(np.arange(len(count)), count)
    row, column = np.divmod(np.arange(len(window)) - (np.cumsum(count) - count)[window], columns[window])
    cell, grid = corner[window] + np.stack((column, row), axis=-1), grid[window]
    position = grids.first[grid] + (cell[:, 1] * grids.cells[grid, 0] + cell[:, 0]) * grids.step[grid]
    return _Pairs(box[window], position, _anchor_at(grids, grid, cell))


def _best_objects(
    anchor: Float[ndarray, "N 4"],
    image: Int64[ndarray, "N"],
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
) -> Int64[ndarray, "N"]:
    """The object of highest IoU, the first among equals, of all in the anchor's image."""
    best = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(anchor), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        iou = _overlap(pairwise_iou, anchor[chunk, None], boxes.numpy()[image[chunk]])
        best.append(np.where(valid.numpy()[image[chunk]], iou, -1).argmax(axis=1))
    return np.concatenate(best)


def _inside_crowds(
    grids: _Grids,
    num_anchors: int,
    boxes: Float[ndarray, "B M 4"],
    crowd: Bool[ndarray, "B M"],
    covered: float,
) -> Int64[ndarray, "N"]:
    """Places in [B A] of the anchors with at least this share of their area in one crowd region."""
    image, number = crowd.nonzero()
    regions = boxes[image, number]
    pairs = _pairs(grids, regions, np.broadcast_to(covered * _area(grids.anchor), (len(regions), len(grids.anchor))))
    inside = _overlap(pairwise_intersection, pairs.anchor, regions[pairs.box]) >= covered * _area(pairs.anchor)
    return image[pairs.box[inside]] * num_anchors + pairs.position[inside]


def _overlap(
    pairwise: Callable[[Tensor, Tensor], Tensor], boxes1: Float[ndarray, "*#n 4"], boxes2: Float[ndarray, "*#n 4"]
) -> Float[ndarray, "*n"]:
    """A function of `retina.ops.boxes`, box by box."""
    one, other = torch.from_numpy(boxes1), torch.from_numpy(boxes2)
    return pairwise(one[..., None, :], other[..., None, :])[..., 0, 0].numpy()


def _area(boxes: Float[ndarray, "*n 4"]) -> Float[ndarray, "*n"]:
    return box_area(torch.from_numpy(boxes)).numpy()
