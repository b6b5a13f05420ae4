"""Large images as training and evaluation see them: crops around objects, and the tiles of a grid. Beside the road.

One rule for both says what a tile knows of an object that its edge cuts: at least half of it inside, and the part is an
object; less, and nothing is learned there, as in a crowd region."""

import math
import random
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.data.annotations import Annotations, offsets_of
from retina.data.repeats import Repeats
from retina.data.windows import Tiling, Window
from retina.errors import DataError

KEPT = 0.5
"""Share of an object's area inside a tile from which it is an object there."""
SMALL = 32.0
"""Pixels that the smallest objects (5 %) are to have in a tile that is resized as images are."""
LOST = 16.0
"""Pixels below which the smallest objects call for tiles."""
_TRIES = 10
"""Places that are tried for a crop without objects."""


class Inside(NamedTuple):
    """What a window shows of an image's objects."""

    rows: Int64[np.ndarray, "M"]
    boxes: Float64[np.ndarray, "M 4"]
    """In pixels of the window, clipped to it."""
    crowd: Bool[np.ndarray, "M"]
    """Crowd regions, and objects of which too little is inside."""


def objects_inside(boxes: Float64[np.ndarray, "T 4"], crowd: Bool[np.ndarray, "T"], window: Window) -> Inside:
    """The objects of an image, xyxy in its pixels, as a window shows them."""
    top, left, bottom, right = window
    clipped = np.clip(boxes, [left, top, left, top], [right, bottom, right, bottom])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    visible = (clipped[:, 2:] - clipped[:, :2]).prod(axis=1)
    rows = np.flatnonzero(visible > 0)
    little = visible[rows] < KEPT * area[rows] * (1 - 1e-9)
    return Inside(rows, clipped[rows] - [left, top, left, top], crowd[rows] | little)


class Crops(NamedTuple):
    """Which part of an image a training sample shows: a window of a tile's size that holds an object whole."""

    tiling: Tiling
    empty: float
    """Share of the crops that show no object, where an image has room for them."""

    def window(self, size: tuple[int, int], boxes: Float64[np.ndarray, "M 4"], seed: int) -> Window:
        """A pure function of the image's (height, width), its objects without crowd regions, and the seed.

        An object is chosen, each as likely as another, and then a place among all that hold it whole; of one that is
        larger than the tile, a part is seen."""
        generator = random.Random(seed)
        sides = [min(side, tile) for side, tile in zip(size, self.tiling.tile, strict=True)]
        if self.tiling.whole and generator.random() * (len(self.tiling.windows(size)) + 1) < 1:
            return (0, 0, *size)
        if not len(boxes) or generator.random() < self.empty:
            for _ in range(_TRIES):
                top, left = (generator.randint(0, total - side) for total, side in zip(size, sides, strict=True))
                window = (top, left, top + sides[0], left + sides[1])
                apart = (boxes[:, 0] >= window[3]) | (boxes[:, 2] <= left) | (boxes[:, 1] >= window[2])
                if (apart | (boxes[:, 3] <= top)).all():
                    return window
        x1, y1, x2, y2 = boxes[generator.randrange(len(boxes))].tolist()
        top, left = (
            _start(generator, span, side, total)
            for span, side, total in zip(((y1, y2), (x1, x2)), sides, size, strict=True)
        )
        return top, left, top + sides[0], left + sides[1]

    def repeats(self, annotations: Annotations, base: Repeats | None) -> Repeats:
        """How often an epoch draws an image: once for each tile of its grid that holds an object, and the empty ones
        beside them; an image without objects as often as that share of its tiles, at least once. `base` multiplies."""
        times = np.ones(len(annotations))
        for row in range(len(annotations)):
            windows = self.tiling.windows(_size(annotations, row))
            rows = slice(annotations.offsets[row], annotations.offsets[row + 1])
            full = sum(map(bool, _shown(annotations.boxes[rows], annotations.crowd[rows], windows)))
            times[row] = max(1.0, full / (1 - self.empty) if full else self.empty * len(windows)) + self.tiling.whole
        if base is None:
            return Repeats(np.arange(len(times)), times, np.zeros(len(times), np.int64))
        return base._replace(times=base.times * times[base.images])


def _start(generator: random.Random, span: tuple[float, float], side: int, total: int) -> int:
    low, high = max(0, math.ceil(span[1]) - side), min(math.floor(span[0]), total - side)
    if low > high:  # the object is larger: any place within it
        low, high = max(0, math.floor(span[0])), max(0, min(math.ceil(span[1]) - side, total - side))
    return generator.randint(min(low, high), max(low, high))


