"""Anchor boxes of a feature pyramid."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.types import Predictions


class Anchors(tuple[Tensor, ...]):
    """The anchors [A_l 4] of each level: a tuple of tensors that knows on which grid of cells they stand.

    Anchor n of N around (row, column) of a level is the row (row x width + column) x N + n of its tensor: anchor n
    around cell (0, 0), moved by (column x stride, row x stride).
    """

    shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level in cells."""
    strides: tuple[int, ...]
    """Pixels from one cell to the next on each level."""
    corners: Tensor | None
    """Of `corners_of_cells`, [A 2] of all levels, where they are known: the same in every step of a canvas."""

    def __new__(
        cls,
        levels: Iterable[Float[Tensor, "_ 4"]],
        shapes: tuple[tuple[int, int], ...],
        strides: tuple[int, ...],
        corners: Tensor | None = None,
    ) -> "Anchors":
        self = super().__new__(cls, levels)
        self.shapes, self.strides, self.corners = shapes, strides, corners
        return self

    def __getnewargs__(self) -> tuple[object, ...]:
        return tuple(self), self.shapes, self.strides, self.corners  # for copies: those of a tuple know nothing else


@dataclass(frozen=True)
class AnchorGenerator:
    """Anchors of every pyramid level: boxes of each ratio and scale around every cell.

    On a level of size s, an anchor of scale c and ratio r has area (s c)^2 and height / width = r. It is centred on
    ((column + offset) x stride, (row + offset) x stride).

    Args:
        sizes: side in pixels of the anchor of scale 1 and ratio 1, one per level, finest first.
        scales: factors of the side; the default spans one octave in three steps.
        ratios: height / width.
        rounded: reproduce torchvision's `retinanet_resnet50_fpn`, for weights trained there: sides truncated to whole
            pixels, then corners rounded (half to even), both before the offset.
        offset: of the centres, in strides: 0 as in torchvision, detectron2 and mmdetection, 0.5 for centres of cells.

    Raises ValueError for values that are not finite and positive, for none at all, and for an offset outside [0, 1].
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4: sizes 32 to 512 on P3 to P7.
    """

    sizes: tuple[float, ...]
    scales: tuple[float, ...] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rounded: bool = False
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.offset <= 1:
            raise ValueError(f"offset must be between 0 and 1 stride, got {self.offset}")
        for name in ("sizes", "scales", "ratios"):
            values = tuple(float(value) for value in getattr(self, name))
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name} must be positive numbers, at least one, got {values}")
            object.__setattr__(self, name, values)  # a tuple even if a list came in: the generator is a cache key

    @property
    def num_per_cell(self) -> int:
        """Anchors around one cell, the same on every level."""
        return len(self.scales) * len(self.ratios)

    def __call__(
        self, shapes: Sequence[tuple[int, int]], strides: Sequence[int | tuple[int, int]], device: torch.device | str
    ) -> tuple[Float[Tensor, "_ 4"], ...]:
        """Anchors [A_l 4] of each level, float32, in the order [H W ratio scale].

        Args:
            shapes: (height, width) of each level in cells.
            strides: pixels from one cell to the next on each level, one number or (rows, columns). The result is a
                plain tuple, not `Anchors`, if some level has two different ones.

        The tensors are cached and shared between calls: do not write into them.
        """
        if not len(shapes) == len(strides) == len(self.sizes):
            raise ValueError(
                f"{len(self.sizes)} sizes, {len(shapes)} shapes and {len(strides)} strides: not one per level"
            )
        pairs = tuple(s if isinstance(s, tuple) else (s, s) for s in strides)
        make = _pyramid.__wrapped__ if torch.compiler.is_exporting() else _pyramid  # sizes are symbols there
        return make(self, tuple((h, w) for h, w in shapes), pairs, torch.device(device))

    def sides(self, strides: Sequence[int]) -> Float[Tensor, "L N 2"]:
        """Width and height of a cell's anchors on each level, in strides; float32."""
        cells = [self.cell(size) / stride for size, stride in zip(self.sizes, strides, strict=True)]
        return torch.stack([cell[:, 2:] - cell[:, :2] for cell in cells]).float()

    def cell(self, size: float) -> Float[Tensor, "N 4"]:
        """The anchors around the point (0, 0) on a level of this size, float64, in the order [ratio scale]."""
        sides = [size * scale for scale in self.scales]
        if self.rounded:
            sides = [float(int(side)) for side in sides]
        halves = [
            (0.5 * side / math.sqrt(ratio), 0.5 * side * math.sqrt(ratio))
            for ratio, side in product(self.ratios, sides)
        ]
        boxes = torch.tensor([(-x, -y, x, y) for x, y in halves], dtype=torch.float64)
        return boxes.round() if self.rounded else boxes


# Few enough that a multi-scale run keeps no more than some 100 MB of anchors; a miss costs a handful of small kernels.
@lru_cache(maxsize=32)
def _pyramid(
    generator: AnchorGenerator,
    shapes: tuple[tuple[int, int], ...],
    strides: tuple[tuple[int, int], ...],
    device: torch.device,
) -> tuple[Float[Tensor, "_ 4"], ...]:
    levels = []
    # A first call from evaluation must not leave inference tensors in the cache: training could not save them for
    # backward.
    with torch.inference_mode(False):
        for size, (height, width), (down, right) in zip(generator.sizes, shapes, strides, strict=True):
            offset = generator.offset * torch.tensor([right, down, right, down], dtype=torch.float64)
            cell = (generator.cell(size) + offset).to(device, torch.float32)
            rows = torch.arange(height, device=device, dtype=torch.float32) * down
            columns = torch.arange(width, device=device, dtype=torch.float32) * right
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            levels.append((torch.stack((x, y, x, y), dim=-1)[..., None, :] + cell).reshape(-1, 4))
        if torch.compiler.is_exporting() or any(down != right for down, right in strides):  # symbols there
            return tuple(levels)
        corners = torch.cat([corners_of_cells(level) for level in levels])
    return Anchors(levels, shapes, tuple(down for down, _ in strides), corners)


def corners_of_cells(anchors: Float[Tensor, "A_l 4"]) -> Float[Tensor, "A_l 2"]:
    """(x, y) of the upper left corner of the cell of each anchor of a level."""
    # Anchors are centred alike in each cell. So the pixels from the first centre are those from cell (0, 0), rounded
    # because strides are whole.
    centres = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    return (centres - centres[:1]).round()


def on_covered_cells(anchors: Float[Tensor, "A_l 4"], sizes: Int64[Tensor, "B 2"]) -> Bool[Tensor, "B A_l"]:
    """Whether images of these (height, width) cover the cells of a level's anchors, at least with the upper left corner
    of the cell. Others exist or not as the other images of the batch need them."""
    return (corners_of_cells(anchors) < sizes[:, None].flip(-1)).all(dim=-1)


def covered_anchors(predictions: Predictions) -> Bool[Tensor, "B A"] | None:
    """Which anchors of all levels are on cells that their images cover; None: all."""
    if predictions.sizes is None:
        return None
    sizes = predictions.sizes.to(predictions.anchors[0].device)
    corners = getattr(predictions.anchors, "corners", None)
    if corners is None:
        corners = torch.cat([corners_of_cells(level) for level in predictions.anchors])
    return (corners < sizes[:, None].flip(-1)).all(dim=-1)
