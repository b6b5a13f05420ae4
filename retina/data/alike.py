"""Images that look the same: re-encoded, resized, or frames of one video. Beside the road.

Each image becomes 16 x 16 grey values, of which two things are compared: the signs of the differences between
neighbours (the difference hash of N. Krawetz, 2013), which changes of brightness leave alone, and the values."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt64
from PIL import Image

from retina.data.cache import cache_folder
from retina.data.columns import Columns, read_columns, write_columns
from retina.data.image_files import MAX_PIXELS, opened, turn_of
from retina.data.packs import version_of
from retina.errors import DataError
from retina.files import make_folder

SIDE = 16
_FEW_BITS = 12
"""Of 112 bits of the hash, how many may differ. Other encodings and sizes change up to 6, chance leaves 50."""
_NOISE = 2.0
"""Grey values by which encoding changes even surfaces."""
_CLOSE = 8.0
"""Mean difference of grey values, of 255, once mean and contrast are the same."""
_FLAT = 4.0
"""Standard deviation of grey values below which an image says nothing."""
_ROWS = 256

Thumbs = UInt8[np.ndarray, "_ 16 16"]


def thumbnails(paths: Sequence[Path], *, max_pixels: int = MAX_PIXELS) -> Thumbs:
    """Of each image; one that cannot be read is black. What was made of a set is kept for the next time: it is named by
    paths, lengths and times of the files."""
    entry = _entry(paths)
    if entry and (columns := read_columns(entry)):
        return columns.arrays["thumbs"]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        thumbs = np.array([*pool.map(lambda path: _thumbnail(path, max_pixels), paths)], dtype=np.uint8)
    thumbs = thumbs.reshape(-1, SIDE, SIDE)
    if entry:
        with suppress(OSError):  # only time is lost
            make_folder(entry.parent, mode=0o700)
            write_columns(entry, Columns({"thumbs": thumbs}, {}))
    return thumbs


def _entry(paths: Sequence[Path]) -> Path | None:
    folder = cache_folder()
    if folder is None or len(paths) < 200:
        return None
    digest = hashlib.sha256()
    for path in paths:
        try:
            version = version_of(path)
        except (OSError, DataError):
            return None
        digest.update(json.dumps([str(path.absolute()), *version]).encode())
    return folder / f"{digest.hexdigest()}.thumbs"


def _thumbnail(path: Path, max_pixels: int) -> UInt8[np.ndarray, "16 16"]:
    try:
        with opened(path, max_pixels) as image:
            turn = turn_of(image)
            image.draft("L", (4 * SIDE, 4 * SIDE))
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
            return np.asarray(small if turn is None else small.transpose(turn))
    except DataError:
        return np.zeros((SIDE, SIDE), dtype=np.uint8)


def twins(ones: Thumbs, others: Thumbs) -> dict[int, int]:
    """For each of `others` that looks like one of `ones`, the row of the one that is most alike."""
    found: dict[int, tuple[int, float]] = {}
    hashes, normal = _hashes(ones), _normal(ones)
    usable = ones.std(axis=(1, 2)) >= _FLAT
    for first in range(0, len(others), _ROWS):
        part = others[first : first + _ROWS]
        bits = np.bitwise_count(_hashes(part)[:, None] ^ hashes[None]).sum(axis=2)
        candidates = (bits <= _FEW_BITS) & usable & (part.std(axis=(1, 2)) >= _FLAT)[:, None]
        normal_part = _normal(part)
        for row, column in zip(*np.nonzero(candidates), strict=True):
            distance = float(np.abs(normal_part[row] - normal[column]).mean())
            if distance <= _CLOSE and distance < found.get(first + int(row), (0, np.inf))[1]:
                found[first + int(row)] = (int(column), distance)
    return {row: column for row, (column, _) in found.items()}


def follows(thumbs: Thumbs) -> Bool[np.ndarray, "_"]:
    """Whether each image but the first looks like the one before it."""
    bits = np.bitwise_count(_hashes(thumbs[1:]) ^ _hashes(thumbs[:-1])).sum(axis=1)
    distance = np.abs(_normal(thumbs[1:]) - _normal(thumbs[:-1])).mean(axis=(1, 2))
    usable = thumbs.std(axis=(1, 2)) >= _FLAT
    return (bits <= 2 * _FEW_BITS) & (distance <= 2 * _CLOSE) & usable[1:] & usable[:-1]


def _hashes(thumbs: Thumbs) -> UInt64[np.ndarray, "_ 2"]:
    """112 bits: of 8 x 8 means, whether the right and the lower neighbour are brighter, by more than noise is."""
    means = thumbs.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    across = (means[:, :, 1:] > means[:, :, :-1] + _NOISE).reshape(-1, 56)
    down = (means[:, 1:] > means[:, :-1] + _NOISE).reshape(-1, 56)
    both = np.concatenate([np.pad(bits, ((0, 0), (0, 8))) for bits in (across, down)], axis=1)
    return np.packbits(both, axis=1).view(np.uint64).reshape(-1, 2)


def _normal(thumbs: Thumbs) -> Float32[np.ndarray, "_ 16 16"]:
    """With mean 0 and a standard deviation of 50."""
    values = thumbs.astype(np.float32)
    values -= values.mean(axis=(1, 2), keepdims=True)
    return values * (50 / np.maximum(values.std(axis=(1, 2), keepdims=True), 1e-3))


def scenes(paths: Sequence[Path | None]) -> Int64[np.ndarray, "_"]:
    """The number of the scene that each image is of: those of one belong into one split.

    Images of a folder are taken in the order of the numbers in their names. One that looks like the one before is of
    its scene, as frames of a video; where half of those with the same name but the number are, all of them are. So are
    the copies that Roboflow makes of an image (`NAME.rf.HASH.jpg`). None is a scene of its own.
    """
    names = ["" if path is None else str(path.with_suffix("")) for path in paths]
    order = sorted((row for row, name in enumerate(names) if name), key=lambda row: _natural(names[row]))
    number = np.arange(len(paths))
    if len(order) < 2:
        return number
    linked = follows(thumbnails([paths[row] for row in order]))  # type: ignore[misc]
    series = [re.sub(r"\d+$", "", names[row]) for row in order]
    neighbours: dict[str, list[bool]] = {}
    for one, two, is_linked in zip(series, series[1:], linked.tolist(), strict=False):
        if one == two:
            neighbours.setdefault(one, []).append(is_linked)
    videos = {name for name, links in neighbours.items() if np.mean(links) >= 0.5}
    for place, (before, row) in enumerate(itertools.pairwise(order)):
        same_folder = os.path.dirname(names[before]) == os.path.dirname(names[row])
        same_series = series[place] == series[place + 1]
        same_source = ".rf." in names[row] and names[row].partition(".rf.")[0] == names[before].partition(".rf.")[0]
        if (same_folder and linked[place]) or (same_series and series[place] in videos) or same_source:
            number[row] = number[before]
    return number


def _natural(name: str) -> list[tuple[str, int]]:
    """`a2` before `a10`."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
