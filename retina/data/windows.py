"""How a large image is cut into overlapping tiles. Beside the road."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from retina.errors import check

Window = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels of an image."""


class Tiling(NamedTuple):
    """How images are cut."""

    tile: tuple[int, ...]
    """(height, width) in pixels of the image."""
    overlap: float = 0.25
    """Of neighbours, as a share of the tile. Objects up to that size are whole in one of them."""
    whole: bool = False
    """Whether the whole image is looked at as well, shrunk as without tiles: for objects larger than the overlap."""

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        sound = len(self.tile) == 2 and all(type(side) is int and 16 <= side < 1 << 15 for side in self.tile)
        check(sound, "tile", [*self.tile], "give [height, width] in pixels, from 16 to 32767, e.g. [800, 800]")
        check(0 <= self.overlap <= 0.9, "tile_overlap", self.overlap, "give a share of the tile, from 0 to 0.9")

    def windows(self, size: tuple[int, int]) -> list[Window]:
        """Top, left, bottom, right of each tile of an image of that (height, width): evenly spread, and together all of
        it. An image that is smaller than a tile is a tile of its own size."""
        rows, columns = (_starts(side, tile, self.overlap) for side, tile in zip(size, self.tile, strict=True))
        height, width = (min(side, tile) for side, tile in zip(size, self.tile, strict=True))
        return [(top, left, top + height, left + width) for top in rows for left in columns]


def changed(
    tiling: Tiling | None, tile: Sequence[int] | None, overlap: float | None, whole: bool | None
) -> Tiling | None:
    """With what is not None; None where there is no tile."""
    given = {"tile": tile and (*tile,), "overlap": overlap, "whole": whole}
    new: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return Tiling(**new) if tile else tiling and tiling._replace(**new)


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    if side <= tile:
        return [0]
    step = max(1, math.floor(tile * (1 - overlap)))
    count = 1 + math.ceil((side - tile) / step)
    return [round(number * (side - tile) / (count - 1)) for number in range(count)]
