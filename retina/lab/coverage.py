"""How well the anchors of a pyramid cover the objects of a data set.

Of all anchors of one shape, the one whose centre is nearest to an object's overlaps it most, as their intersection
falls with the distance along x and along y. So an object's best IoU takes one look at every shape on every level,
wherever the anchors stand. Which anchors become positive is asked of the rule that trains.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.data.annotations import Annotations
from retina.data.transforms import Pipeline, Sample, stable_hash
from retina.ops.anchors import AnchorGenerator
from retina.ops.assigners import Assigner
from retina.ops.boxes import pairwise_iou
from retina.types import Predictions, Targets

SIZES = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, float("inf"))}
"""COCO's, of the square root of a box's area; here in pixels after the resize."""
_CHUNK = 2**14


@dataclass(frozen=True)
class Pyramid:
    """Anchors, and the strides in pixels that they stand at."""

    anchors: AnchorGenerator
    strides: tuple[int, ...]

    @property
    def levels(self) -> list[int]:
        """P3 has stride 2^3."""
        return [stride.bit_length() - 1 for stride in self.strides]

    def cells(self, canvas: Int64[Tensor, "N 2"]) -> Int64[Tensor, "N L 2"]:
        """(columns, rows) of every level on canvases of (height, width)."""
        strides = torch.tensor(self.strides)
        return -(-canvas.flip(-1)[:, None] // strides[:, None])

    def around_origin(self) -> Float[Tensor, "L n 4"]:
        """The anchors of cell (0, 0) of each level."""
        return torch.stack(tuple(self.anchors([(1, 1)] * len(self.strides), self.strides, "cpu")))

    def shapes(self) -> Float[Tensor, "L n 2"]:
        """Width and height of the anchors of a cell on each level."""
        around = self.around_origin()
        return around[..., 2:] - around[..., :2]


class Objects(NamedTuple):
    """The objects of a data set at the size that a detector sees them; crowd regions are none."""

    boxes: Float[Tensor, "N 4"]
    labels: Int64[Tensor, "N"]
    image: Int64[Tensor, "N"]
    """Ascending."""
    canvas: Int64[Tensor, "N 2"]
    """(height, width) of the padded image that each lies in."""

    def sides(self) -> Float[Tensor, "N 2"]:
        """Width and height."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    def size(self) -> Float[Tensor, "N"]:
        """Square root of the area."""
        return self.sides().prod(dim=-1).sqrt()

    def of(self, rows: Tensor) -> "Objects":
        return Objects(*(part[rows] for part in self))


class Coverage(NamedTuple):
    """One entry for each object."""

    iou: Float[Tensor, "N L"]
    """With the best anchor of each level."""
    matched: Bool[Tensor, "N"]
    """Whether its image was matched; the counts are 0 elsewhere."""
    positives: Int64[Tensor, "N L"]
    """Anchors of each level that are positive for it."""
    above: Int64[Tensor, "N L"]
    """Those of them whose IoU reaches the threshold."""

    def best(self) -> Float[Tensor, "N"]:
        return self.iou.amax(dim=1)


