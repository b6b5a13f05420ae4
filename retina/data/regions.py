"""Large images read part by part: a TIFF stays on the disk, of which strips or tiles are decoded where they are needed.
Beside the road.

tifffile reads them (`pip install 'retina-detect[tiff]'`), GeoTIFFs too, whose georeference is not looked at. Without
it, and for any other image, the whole is decoded, if `max_pixels` allows."""

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from retina.data.channels import check_segments
from retina.data.image_files import MAX_PIXELS, fault, format_of, reading
from retina.data.images import read_image
from retina.data.packs import version_of
from retina.data.pixels import AS_STORED, PixelFormat, as_grey, to_bytes
from retina.data.windows import Window

_KEPT_BYTES = 1 << 28
"""Of decoded strips and tiles, or of decoded images, that are kept for the next part."""
_MOST_SIDE = 1 << 20
_ORIENTATION, _EXTRA_SAMPLES, _PREMULTIPLIED = 274, 338, 1
_GREY, _RGB = 1, 2
"""Photometric interpretations of TIFF 6.0."""


class Regions:
    """A TIFF to take parts of, as one would of an array: `regions[top:bottom, left:right]` is uint8 [h w C]."""

    def __init__(self, path: Path, shape: tuple[int, int, int], max_pixels: int, pixels: PixelFormat) -> None:
        self.path, self.shape, self.max_pixels, self.pixels = path, shape, max_pixels, pixels
        self._segments = _Kept()

    @property
    def nbytes(self) -> int:
        """That may be held in memory."""
        return _KEPT_BYTES

    def __getitem__(self, part: tuple[slice, slice]) -> UInt8[np.ndarray, "h w C"]:
        """Raises DataError for a file that is damaged there, or a part of more than `max_pixels`."""
        (top, bottom, _), (left, right, _) = (s.indices(side) for s, side in zip(part, self.shape, strict=False))
        _check_pixels(self.path, (bottom - top, right - left), self.max_pixels)
        return self._convert(self._values((top, left, bottom, right)))

    def shrunk(self, max_pixels: int) -> tuple[UInt8[np.ndarray, "h w C"], int]:
        """The whole image with at most so many pixels, and by which whole factor it is smaller: means of squares."""
        height, width, channels = self.shape
        factor = max(1, math.ceil(math.sqrt(height * width / max_pixels)))
        rows, columns = max(1, height // factor), max(1, width // factor)
        result = np.empty((rows, columns, channels), np.uint8)
        strip = max(1, min(self.max_pixels, 1 << 24) // (factor * factor * columns))
        for first in range(0, rows, strip):
            last = min(rows, first + strip)
            part = self[first * factor : last * factor, : columns * factor]
            size = (columns, last - first)
            result[first:last] = cv2.resize(part, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], channels)
        return result, factor

    def _values(self, window: Window) -> np.ndarray:
        import tifffile  # type: ignore[import-not-found, unused-ignore]

        top, left, bottom, right = window
        with reading(self.path, self.max_pixels, whole=False) as file, tifffile.TiffFile(file, is_ome=False) as tiff:
            page: Any = tiff.pages[0]
            rows, columns = page.chunks[:2]
            values = np.zeros((bottom - top, right - left, page.samplesperpixel), page.dtype)
            file.begin_pixels(values.size, jpeg=False)
            for i in range(top // rows, -(-bottom // rows)):
                for j in range(left // columns, -(-right // columns)):
                    segment = self._segment(page, file, i * page.chunked[1] + j)
                    y, x = i * rows - top, j * columns - left
                    part = segment[max(0, -y) : bottom - top - y, max(0, -x) : right - left - x]
                    y, x = max(0, y), max(0, x)
                    values[y : y + part.shape[0], x : x + part.shape[1]] = part
        return values

    def _segment(self, page: Any, file: Any, index: int) -> np.ndarray:
        segment = self._segments.get(index)
        if segment is None:
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index])
            decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
            segment = self._segments.put(index, decoded[0, : shape[1], : shape[2]])
        return segment

    def _convert(self, values: np.ndarray) -> UInt8[np.ndarray, "h w C"]:
        values = to_bytes(values, self.pixels.value_range)
        wanted = self.pixels.channels
        if wanted == 3:
            return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else np.ascontiguousarray(values[..., :3])
        return as_grey(np.ascontiguousarray(values[..., :3])) if wanted == 1 < values.shape[2] else values


class _Kept(OrderedDict[Any, Any]):
    """What was used last, up to some bytes."""

    def put(self, key: Any, value: Any) -> Any:
        self[key] = value
        while sum(kept.nbytes for kept in self.values()) > _KEPT_BYTES and len(self) > 1:
            self.popitem(last=False)
        return value


def regions_of(
    path: Path, *, max_pixels: int = MAX_PIXELS, pixels: PixelFormat = AS_STORED
) -> "UInt8[np.ndarray, 'H W C'] | Regions":
    """The image to take parts of. Of a TIFF that is read by parts, `max_pixels` bounds a part, else the image.

    Raises DataError as `read_image` does."""
    return _tiff(path, max_pixels, pixels) or read_image(path, max_pixels=max_pixels, pixels=pixels)


def _tiff(path: Path, max_pixels: int, pixels: PixelFormat) -> Regions | None:
    """None for what is read whole: other formats, and kinds of TIFF that Pillow knows better."""
    with reading(path, max_pixels, whole=False) as file:
        if format_of(file.read(16)) != "TIFF":
            return None
        try:
            import tifffile
        except ImportError:
            return None
        file.seek(0)
        try:
            with tifffile.TiffFile(file, is_ome=False) as tiff:
                page: Any = tiff.pages[0]
                shape = (int(page.imagelength), int(page.imagewidth), int(page.samplesperpixel))
                if not _is_usual(page, pixels.channels) or max(shape) > _MOST_SIDE:
                    return None
                check_segments(path, page, version_of(path)[0])
                _check_pixels(path, page.chunks[:2], max_pixels)
        except tifffile.TiffFileError:
            return None  # Pillow has the word
    return Regions(path, (*shape[:2], pixels.channels), max_pixels, pixels)


def _is_usual(page: Any, channels: int) -> bool:
    orientation, extra = (page.tags.valueof(tag) for tag in (_ORIENTATION, _EXTRA_SAMPLES))
    kinds = {(_GREY, 1): (1, 3), (_RGB, 3): (1, 3), (_RGB, 4): (1, 3)}
    known = kinds.get((int(page.photometric), int(page.samplesperpixel)), ())
    alpha = extra if isinstance(extra, tuple) else (extra,)
    fits = channels in known or (page.samplesperpixel == channels and channels not in (1, 3))
    premultiplied = _PREMULTIPLIED in alpha and channels in known
    stored = page.axes in ("YX", "YXS") and page.dtype in (np.uint8, np.uint16) and page.fillorder == 1
    return fits and stored and not premultiplied and orientation in (None, 1)


def _check_pixels(path: Path, size: tuple[int, ...], max_pixels: int) -> None:
    height, width = size
    if height * width > max_pixels:
        problem = f"has a part of {width}x{height} pixels, more than max_pixels={max_pixels} allows"
        raise fault(path, "too-many-pixels", problem, "write it anew in tiles, or raise that limit")


class RegionReader:
    """Reads parts of image files. Those that were used last stay decoded: the next part is often of the same."""

    def __init__(self, max_pixels: int, pixels: PixelFormat) -> None:
        self.max_pixels, self.pixels = max_pixels, pixels
        self._images = _Kept()

    def __call__(self, path: Path, window: Window) -> tuple[UInt8[np.ndarray, "h w C"], tuple[int, int]]:
        """The window, and (height, width) of the whole image."""
        image = self._images.get(path)
        if image is None:
            image = self._images.put(path, regions_of(path, max_pixels=self.max_pixels, pixels=self.pixels))
        top, left, bottom, right = window
        return np.ascontiguousarray(image[top:bottom, left:right]), (image.shape[0], image.shape[1])
