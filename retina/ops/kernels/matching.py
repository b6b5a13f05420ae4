"""Matching on a GPU: every pair of an anchor and an object is computed in registers, and no matrix of IoUs stored.

One program takes a block of anchors of one image through all objects. The first kernel finds each anchor's best object
and each object's best IoU; the second finds the anchors that tie for the latter. Both compute an IoU operation for
operation as `retina.ops.boxes` does, without contracting to fused multiply-adds, so that equal means equal.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_BLOCK = 256


def match_on_gpu(
    anchors: Float[Tensor, "A 4"],
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    crowd: Bool[Tensor, "B M"],
    inside: Bool[Tensor, "B A"] | None,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"], Bool[Tensor, "B A"]]:
    """Index, positive and negative of `match_boxes`, the same as from the whole matrix."""
    shape = len(boxes), len(anchors)
    index = torch.empty(shape, dtype=torch.int64, device=boxes.device)
    positive, negative = (torch.empty(shape, dtype=torch.bool, device=boxes.device) for _ in range(2))
    # IoUs as the integers with the same bits: of numbers that are not negative, the order is the same.
    best_of_object = torch.zeros(valid.shape, dtype=torch.int32, device=boxes.device)
    inputs = anchors.contiguous(), boxes.contiguous(), valid.contiguous(), crowd.contiguous()
    masked = inside is not None
    covered = inside.contiguous() if inside is not None else positive  # any tensor will do: it is not read
    grid = (triton.cdiv(shape[1], _BLOCK), shape[0])
    sizes = shape[1], boxes.shape[1]
    with torch.cuda.device_of(boxes):
        _match[grid](
            *inputs, covered, index, positive, negative, best_of_object, *sizes, positive_iou, negative_iou,
            low_quality=low_quality, masked=masked, block=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
        if low_quality:
            _rescue[grid](
                *inputs[:3], covered, positive, negative, best_of_object, *sizes,
                masked=masked, block=_BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    return index, positive, negative


# Neither kernel is compiled again for another count of objects.
@triton.jit(do_not_specialize=["num_objects"])
@no_type_check
def _match(
    anchors, boxes, valid, crowd, inside, index, positive, negative, best_of_object, num_anchors, num_objects,
    positive_iou, negative_iou, low_quality: tl.constexpr, masked: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    anchor = tl.program_id(0) * block + tl.arange(0, block)
    image = tl.program_id(1)
    place = image * num_anchors + anchor
    written = anchor < num_anchors
    exists = _exists(inside + place, written, masked)
    left, top, right, bottom, area = _box(anchors + 4 * anchor, exists)
    best = tl.full((block,), -1.0, tl.float32)
    best_index = tl.zeros((block,), tl.int64)
    in_crowd = tl.zeros((block,), tl.int1)
    for number in range(num_objects):
        row = image * num_objects + number
        is_object, is_crowd = tl.load(valid + row), tl.load(crowd + row)
        if is_object | is_crowd:
            intersection, iou = _overlap(left, top, right, bottom, area, boxes + 4 * row)
            in_crowd = in_crowd | (is_crowd & (intersection >= positive_iou * area))
            if is_object:
                better = iou > best  # not if equal: the first object wins
                best = tl.where(better, iou, best)
                best_index = tl.where(better, number, best_index)
                if low_quality:
                    highest = tl.max(iou, axis=0)
                    tl.atomic_max(best_of_object + row, highest.to(tl.int32, bitcast=True), mask=highest > 0)
    tl.store(index + place, best_index, written)
    tl.store(positive + place, best >= positive_iou, written)
    tl.store(negative + place, (best < negative_iou) & ~in_crowd & exists, written)


@triton.jit(do_not_specialize=["num_objects"])
@no_type_check
def _rescue(
    anchors, boxes, valid, inside, positive, negative, best_of_object, num_anchors, num_objects,
    masked: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    anchor = tl.program_id(0) * block + tl.arange(0, block)
    image = tl.program_id(1)
    place = image * num_anchors + anchor
    exists = _exists(inside + place, anchor < num_anchors, masked)
    left, top, right, bottom, area = _box(anchors + 4 * anchor, exists)
    rescued = tl.zeros((block,), tl.int1)
    for number in range(num_objects):
        row = image * num_objects + number
        highest = tl.load(best_of_object + row).to(tl.float32, bitcast=True)
        if highest > 0:  # not for padding, nor for an object that overlaps no anchor
            _, iou = _overlap(left, top, right, bottom, area, boxes + 4 * row)
            rescued = rescued | (iou == highest)
    tl.store(positive + place, True, exists & rescued)
    tl.store(negative + place, False, exists & rescued)


@triton.jit
@no_type_check
def _exists(pointer, written, masked: tl.constexpr):
    return written & tl.load(pointer, written, False) if masked else written


@triton.jit
@no_type_check
def _box(pointer, exists):
    """Corners and area; a box without area where none exists."""
    left, top = tl.load(pointer, exists, 0.0), tl.load(pointer + 1, exists, 0.0)
    right, bottom = tl.load(pointer + 2, exists, 0.0), tl.load(pointer + 3, exists, 0.0)
    return left, top, right, bottom, tl.maximum(right - left, 0.0) * tl.maximum(bottom - top, 0.0)


@triton.jit
@no_type_check
def _overlap(left, top, right, bottom, area, pointer):
    """Intersection and IoU of boxes with the one at `pointer`."""
    left2, top2, right2, bottom2, area2 = _box(pointer, True)
    width = tl.maximum(tl.minimum(right, right2) - tl.maximum(left, left2), 0.0)
    height = tl.maximum(tl.minimum(bottom, bottom2) - tl.maximum(top, top2), 0.0)
    intersection = width * height
    union = tl.maximum(area + area2 - intersection, 1.1754943508222875e-38)
    return intersection, tl.div_rn(intersection, union)
