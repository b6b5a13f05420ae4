"""A detector as one function of tensors, so that it can be written as a graph: from the pixels of images of any sizes
to a fixed number of detections of each, without loops or branches over what the images hold.

What it computes is what `Detector.predict` computes of arrays, step for step: the resize of `retina.data.transforms`,
the canvas of `retina.data.loader`, the network, and `retina.detections.postprocess` and `to_original`."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torchvision
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor, nn

from retina.inference import Detector
from retina.ops.anchors import on_covered_cells
from retina.ops.boxes import clip_boxes, decode
from retina.types import Predictions

REMOVED = -1.0
"""The score of what is no candidate: below that of all candidates."""
COLUMNS = ("x1", "y1", "x2", "y2", "score", "label")

Keep = Callable[..., Bool[Tensor, "B N"]]
"""Which candidates non-maximum suppression leaves: (boxes [B N 4], scores [B N], labels [B N], num_classes, iou,
limit)."""


def keep_best(
    boxes: Float[Tensor, "B N 4"],
    scores: Float[Tensor, "B N"],
    labels: Int64[Tensor, "B N"],
    num_classes: int,
    iou: float,
    limit: int,
) -> Bool[Tensor, "B N"]:
    """By torchvision's NMS, as `retina.detections.grouped_nms` does. `limit` is only for those that count per class."""
    count, number = scores.shape
    groups = (torch.arange(count)[:, None] * num_classes + labels).flatten()
    corners = boxes.double().flatten(0, 1)
    places = groups * (corners.max() - corners.min() + 1)
    survivors = torchvision.ops.nms(corners + places[:, None], scores.double().flatten(), iou)
    kept = torch.zeros(count * number, dtype=torch.bool)
    return kept.index_fill(0, survivors, True).view(count, number)


