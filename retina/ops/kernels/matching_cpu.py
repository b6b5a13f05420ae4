"""Matching on a CPU, where the anchors stand on grids: only pairs of anchor and object that can count are compared.

IoU = i / (area_g + area_a - i), so an IoU of t between an object g and an anchor a takes an intersection i of at least

    need = t / (1 + t) (area_g + area_a).

The boxes share at most min(h_g, h_a) along y, hence at least need / min(h_g, h_a) along x, and the other way round. Of
the anchors of one shape on one level, only those around a small rectangle of cells do: the window. Of 201,600 anchors x
50 objects, a few thousand pairs remain.

In numpy, because the number of pairs depends on the data; the overlaps themselves come from `retina.ops.boxes`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor

from retina.ops.anchors import Anchors
from retina.ops.boxes import box_area, pairwise_intersection, pairwise_iou

# Anchors that are compared with every object of their image at a time: bounds the memory.
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
    inside: Bool[Tensor, "B A"] | None,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"], Bool[Tensor, "B A"]]:
    """Index, positive and negative of `match_boxes`, the same as from the whole matrix."""
    grids, num_anchors = _grids(anchors), sum(map(len, anchors))
    image, number = valid.numpy().nonzero()
    objects = boxes.numpy()[image, number]
    # Below this IoU, an anchor is what it would be without any overlap.
    lowest = negative_iou if negative_iou > 0 else positive_iou
    threshold = np.full((len(objects), 1), lowest)
    exists = None if inside is None else inside.numpy()
    if low_quality:
        threshold = np.minimum(threshold, _iou_nearby(grids, objects, None if exists is None else exists[image]))
    areas = _area(objects)[:, None] + _area(grids.anchor)
    pairs = _pairs(grids, objects, need=threshold / (1 + threshold) * areas)
    if exists is not None:
        pairs = _Pairs(*(part[exists[image[pairs.box], pairs.position]] for part in pairs))
    iou = _elementwise(pairwise_iou, pairs.anchor, objects[pairs.box])

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
        # Such an anchor may overlap another object more, whose window does not reach as low as `lowest`.
        rescued = rescued[best[place[rescued]] < lowest]
        index[place[rescued]] = _best_objects(pairs.anchor[rescued], image[pairs.box[rescued]], boxes, valid)
    negative[_inside_crowds(grids, num_anchors, boxes.numpy(), crowd.numpy(), positive_iou)] = False
    if exists is not None:
        negative &= exists.ravel()
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


def _position(grids: _Grids, grid: Int64[ndarray, "*n"], cell: Int64[ndarray, "*n 2"]) -> Int64[ndarray, "*n"]:
    """Of the anchor of a grid around cell (column, row), among the anchors of all levels."""
    return grids.first[grid] + (cell[..., 1] * grids.cells[grid, 0] + cell[..., 0]) * grids.step[grid]


def _iou_nearby(
    grids: _Grids, objects: Float[ndarray, "N 4"], exists: Bool[ndarray, "N A"] | None
) -> Float[ndarray, "N 1"]:
    """A lower bound of each object's highest IoU with any anchor: the highest with those nearest to its centre."""
    to_centre = (objects[:, None, :2] + objects[:, None, 2:] - grids.anchor[:, :2] - grids.anchor[:, 2:]) / 2
    nearest = np.nan_to_num(np.rint(to_centre / grids.stride[:, None]))  # boxes may be no numbers
    cell = nearest.clip(0, grids.cells - 1).astype(np.int64)
    grid = np.broadcast_to(np.arange(len(grids.anchor)), cell.shape[:2])
    iou = _elementwise(pairwise_iou, _anchor_at(grids, grid, cell), objects[:, None])
    if exists is not None:
        iou = np.where(np.take_along_axis(exists, _position(grids, grid, cell), axis=1), iou, 0)
    return iou.max(axis=1, initial=0, keepdims=True)


