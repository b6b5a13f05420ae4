"""Rules of later papers, under which objects choose their anchors by statistics or by predictions. Beside the road.

Settings name them as `retina.ops.assigners.ATSS` and `.TaskAligned`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.ops.anchors import Anchors, covered_anchors
from retina.ops.boxes import decode, encode_distances, paired_iou, pairwise_iou
from retina.ops.kernels.matching_forms import match_boxes
from retina.types import Assignment, Predictions, Targets

# Pairs of an anchor and an object that are compared at a time: in the second-level cache, or bounding the memory.
_PAIRS = 2**18
_PAIRS_OF_DEVICE = 2**24

# Relative difference of IoUs that are equal: at 8192 px, the corners of an anchor of 32 px are rounded by 1.5e-5 of it.
_ROUNDING = 1e-4


@dataclass(frozen=True, kw_only=True)
class ATSS:
    """Adaptive training sample selection: each object sets its own IoU threshold.

    On every level, the `topk` cells nearest to an object's centre (the first among equally near ones) give all their
    anchors as candidates. Positive are those of at least the mean plus the standard deviation of all candidates' IoUs,
    if their centre is more than 0.01 px inside the object. An anchor that several objects want goes to that of highest
    IoU, the first among equals. All others are negative, except those that a crowd covers by half or more.

    That sum may exceed every IoU: by rounding where all are equal (one level, and an object within all its candidates),
    and by the formula where half of them or more are the highest (two levels). The authors' code then takes none; here
    those of highest IoU are taken, up to rounding, because the object would be trained as background.

    With several anchors per cell this is the authors' rule (`topk` x anchors per cell, as all anchors of a cell are
    equally near); mmdetection's, which knows one anchor per cell only, is the same there.

    Costs no matrix of all anchors: B x M x 81 distances a level, and B x M x 9 anchors per cell and level as
    candidates. Raises ValueError for `topk` below 1 and, when called, for anchors that do not know their grid.
    Source: Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection, CVPR 2020, Algorithm 1.
    """

    topk: int = 9

    def __post_init__(self) -> None:
        _check_topk(self.topk)

    def __call__(self, predictions: Predictions, targets: Targets) -> Assignment:
        boxes, anchors = targets.boxes, torch.cat(list(predictions.anchors))
        candidates, exists = _nearest_anchors(predictions, boxes, self.topk)
        iou = torch.where(exists, paired_iou(anchors[candidates], boxes[:, :, None]), 0)
        inside = _centre_inside(anchors[candidates], boxes) & targets.valid[..., None]
        eligible = (iou >= _threshold(iou, exists)) & exists & inside
        matched, positive, _ = _highest_iou_wins(candidates, iou, eligible, len(anchors))
        return Assignment(matched, positive, ~positive & _outside_crowds(predictions, targets))


@dataclass(frozen=True, kw_only=True)
class TaskAligned:
    """Task-aligned assignment: the anchors that already classify and localise an object best become its positives.

    With s the score of the object's class and u the IoU of the predicted box with the object, the alignment of an
    anchor is t = s^alpha u^beta. Positive are the `topk` anchors of highest t over all levels, if t > 0 and their
    centre is more than 0.01 px inside the object. An anchor that several objects want goes to that of highest u, the
    first among equals. All others are negative, except those that a crowd covers by half or more.

    The target score of a positive is t, scaled per object so that its largest is the object's largest u: the target of
    `QualityFocal`, and in `DetectionLoss` the weight of the box loss and, summed, the divisor of all losses. (The
    authors begin with a few epochs of ATSS: `DetectionLoss.warm_start`.)

    Predictions are compared in chunks: at most 2^24 pairs of an anchor and an object at a time, or 2^18 on a CPU, but
    8 `topk` anchors with all objects at least.
    Which of several anchors of equal t comes last among the `topk` is up to the device.
    Raises ValueError for settings out of range.
    Source: Feng et al., TOOD: Task-aligned One-stage Object Detection, ICCV 2021, section 3.2.
    """

    topk: int = 13
    alpha: float = 1.0
    beta: float = 6.0

    def __post_init__(self) -> None:
        _check_topk(self.topk)
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: Targets) -> Assignment:
        anchors = torch.cat(list(predictions.anchors))
        best: tuple[Tensor, ...] | None = None
        for chunk in self._chunks(predictions, targets):
            parts = chunk if best is None else tuple(torch.cat(pair, dim=-1) for pair in zip(best, chunk, strict=True))
            best = self._best(*parts)
        assert best is not None
        aligned, iou, candidates = best
        eligible = (aligned > 0) & _centre_inside(anchors[candidates], targets.boxes)
        matched, positive, won = _highest_iou_wins(candidates, iou, eligible, len(anchors))
        aligned, iou = torch.where(won, aligned, 0), torch.where(won, iou, 0)
        quality = aligned / (aligned.amax(dim=-1, keepdim=True) + 1e-7) * iou.amax(dim=-1, keepdim=True)
        # Each anchor was won at most once; all else is 0.
        nothing = torch.zeros_like(matched, dtype=quality.dtype)
        quality = nothing.scatter_reduce(1, candidates.flatten(1), quality.flatten(1), "amax")
        return Assignment(matched, positive, ~positive & _outside_crowds(predictions, targets), quality)

    def _best(self, aligned: Tensor, iou: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """The `topk` of highest alignment."""
        aligned, best = aligned.topk(min(self.topk, aligned.shape[-1]), dim=-1)
        return aligned, iou.gather(-1, best), index.expand_as(iou).gather(-1, best)

    def _chunks(self, predictions: Predictions, targets: Targets) -> Iterator[tuple[Tensor, ...]]:
        """Alignment, IoU and index [B M k] of the best anchors of each chunk."""
        boxes, valid, covered = targets.boxes, targets.valid[..., None], covered_anchors(predictions)
        labels = targets.labels.clamp(min=0)[:, None]  # those of padding may be anything
        pairs = _PAIRS if boxes.device.type == "cpu" else _PAIRS_OF_DEVICE
        rows, first = max(8 * self.topk, pairs // max(1, valid.numel())), 0
        for level in zip(predictions.logits, predictions.deltas, predictions.anchors, strict=True):
            for logits, deltas, anchors in zip(*(part.split(rows, dim=-2) for part in level), strict=True):
                score = logits.gather(2, labels.expand(-1, len(anchors), -1)).mT.float().contiguous().sigmoid()
                predicted = decode(deltas, anchors).mT.contiguous().mT  # a CPU reads one coordinate after the other
                iou = pairwise_iou(boxes, predicted)
                part = slice(first, first + len(anchors))
                counts = valid if covered is None else valid & covered[:, None, part]
                aligned = (score**self.alpha * iou**self.beta).masked_fill(~counts, 0)
                yield self._best(aligned, iou, torch.arange(part.start, part.stop, device=iou.device))
                first = part.stop


def _threshold(iou: Float[Tensor, "B M C"], exists: Bool[Tensor, "B M C"]) -> Float[Tensor, "B M 1"]:
    """Mean and standard deviation of the IoUs of the candidates that exist, at most the highest."""
    count = exists.sum(dim=-1, keepdim=True)
    mean = iou.sum(dim=-1, keepdim=True) / count
    squares = torch.where(exists, iou - mean, 0).square().sum(dim=-1, keepdim=True)
    threshold = mean + (squares / (count - 1).clamp(min=1)).sqrt()
    return threshold.minimum(iou.amax(dim=-1, keepdim=True) * (1 - _ROUNDING))


def _nearest_anchors(
    predictions: Predictions, boxes: Float[Tensor, "B M 4"], topk: int
) -> tuple[Int64[Tensor, "B M C"], Bool[Tensor, "B M C"]]:
    """Indices of the anchors around the `topk` cells of every level nearest to each box's centre, of the cells that its
    image covers. Where an image covers fewer, others fill the places up: which exist, the mask says."""
    anchors, sizes = predictions.anchors, predictions.sizes
    if sizes is None:
        sizes = torch.full((len(boxes), 2), 2**31, device=boxes.device)
    if not isinstance(anchors, Anchors):
        raise ValueError(
            f"need anchors that know their grid (retina.ops.anchors.Anchors), got a {type(anchors).__name__}"
        )
    parts, first = [], 0
    for level, shape, stride in zip(anchors, anchors.shapes, anchors.strides, strict=True):
        per_cell = len(level) // max(1, math.prod(shape))
        from_first_cell = 0.5 * (boxes[..., :2] + boxes[..., 2:] - level[:1, :2] - level[:1, 2:])
        cells, exists = _nearest_cells(from_first_cell, sizes, shape, stride, topk)
        around = cells[..., None] * per_cell + torch.arange(per_cell, device=boxes.device)
        parts.append((around.flatten(2) + first, exists[..., None].expand_as(around).flatten(2)))
        first += len(level)
    indices, existing = zip(*parts, strict=True)
    return torch.cat(indices, dim=-1), torch.cat(existing, dim=-1)


def _nearest_cells(
    position: Float[Tensor, "B M 2"], sizes: Int64[Tensor, "B 2"], shape: tuple[int, int], stride: int, topk: int
) -> tuple[Int64[Tensor, "B M k"], Bool[Tensor, "B M k"]]:
    """Indices of the cells nearest to (x, y), in pixels from the first; nearest first, of equally near ones the first.
    Those that images of these sizes do not cover come last, and do not exist.

    They are found among the `topk` nearest columns and rows: a cell beyond has `topk` nearer ones in its own row or
    column."""

    def nearest(
        place: Float[Tensor, "B M"], size: int, pixels: Int64[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B M n"], Bool[Tensor, "B M n"]]:
        length, covered = min(topk, size), (-(-pixels // stride)).clamp(max=size)[:, None]
        start = (
            (place / stride - 0.5 * length).ceil().nan_to_num().clamp(min=0).minimum((covered - length).clamp(min=0))
        )
        indices = start[..., None] + torch.arange(length, device=place.device)
        return indices, indices < covered[..., None]

    height, width = shape
    x, y = position.unbind(-1)
    columns, column_exists = nearest(x, width, sizes[:, 1])
    rows, row_exists = nearest(y, height, sizes[:, 0])
    dx, dy = columns * stride - x[..., None], rows * stride - y[..., None]
    exists = (row_exists[..., :, None] & column_exists[..., None, :]).flatten(2)
    distance = ((dy * dy)[..., :, None] + (dx * dx)[..., None, :]).flatten(2).masked_fill(~exists, math.inf)
    order = distance.sort(dim=-1, stable=True).indices[..., :topk]
    cells = rows[..., :, None] * width + columns[..., None, :]
    return cells.flatten(2).gather(-1, order).long(), exists.gather(-1, order)


def _centre_inside(anchors: Float[Tensor, "B M C 4"], boxes: Float[Tensor, "B M 4"]) -> Bool[Tensor, "B M C"]:
    return encode_distances(boxes[:, :, None], anchors).amin(dim=-1) > 0.01


def _highest_iou_wins(
    candidates: Int64[Tensor, "B M C"], iou: Float[Tensor, "B M C"], eligible: Bool[Tensor, "B M C"], num_anchors: int
) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"], Bool[Tensor, "B M C"]]:
    """Gives each eligible anchor to the object of highest IoU, the first among equals.

    Returns the object of every anchor, whether it has one, and which candidates their objects have won."""
    num_images, num_objects, _ = candidates.shape
    place = candidates.flatten(1)
    best = iou.new_full((num_images, num_anchors), -1)
    best = best.scatter_reduce(1, place, torch.where(eligible, iou, -1).flatten(1), "amax")
    equal = eligible & (iou == best.gather(1, place).view_as(iou))
    objects = torch.arange(num_objects, dtype=torch.int32, device=iou.device)[:, None]
    owner = torch.full_like(best, num_objects, dtype=torch.int32)
    owner = owner.scatter_reduce(1, place, torch.where(equal, objects, num_objects).flatten(1), "amin")
    won = equal & (objects == owner.gather(1, place).view_as(candidates))
    return owner.clamp(max=num_objects - 1).long(), owner < num_objects, won


def _outside_crowds(predictions: Predictions, targets: Targets) -> Bool[Tensor, "B A"]:
    """False for anchors with half of their area or more in one crowd region, as in `MaxIoU`."""
    nothing = torch.zeros_like(targets.valid)
    return match_boxes(predictions.anchors, targets.boxes, nothing, targets.crowd, low_quality=False).negative


def _check_topk(topk: int) -> None:
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
