"""How the values of image files become the uint8 that a detector sees. Beside the road.

Cameras and microscopes store 10 to 14 bits in files of 16, whose high byte alone would be (nearly) black: the values
that a data set uses are measured, and stretched over 0..255. Detectors keep the measured range in their header."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from PIL import Image

from retina.data.channels import LIKE_RGB, RGB, Values, read_values
from retina.data.image_files import GREY_16, Header, opened
from retina.data.packs import open_stored
from retina.errors import DataError

FULL = (0, 65535)
_MEASURED = 100
"""Images of a set that are looked at."""
_OUTLIERS = 1e-4
"""Share of the values, on each side, that hot and dead pixels may be."""


class PixelFormat(NamedTuple):
    """What the values of image files mean."""

    value_range: tuple[int, int] = FULL
    """Of images with 16 bits per channel, the values that become 0 and 255."""
    channels: int = RGB
    """1 is grey; 3 is RGB."""


AS_STORED = PixelFormat()


def read_channels(path: Path, max_pixels: int, pixels: PixelFormat) -> UInt8[np.ndarray, "H W C"]:
    """An image of neither 1 nor 3 channels. Raises DataError."""
    return to_bytes(read_values(path, pixels.channels, max_pixels=max_pixels), pixels.value_range)


def to_bytes(values: Values, value_range: tuple[int, int]) -> UInt8[np.ndarray, "H W C"]:
    """Values of 8 bits as a copy, of 16 bits with those of the range over 0..255."""
    if values.dtype == np.uint8:
        return np.array(values)
    if value_range == FULL:
        return (values >> 8).astype(np.uint8)
    return _table(*value_range)[values]


def stretched(path: Path, upright: Image.Image, header: Header, value_range: tuple[int, int]) -> Image.Image:
    """An image of 16 bits per channel with 8, and its EXIF rotation applied: values of the range over 0..255.

    upright: as Pillow has it, which keeps of 16-bit colours the high bytes alone."""
    table = _table(*value_range)
    if upright.mode in GREY_16:
        return Image.fromarray(table[np.clip(np.asarray(upright), *FULL)])
    colors = _colors(path)
    if colors is None:
        return Image.fromarray(table[np.asarray(upright.convert("RGB")).astype(np.uint16) * 257])
    image = Image.fromarray(table[colors])
    return image if header.turn is None else image.transpose(header.turn)


def as_grey(colors: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 1"]:
    """What red, green and blue contribute to brightness (Rec. 601); of a grey image its own values."""
    import cv2

    return cv2.cvtColor(colors, cv2.COLOR_RGB2GRAY)[..., None]


def measured_range(paths: Iterable[Path], *, max_pixels: int, channels: int = RGB) -> tuple[int, int]:
    """The values that 16-bit images use, but for a few outliers; `FULL` if they use half of what 16 bits can hold, or a
    single one. Files that cannot be read are left out. At most 100, evenly spread, are looked at."""
    paths = list(paths)
    counts = np.zeros(FULL[1] + 1, dtype=np.int64)
    for row in np.unique(np.linspace(0, len(paths) - 1, min(_MEASURED, len(paths))).round().astype(int)).tolist():
        counts += _histogram(paths[row], max_pixels, channels)
    below = np.cumsum(counts)
    outliers = _OUTLIERS * below[-1]
    low = int(np.searchsorted(below, outliers, "right"))
    high = int(np.searchsorted(below, below[-1] - outliers))
    return FULL if not 0 < high - low <= FULL[1] // 2 else (low, high)


def _histogram(path: Path, max_pixels: int, channels: int) -> Int64[np.ndarray, "65536"]:
    try:
        if channels not in LIKE_RGB:
            values = read_values(path, channels, max_pixels=max_pixels)
            return np.bincount(values.ravel() if values.dtype == np.uint16 else [], minlength=FULL[1] + 1)
        with opened(path, max_pixels) as image:
            image.load()
            grey = np.clip(np.asarray(image), *FULL) if image.mode in GREY_16 else None
    except DataError:
        return np.zeros(FULL[1] + 1, dtype=np.int64)
    colors = _colors(path) if grey is None else grey
    return np.bincount([] if colors is None else colors.ravel(), minlength=FULL[1] + 1)


def _colors(path: Path) -> UInt16[np.ndarray, "H W 3"] | None:
    """RGB at 16 bits, which Pillow does not have; it has read the file before, because OpenCV tells of no damage."""
    import cv2  # takes longer to load than most annotation files to check

    with open_stored(path) as file:
        array = cv2.imdecode(np.frombuffer(file.read(), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype != np.uint16:
        return None
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, axis=2)
    return np.ascontiguousarray(array[..., 2::-1]) if array.shape[2] in (3, 4) else None


@cache
def _table(low: int, high: int) -> UInt8[np.ndarray, "65536"]:
    values = (np.arange(FULL[1] + 1, dtype=np.int64) - low) * 255 // (high - low)
    return np.clip(values, 0, 255).astype(np.uint8)