def _pairs(grids: _Grids, boxes: Float[ndarray, "N 4"], need: Float[ndarray, "N S"]) -> _Pairs:
    """All pairs whose intersection in px^2 is at least `need`, and a few more. Boxes without area have none."""
    # In float64, so that only the float32 arithmetic of anchors and IoUs is inexact. `slack` bounds that, generously:
    # in pixels, it is far more than float32 shifts an anchor's corner; as a share of a side, more than it changes an
    # IoU. Each need is lowered and each window widened by it, because a pair too many costs little and a lost one is
    # an error.
    boxes, around_origin = boxes.astype(np.float64), grids.anchor.astype(np.float64)
    sides, anchor_sides = boxes[:, 2:] - boxes[:, :2], around_origin[:, 2:] - around_origin[:, :2]
    slack = 2.0**-20 * (grids.cells * grids.stride[:, None] + np.abs(around_origin).max(axis=1, keepdims=True))
    need = need * (1 - np.minimum(1, 4 * (slack / np.maximum(anchor_sides, slack)).sum(axis=1)))

    # 1. Combinations of a box and a grid. A box shares at most the smaller side with an anchor, along each axis.
    #    Where even the product of both is below the need, no cell of that grid has a pair.
    largest_shared = np.minimum(sides[:, None], anchor_sides)
    box, grid = ((need <= largest_shared.prod(axis=-1)) & (largest_shared > 0).all(axis=-1)).nonzero()

    # 2. The window of each combination, in pixels by which the anchor around cell (0, 0) is moved. Along x they must
    #    share at least `share` = need / (largest shared height), and along y the reverse. The anchor's right side then
    #    lies at or beyond box left + share, its left side at or before box right - share.
    share = need[box, grid, None] / largest_shared[box, grid, ::-1]
    low = boxes[box, :2] + share - around_origin[grid, 2:] - slack[grid]
    high = boxes[box, 2:] - share - around_origin[grid, :2] + slack[grid]

    # 3. The window in cells: its first (column, row), and how many columns and rows of the grid it has (maybe none).
    stride = grids.stride[grid, None]
    corner = np.ceil(low / stride).clip(0, grids.cells[grid]).astype(np.int64)
    end = np.floor(high / stride).clip(-1, grids.cells[grid] - 1).astype(np.int64) + 1
    columns, rows = (end - corner).clip(0).T

    # 4. One pair per cell of each window. `window` numbers the pairs by their window; pairs minus the pairs before
    #    their window count 0, 1, 2, ... within it, which gives the row and column.
    count = columns * rows
    window = np.repeat(np.arange(len(count)), count)
    within = np.arange(len(window)) - (np.cumsum(count) - count)[window]
    row, column = np.divmod(within, columns[window])
    cell, grid = corner[window] + np.stack((column, row), axis=-1), grid[window]
    return _Pairs(box[window], _position(grids, grid, cell), _anchor_at(grids, grid, cell))


def _best_objects(
    anchor: Float[ndarray, "N 4"], image: Int64[ndarray, "N"], boxes: Float[Tensor, "B M 4"], valid: Bool[Tensor, "B M"]
) -> Int64[ndarray, "N"]:
    """The object of highest IoU, the first among equals, of all in the anchor's image."""
    best = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(anchor), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        iou = _elementwise(pairwise_iou, anchor[chunk, None], boxes.numpy()[image[chunk]])
        best.append(np.where(valid.numpy()[image[chunk]], iou, -1).argmax(axis=1))
    return np.concatenate(best)


def _inside_crowds(
    grids: _Grids, num_anchors: int, boxes: Float[ndarray, "B M 4"], crowd: Bool[ndarray, "B M"], covered: float
) -> Int64[ndarray, "N"]:
    """Places in [B A] of the anchors with at least this share of their area in one crowd region."""
    image, number = crowd.nonzero()
    regions = boxes[image, number]
    need = np.broadcast_to(covered * _area(grids.anchor), (len(regions), len(grids.anchor)))
    pairs = _pairs(grids, regions, need)
    inside = _elementwise(pairwise_intersection, pairs.anchor, regions[pairs.box]) >= covered * _area(pairs.anchor)
    return image[pairs.box[inside]] * num_anchors + pairs.position[inside]


def _elementwise(
    pairwise: Callable[[Tensor, Tensor], Tensor], boxes1: Float[ndarray, "*#n 4"], boxes2: Float[ndarray, "*#n 4"]
) -> Float[ndarray, "*n"]:
    """A pairwise function of `retina.ops.boxes`, of box and box: its own arithmetic makes equal IoUs equal bits."""
    return pairwise(torch.from_numpy(boxes1)[..., None, :], torch.from_numpy(boxes2)[..., None, :])[..., 0, 0].numpy()


def _area(boxes: Float[ndarray, "*n 4"]) -> Float[ndarray, "*n"]:
    return box_area(torch.from_numpy(boxes)).numpy()