class ExportedDetector(nn.Module):
    """From images to detections, or with `raw` to what they are chosen from.

    settings: the description of the file (`retina.export.write.describe`).
    keep: non-maximum suppression; a format may have an operator of its own for it."""

    thresholds: Tensor

    def __init__(self, detector: Detector, settings: Mapping[str, Any], *, keep: Keep = keep_best) -> None:
        super().__init__()
        self.model, self.dtype, self.keep = detector.model, detector.dtype, keep
        preprocessing = settings["preprocessing"]
        self.short_side: int = preprocessing["short_side"]
        self.long_side: int | None = preprocessing["long_side"]
        self.pad_multiple: int = preprocessing["pad_multiple"]
        self.channels: int = settings["channels"]
        self.raw: bool = settings["raw"]
        self.score_threshold: float = settings["score_threshold"]
        self.candidates_per_level: int = settings["candidates_per_level"]
        self.nms_iou: float = settings["nms_iou"]
        self.max_detections: int = settings["max_detections"]
        self.class_agnostic: bool = settings["class_agnostic"]
        self.num_classes = len(settings["classes"])
        self.register_buffer("thresholds", torch.tensor(settings["thresholds"]), persistent=False)

    def forward(self, images: UInt8[Tensor, "B H W C"], sizes: Int64[Tensor, "B 2"]) -> tuple[Tensor, Tensor]:
        """images: RGB, or as it was trained, each at the top left of the common canvas; what is beyond does not matter.
        sizes: (height, width) of each.

        Returns detections [B D 6], best first, as (x1, y1, x2, y2, score, label) with boxes in pixels of the images
        and label -1 where there are no more, and the number [B] of each. With `raw`, the boxes [B A 4] and scores
        [B A K] of all anchors; anchors on cells that an image does not cover score 0."""
        new = self.new_sizes(sizes)
        predictions = self.predict(self.resize(images, sizes, new), new)
        if self.raw:
            boxes, scores = self._everything(predictions, new)
            return _scaled(boxes, new, sizes), scores
        boxes, scores, labels = self._candidates(predictions, new)
        groups, num_groups = (torch.zeros_like(labels), 1) if self.class_agnostic else (labels, self.num_classes)
        kept = self.keep(boxes, scores, groups, num_groups, self.nms_iou, self.max_detections)
        scores = torch.where(kept, scores, REMOVED)
        # there may be fewer candidates than places for detections
        padding = scores.new_full((1, self.max_detections), REMOVED).expand(scores.shape[0], -1)
        best, rows = torch.cat((scores, padding), dim=1).topk(self.max_detections, dim=1)
        rows = rows.clamp(max=scores.shape[1] - 1)
        labels = labels.gather(1, rows)
        best, order = torch.where(best >= self.thresholds[labels], best, REMOVED).topk(self.max_detections, dim=1)
        boxes, labels = _scaled(_rows(_rows(boxes, rows), order), new, sizes), labels.gather(1, order)
        found = best >= 0
        table = torch.cat((boxes, best[..., None], labels.to(boxes.dtype)[..., None]), dim=-1)
        nothing = table.new_tensor([0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
        return torch.where(found[..., None], table, nothing), found.sum(dim=1)

    def new_sizes(self, sizes: Int64[Tensor, "B 2"]) -> Int64[Tensor, "B 2"]:
        """`ResizeShortSide.size_of`, in float64 as there."""
        scale = self.short_side / sizes.amin(dim=1).double()
        if self.long_side is not None:
            scale = torch.minimum(scale, self.long_side / sizes.amax(dim=1).double())
        return (sizes * scale[:, None] + 0.5).floor().long().clamp(min=1)

    def resize(
        self, images: UInt8[Tensor, "B H W C"], sizes: Int64[Tensor, "B 2"], new: Int64[Tensor, "B 2"]
    ) -> UInt8[Tensor, "B C h w"]:
        """Each image at its new size, on a canvas that holds all."""
        # the canvas depends on the values of `sizes`; the checks tell the exporter what they can be
        rows, columns = (-(-new.amax(dim=0) // self.pad_multiple)).tolist()
        for count in (rows, columns):
            torch._check(count >= 1)
            torch._check(count <= 1 << 14)
        rows, columns = rows * self.pad_multiple, columns * self.pad_multiple
        shrinks = (new < sizes).any(dim=1)[:, None, None, None]
        small, large = shrunk(images, sizes, new, (rows, columns)), enlarged(images, sizes, new, (rows, columns))
        return torch.where(shrinks, small, large).permute(0, 3, 1, 2)

    def predict(self, images: UInt8[Tensor, "B C h w"], sizes: Int64[Tensor, "B 2"]) -> Predictions:
        """What the network says, as float32."""
        context: AbstractContextManager[Any] = torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)
        with context:
            predictions: Predictions = self.model(images, sizes)
        logits, deltas = (tuple(level.float() for level in part) for part in (predictions.logits, predictions.deltas))
        quality = predictions.quality and tuple(level.float() for level in predictions.quality)
        return predictions._replace(logits=logits, deltas=deltas, quality=quality)

    def _everything(
        self, predictions: Predictions, sizes: Int64[Tensor, "B 2"]
    ) -> tuple[Float[Tensor, "B A 4"], Float[Tensor, "B A K"]]:
        boxes, scores = [], []
        for level, anchors in enumerate(predictions.anchors):
            score = predictions.logits[level].sigmoid()
            if predictions.quality is not None:
                score = score * predictions.quality[level].sigmoid()[..., None]
            scores.append(torch.where(on_covered_cells(anchors, sizes)[..., None], score, 0.0))
            boxes.append(_clipped(decode(predictions.deltas[level], anchors), sizes))
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)

    def _candidates(
        self, predictions: Predictions, sizes: Int64[Tensor, "B 2"]
    ) -> tuple[Float[Tensor, "B N 4"], Float[Tensor, "B N"], Int64[Tensor, "B N"]]:
        """Boxes, scores and labels of the best pairs of anchor and class of every level, as `postprocess` has them."""
        parts = []
        for level, anchors in enumerate(predictions.anchors):
            logits, deltas = predictions.logits[level], predictions.deltas[level]
            best = logits.amax(dim=-1)
            usable = on_covered_cells(anchors, sizes) & (best == best)  # not NaN
            best = torch.where(usable, best, -torch.inf)
            # The best pairs lie within as many anchors of highest logit. In their order again, because ties go to the
            # lower anchor.
            row = best.topk(_least(anchors.shape[0], self.candidates_per_level), dim=1).indices.sort(dim=1).values
            scores = _rows(logits, row).sigmoid()
            is_candidate = (scores > self.score_threshold) & usable.gather(1, row)[..., None]
            scores = torch.where(is_candidate, scores, REMOVED).flatten(1)
            limit = _least(row.shape[1] * self.num_classes, self.candidates_per_level)
            scores, pair = scores.topk(limit, dim=1)
            anchor, label = pair // self.num_classes, pair % self.num_classes
            row = row.gather(1, anchor)
            if predictions.quality is not None:
                fit = predictions.quality[level].gather(1, row).sigmoid()
                scores = torch.where((scores >= 0) & (fit == fit), scores * fit, REMOVED)
            boxes = _clipped(decode(_rows(deltas, row), anchors[row]), sizes)
            sound = (boxes[..., 2:] >= boxes[..., :2]).all(dim=-1)  # False for NaN
            scores = torch.where(sound, scores, REMOVED)
            parts.append((torch.where(sound[..., None], boxes, 0.0), scores, label))
        boxes, scores, labels = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
        return boxes, scores, labels


def shrunk(
    images: UInt8[Tensor, "B H W C"], sizes: Int64[Tensor, "B 2"], new: Int64[Tensor, "B 2"], canvas: tuple[int, int]
) -> UInt8[Tensor, "B h w C"]:
    """cv2.INTER_AREA: means over areas, as two products with matrices of weights."""
    count, height, width, channels = images.shape
    down = _areas(sizes[:, 0], new[:, 0], height, canvas[0])
    across = _areas(sizes[:, 1], new[:, 1], width, canvas[1])
    # Rows first: the memory of an image [H W C] is a matrix [H, W C] as it is.
    x = down.bmm(images.reshape(count, height, width * channels).float())
    x = x.reshape(count, canvas[0], width, channels)
    x = x.transpose(2, 3).reshape(count, canvas[0] * channels, width).bmm(across.transpose(1, 2))
    halved = (2 * new == sizes).all(dim=1)[:, None, None]
    # Halves go up where OpenCV adds four pixels as integers, else to the even number.
    x = torch.where(halved, (x + 0.5).floor(), x.round())
    return x.clamp(0, 255).to(torch.uint8).reshape(count, canvas[0], channels, canvas[1]).transpose(2, 3)


def _areas(size: Int64[Tensor, "B"], new: Int64[Tensor, "B"], length: int, new_length: int) -> Float[Tensor, "B n N"]:
    """The share that each pixel of an axis has in each of the smaller axis; 0 beyond the new size. In whole numbers as
    far as can be, because float32 would move the edges of areas in large images."""
    size, new = size[:, None, None], new[:, None, None]
    target, source = torch.arange(new_length)[:, None], torch.arange(length)
    # in units of 1 / new of a pixel
    overlap = torch.minimum((target + 1) * size, (source + 1) * new) - torch.maximum(target * size, source * new)
    return torch.where(target < new, overlap.clamp(min=0).float() / size.float(), 0.0)


def enlarged(
    images: UInt8[Tensor, "B H W C"], sizes: Int64[Tensor, "B 2"], new: Int64[Tensor, "B 2"], canvas: tuple[int, int]
) -> UInt8[Tensor, "B h w C"]:
    """cv2.INTER_LINEAR: between the four nearest pixels, in integers with the weights and roundings of OpenCV."""
    top, bottom, high, low = _neighbours(sizes[:, 0], new[:, 0], canvas[0])
    left, right, near, far = (values[:, None, :, None] for values in _neighbours(sizes[:, 1], new[:, 1], canvas[1]))

    def row(index: Tensor) -> Tensor:
        line = images.gather(1, index[..., None, None].expand(-1, -1, *images.shape[2:])).int()
        one, other = (line.gather(2, side.expand(-1, canvas[0], -1, images.shape[3])) for side in (left, right))
        return (one * near + other * far) // 16

    high, low = high[..., None, None], low[..., None, None]
    return ((row(top) * high // 65536 + row(bottom) * low // 65536 + 2) // 4).to(torch.uint8)


def _neighbours(
    size: Int64[Tensor, "B"], new: Int64[Tensor, "B"], new_length: int
) -> tuple[Int64[Tensor, "B n"], Int64[Tensor, "B n"], Int[Tensor, "B n"], Int[Tensor, "B n"]]:
    """For each pixel of an axis the two of the smaller axis it lies between, and their weights in units of 1 / 2048."""
    size, new = size[:, None], new[:, None]
    target = torch.arange(new_length)
    centre = ((target + 0.5).double() * (size.double() / new.double()) - 0.5).float()
    first = centre.floor().long()
    rest = torch.where((first < 0) | (first >= size - 1), 0.0, centre - first)
    first = torch.minimum(first.clamp(min=0), size - 1)
    near, far = ((side * 2048).round().int() for side in (1 - rest, rest))
    return first, torch.minimum(first + 1, size - 1), near, far


def _least(length: int, limit: int) -> int:
    """The smaller of a length that is not known when the graph is written and one that is."""
    least: int = torch.sym_min(length, limit)  # type: ignore[assignment]  # a symbol while the graph is written
    return least


def _rows(x: Float[Tensor, "B A _"], rows: Int64[Tensor, "B N"]) -> Float[Tensor, "B N _"]:
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def _clipped(boxes: Float[Tensor, "B N 4"], sizes: Int64[Tensor, "B 2"]) -> Float[Tensor, "B N 4"]:
    return clip_boxes(boxes, sizes[:, None])


def _scaled(
    boxes: Float[Tensor, "B N 4"], sizes: Int64[Tensor, "B 2"], original: Int64[Tensor, "B 2"]
) -> Float[Tensor, "B N 4"]:
    """`to_original` of a batch."""
    scale = (original.to(boxes.dtype) / sizes.to(boxes.dtype)).flip(1).repeat(1, 2)
    return _clipped(boxes * scale[:, None], original)
