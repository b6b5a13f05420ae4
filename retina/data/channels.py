"""Image files of another number of channels than three: RGBN, multispectral and other scientific images. Beside the
road.

TIFFs are read by tifffile (`pip install 'retina-detect[tiff]'`), because Pillow knows only usual numbers of channels:
one page of all channels, or a page for each. PNG and WebP with transparency have 4, or 2 with grey. What cannot be read
whole is a DataError."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from retina.data.image_files import TURNS, Header, fault, format_of, header_of, opened, read_header, reading
from retina.data.packs import version_of

RGB = 3
LIKE_RGB = (1, RGB)
"""Numbers of channels that any image can be read with, as grey or in colour."""
MOST = 256
_COLORS = {"LA": 2, "RGBA": 4}
"""Modes of Pillow, and their channels."""
_ORIENTATION = 274

Values = UInt8[np.ndarray, "H W C"] | UInt16[np.ndarray, "H W C"]


def read_header_of(path: Path, channels: int, *, max_pixels: int) -> Header:
    """`read_header` for an image that is to have so many channels. Raises DataError where it has not."""
    if channels in LIKE_RGB:
        return read_header(path, max_pixels=max_pixels)
    return _read(path, channels, max_pixels, pixels=False)[0]


def read_values(path: Path, channels: int, *, max_pixels: int) -> Values:
    """An image of so many channels, which are neither 1 nor 3, as it is stored but upright. Raises DataError."""
    header, values = _read(path, channels, max_pixels, pixels=True)
    assert values is not None
    if header.turn is None:
        return np.ascontiguousarray(values)
    turned = [np.asarray(Image.fromarray(values[..., k]).transpose(header.turn)) for k in range(channels)]
    return np.stack(turned, axis=-1)


def _read(path: Path, channels: int, max_pixels: int, *, pixels: bool) -> tuple[Header, Values | None]:
    """The header, and the values, not turned yet."""
    with reading(path, max_pixels, whole=pixels) as file:
        is_tiff = format_of(file.read(16)) == "TIFF"
        file.seek(0)
        if is_tiff:
            return _read_tiff(path, file, channels, max_pixels, pixels=pixels)
    with opened(path, max_pixels, whole=pixels) as image:
        header = header_of(image)
        _check_channels(path, _COLORS.get(image.mode, len(image.getbands())), channels)
        if image.mode not in _COLORS:
            problem = f"has its {channels} channels as {image.mode}, which no detector is trained on"
            raise fault(path, "other-channels", problem, "convert it to a TIFF")
        if not pixels:
            return header, None
        image.load()
        return header, np.asarray(image)


def _read_tiff(path: Path, file: Any, channels: int, max_pixels: int, *, pixels: bool) -> tuple[Header, Values | None]:
    try:
        import tifffile  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        problem = f"is a TIFF to be read with {channels} channels, and tifffile is not installed"
        raise fault(path, "missing-package", problem, "pip install 'retina-detect[tiff]'") from error
    # by pages: metadata of microscopes may name other files, which must not be opened
    with tifffile.TiffFile(file, is_ome=False) as tiff:
        first = tiff.pages[0]
        order: dict[str, Callable[[Any], Any]] = {"YXS": lambda a: a, "SYX": lambda a: a.transpose(1, 2, 0)}
        pages = [first] if first.axes in order else list(tiff.pages)
        height, width = int(first.imagelength), int(first.imagewidth)
        if width * height > max_pixels:
            problem = f"has {width}x{height} pixels, more than max_pixels={max_pixels} allows"
            raise fault(path, "too-many-pixels", problem, "make it smaller, remove it, or raise that limit")
        _check_channels(path, int(first.samplesperpixel) if first.axes in order else len(pages), channels)
        if any((page.dtype, page.shape) != (first.dtype, first.shape) for page in pages):
            raise fault(path, "other-channels", "has pages that differ", "store all channels alike")
        if first.dtype not in (np.uint8, np.uint16):
            problem = f"has values of type {first.dtype}"
            raise fault(path, "bad-image", problem, "convert it to 8 or 16 bits")
        for page in pages:
            check_segments(path, page, version_of(path)[0])
        tag = first.tags.get(_ORIENTATION)
        header = Header.of((height, width), TURNS.get(int(tag.value)) if tag else None, 8 * first.dtype.itemsize)
        if not pixels:
            return header, None
        file.begin_pixels(width * height, jpeg=False)
        arrays = [page.asarray() for page in pages]
    return header, order[first.axes](arrays[0]) if first.axes in order else np.stack(arrays, axis=-1)


def _check_channels(path: Path, present: int, wanted: int) -> None:
    if present != wanted:
        fix = "give data.channels as the images have, or convert this one"
        raise fault(path, "other-channels", f"has {present} channels, not {wanted}", fix)


def check_segments(path: Path, page: Any, size: int) -> None:
    """Raises DataError for strips or tiles that are missing or beyond the end, which tifffile would leave black, and
    for any that may unpack to far more than an image of that size."""
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    complete = len(ends) == math.prod(page.chunked) and min(page.databytecounts, default=0) > 0
    if not complete or max(ends) > size:
        raise fault(path, "bad-image", "is cut off or lacks a part", "copy or download it again, or remove it")
    if max(page.databytecounts) > 2 * math.prod(page.chunks) * page.dtype.itemsize + 1024:
        raise fault(path, "bad-image", "has parts larger than their pixels", "write it anew, or remove it")


def resize_channels(
    image: UInt8[np.ndarray, "H W C"], size: tuple[int, int], interpolation: int, out: UInt8[np.ndarray, "h w C"] | None
) -> UInt8[np.ndarray, "h w C"]:
    """The image at (width, height), into `out` where that is given: four channels at a time, as OpenCV can."""
    import cv2  # takes longer to load than headers to check

    four = (np.ascontiguousarray(image[..., k : k + 4]) for k in range(0, image.shape[2], 4))
    parts = [cv2.resize(part, size, interpolation=interpolation).reshape(size[1], size[0], -1) for part in four]
    return np.concatenate(parts, axis=2, out=out)