def _size(annotations: Annotations, row: int) -> tuple[int, int]:
    height, width = annotations.sizes[row].tolist()
    return height, width


def _shown(boxes: np.ndarray, crowd: np.ndarray, windows: list[Window]) -> list[int]:
    """How many objects each window has."""
    return [int((~objects_inside(boxes, crowd, window).crowd).sum()) for window in windows]


@dataclass(frozen=True, eq=False, kw_only=True)
class TiledAnnotations(Annotations):
    """The tiles of a data set, each a record of its own: `sizes` and boxes are those of tiles, names and ids those of
    their images."""

    images: Annotations
    """What was cut."""
    image_of: Int64[np.ndarray, "N"]
    """Which image each tile is of."""
    windows: Int64[np.ndarray, "N 4"]
    """Top, left, bottom, right of each tile in its image."""


def tiles_of(annotations: Annotations, tiling: Tiling, *, with_objects: bool = False) -> TiledAnnotations:
    """All tiles of all images, and the images themselves with `tiling.whole`; or only those with objects.

    Raises DataError where none has any."""
    image_of: list[int] = []
    windows: list[Window] = []
    shown: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for row in range(len(annotations)):
        size, first = _size(annotations, row), annotations.offsets[row]
        rows = slice(first, annotations.offsets[row + 1])
        boxes, crowd = annotations.boxes[rows], annotations.crowd[rows]
        grid = tiling.windows(size)
        for window in [*grid, (0, 0, *size)] if tiling.whole and len(grid) > 1 else grid:
            inside = objects_inside(boxes, crowd, window)
            if with_objects and inside.crowd.all():
                continue
            image_of.append(row)
            windows.append(window)
            shown.append((inside.rows + first, inside.boxes, inside.crowd))
    if not windows:
        problem = f"{annotations.file}: no tile of {list(tiling.tile)} holds half of an object"
        raise DataError(f"{problem} - give a larger data.tile, or none", code="no-objects")
    images, places = np.array(image_of), np.array(windows)
    kept, places_of, ignored = (np.concatenate(parts) for parts in zip(*shown, strict=True))
    lengths = np.diff(annotations.name_offsets)[images]
    bytes_of = np.arange(lengths.sum()) + np.repeat(
        annotations.name_offsets[images] - offsets_of(lengths)[:-1], lengths
    )
    inherited = {field.name: getattr(annotations, field.name) for field in fields(Annotations)}
    return TiledAnnotations(
        **inherited
        | {
            "image_ids": annotations.image_ids[images],
            "sizes": places[:, 2:] - places[:, :2],
            "offsets": offsets_of(np.array([len(part[0]) for part in shown])),
            "boxes": places_of,
            "labels": annotations.labels[kept],
            "crowd": ignored,
            "areas": (places_of[:, 2:] - places_of[:, :2]).prod(axis=1),
            "names": annotations.names[bytes_of],
            "name_offsets": offsets_of(lengths),
        },
        images=annotations,
        image_of=images,
        windows=places,
    )


def choose_tile(annotations: Annotations, short_side: int, long_side: int) -> tuple[int, int] | None:
    """A square tile for objects that the resize of whole images would lose; None where it would not, or where a tile
    would be as large as the images.

    The smallest 5 % of the objects then have 32 pixels (but no tile is enlarged more than twice), and the largest
    2 % fit into half of a tile."""
    sides = annotations.boxes[:, 2:] - annotations.boxes[:, :2]
    counted = ~annotations.crowd & (sides > 0).all(axis=1)
    if not counted.any():
        return None
    sides, image_of = sides[counted], np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))[counted]
    scales = np.minimum(short_side / annotations.sizes.min(axis=1), long_side / annotations.sizes.max(axis=1))
    areas = np.sqrt(sides.prod(axis=1))
    if float(np.percentile(areas * scales[image_of], 5)) >= LOST:
        return None
    wanted = float(np.percentile(areas, 5)) * short_side / SMALL
    wanted = max(wanted, short_side / 2, 2 * float(np.percentile(sides.max(axis=1), 98)))
    tile = max(64, round(wanted / 32) * 32)
    return (tile, tile) if tile < 0.8 * float(np.percentile(annotations.sizes.max(axis=1), 95)) else None