def resized_objects(
    annotations: Annotations, pipeline: Pipeline, *, seed: int, divisor: int, images: Iterable[int]
) -> Objects:
    """The objects of these images after `pipeline`, which resizes only: as `CocoDetection` has it in epoch 0, on the
    canvas that the image would have alone in its batch."""
    pixel = np.zeros((1, 1, 3), dtype=np.uint8)  # the arithmetic of boxes reads no other
    parts: list[tuple[np.ndarray, ...]] = []
    for row in images:
        rows = slice(annotations.offsets[row], annotations.offsets[row + 1])
        height, width = map(int, annotations.sizes[row])
        boxes, labels, crowd = annotations.boxes[rows], annotations.labels[rows], annotations.crowd[rows]
        if crowd.all():
            continue
        drawn = stable_hash(seed, 0, annotations.image_ids[row].item())
        sample = Sample(pixel, boxes.astype(np.float32), labels, crowd, row, (height, width), (height, width))
        sample = pipeline.without_last_resize(sample, drawn)
        mask = ~sample.crowd
        canvas = [-(-side // divisor) * divisor for side in sample.size or ()]
        count = int(mask.sum())
        parts.append((sample.boxes[mask], sample.labels[mask], np.full(count, row), np.tile(canvas, (count, 1))))
    empty = (np.zeros((0, 4), np.float32), *(np.zeros(shape, np.int64) for shape in (0, 0, (0, 2))))
    return Objects(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(empty, *parts, strict=True)))


def distances(objects: Objects, pyramid: Pyramid) -> Float[Tensor, "N L 2"]:
    """Along x and y, from each object's centre to that of the nearest anchor on each level."""
    first = pyramid.around_origin()[:, 0]
    to_first = ((objects.boxes[:, :2] + objects.boxes[:, 2:])[:, None] - (first[:, :2] + first[:, 2:])) / 2
    strides = torch.tensor(pyramid.strides)[:, None]
    cell = (to_first / strides).round().clamp(min=0).minimum(pyramid.cells(objects.canvas) - 1)
    return (to_first - cell * strides).abs()


def overlap(
    sides: Float[Tensor, "2 *#n"], distance: Float[Tensor, "2 *#n"], anchors: Float[Tensor, "2 *#n"]
) -> Float[Tensor, "*#n"]:
    """IoU of objects and anchors, given as width and height, whose centres are so far apart along x and y."""
    width, height = torch.minimum((sides + anchors) / 2 - distance, torch.minimum(sides, anchors)).clamp(min=0)
    intersection = width * height
    return intersection / (sides[0] * sides[1] + anchors[0] * anchors[1] - intersection)


def iou_of_shapes(
    sides: Float[Tensor, "N 2"], distance: Float[Tensor, "N L 2"], anchors: Float[Tensor, "L n 2"]
) -> Float[Tensor, "L n N"]:
    """IoU of each object with the nearest anchor of each shape. Objects are the innermost axis: there are many."""
    far = distance.permute(2, 1, 0).contiguous()
    return overlap(sides.T.contiguous()[:, None, None], far[:, :, None], anchors.permute(2, 0, 1)[..., None])


def best_iou(objects: Objects, pyramid: Pyramid) -> Float[Tensor, "N L"]:
    """With any anchor of each level."""
    chunks = zip(objects.sides().split(_CHUNK), distances(objects, pyramid).split(_CHUNK), strict=True)
    return torch.cat([iou_of_shapes(*chunk, pyramid.shapes()).amax(dim=1).T for chunk in chunks])


def cover(
    objects: Objects, pyramid: Pyramid, rule: Assigner, threshold: float, images: Iterable[Int64[Tensor, "n"]]
) -> Coverage:
    """`rule`: one that looks at boxes and anchors alone. `images`: those matched too, from `rows_of_images`."""
    shape = len(objects.boxes), len(pyramid.strides)
    matched = torch.zeros(shape[0], dtype=torch.bool)
    counts = torch.zeros(2, *shape, dtype=torch.int64)
    for rows in images:
        matched[rows] = True
        number, level, iou = _positives(objects.of(rows), pyramid, rule)
        for count, counted in zip(counts, (iou >= 0, iou >= threshold), strict=True):
            count.index_put_((rows[number[counted]], level[counted]), torch.tensor(1), accumulate=True)
    return Coverage(best_iou(objects, pyramid), matched, *counts)


def draw_images(objects: Objects, count: int, generator: torch.Generator) -> Bool[Tensor, "N"]:
    """The objects of at most so many images."""
    images, number = objects.image.unique(return_inverse=True)
    return (torch.randperm(len(images), generator=generator) < count)[number]


def rows_of_images(objects: Objects, drawn: Bool[Tensor, "N"]) -> tuple[Int64[Tensor, "n"], ...]:
    """Rows of the objects drawn, image by image."""
    rows = drawn.nonzero()[:, 0]
    return rows.split(objects.image[rows].unique_consecutive(return_counts=True)[1].tolist())


def _positives(
    objects: Objects, pyramid: Pyramid, rule: Assigner
) -> tuple[Int64[Tensor, "P"], Int64[Tensor, "P"], Float[Tensor, "P"]]:
    """Every positive anchor of an image: the number of its object, its level, and their IoU."""
    shapes = [(rows, columns) for columns, rows in pyramid.cells(objects.canvas[:1])[0].tolist()]
    anchors = pyramid.anchors(shapes, pyramid.strides, "cpu")
    valid = torch.ones(1, len(objects.boxes), dtype=torch.bool)
    assigned = rule(Predictions((), (), anchors), Targets(objects.boxes[None], objects.labels[None], valid, ~valid))
    positive = assigned.positive[0].nonzero()[:, 0]
    number = assigned.matched[0, positive]
    # the same arithmetic as the matching's, so that the same ones reach the threshold
    iou = pairwise_iou(torch.cat(anchors)[positive, None], objects.boxes[number, None])[:, 0, 0]
    ends = torch.tensor([len(of_level) for of_level in anchors]).cumsum(0)
    return number, torch.bucketize(positive, ends, right=True), iou


def summarize(
    objects: Objects, coverage: Coverage, threshold: float, levels: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """All of it as JSON knows it: over all objects, by size, by level of the best anchor and by class."""
    best, size = coverage.best(), objects.size()

    def groups(masks: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: describe(best, coverage, threshold, mask) for name, mask in masks.items() if mask.any()}

    level = coverage.iou.argmax(dim=1)
    positives = coverage.positives.sum(dim=0).tolist()
    octaves = {f"{2**k}-{2 ** (k + 1)}": (size >= 2**k) & (size < 2 ** (k + 1)) for k in range(15)}
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles_of_best = np.quantile(best.numpy(), quantiles).tolist()
    return {
        **describe(best, coverage, threshold, torch.ones_like(coverage.matched)),
        "quantiles_of_best_iou": {f"{q:g}": value for q, value in zip(quantiles, quantiles_of_best, strict=True)},
        "by_size": groups({name: (size >= low) & (size < high) for name, (low, high) in SIZES.items()}),
        "by_octave": groups(octaves),
        "by_level": groups({f"P{name}": level == i for i, name in enumerate(levels)}),
        "positive_anchors_by_level": {f"P{name}": count for name, count in zip(levels, positives, strict=True)},
        "by_class": groups({name: objects.labels == label for label, name in enumerate(classes)}),
    }


def describe(best: Float[Tensor, "N"], coverage: Coverage, threshold: float, rows: Bool[Tensor, "N"]) -> dict[str, Any]:
    """The numbers of one group of objects, that has at least one."""
    known = rows & coverage.matched
    iou = best[rows].double()
    every, above = (count[known].sum(dim=1).double() for count in (coverage.positives, coverage.above))
    means = {
        "positives": every,
        "positives_at_threshold": above,
        "without_positive": (every == 0).double(),
        "without_positive_at_threshold": (above == 0).double(),
    }
    return {
        "objects": int(rows.sum()),
        "best_iou": iou.mean().item(),
        "recall_50": (iou >= 0.5).double().mean().item(),
        "recall_at_threshold": (iou >= threshold).double().mean().item(),
        "objects_matched": int(known.sum()),
        **{name: one.mean().item() if len(one) else None for name, one in means.items()},
    }
