"""What the readers of other annotation formats share: one record per image, faults with file and line, the checks."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from retina.errors import DataError

MAX_OVERHANG = 1.0
"""Pixels by which a box may leave its image: rounding in annotation tools, clipped. More is a fault."""

Xyxy = tuple[float, float, float, float]
T = TypeVar("T")


class Fault(NamedTuple):
    """Something wrong with one record of a data set. `str()` is one line, as in `retina.errors`."""

    file: Path
    line: int
    problem: str
    fix: str

    def __str__(self) -> str:
        return " ".join(f"{self.file}:{self.line}: {self.problem} - {self.fix}".split("\n"))


class Object(NamedTuple):
    """One annotated object: class name and box in pixels of the image after EXIF rotation."""

    name: str
    box: Xyxy
    crowd: bool = False


class Record(NamedTuple):
    """One image and its objects; no objects is a negative image."""

    image: Path
    file_name: str
    """Where the image goes inside its split's folder: a relative path with `/`."""
    size: tuple[int, int]
    """(height, width) after EXIF rotation."""
    objects: tuple[Object, ...]


class Records(NamedTuple):
    """A data set as read: the sound records of each split, and every fault met on the way.

    A faulty object is missing from its record; an image whose annotations cannot be known is missing altogether.
    """

    train: tuple[Record, ...]
    val: tuple[Record, ...]
    classes: tuple[str, ...]
    faults: tuple[Fault, ...]


def check_box(box: Xyxy, size: tuple[int, int]) -> Xyxy | str:
    """The box clipped to the image of `size` (height, width), or what is wrong with it in words.

    Wrong are: a number that is not finite, no positive width and height (before or after clipping), and an overhang of
    more than `MAX_OVERHANG` pixels.
    """
    x1, y1, x2, y2 = box
    height, width = size
    shown = f"[{', '.join(f'{value:g}' for value in box)}]"
    if not all(math.isfinite(value) for value in box):
        return f"box {shown} is not finite"
    if x2 <= x1 or y2 <= y1:
        return f"box {shown} has no area (width {x2 - x1:g}, height {y2 - y1:g})"
    overhang = max(-x1, -y1, x2 - width, y2 - height)
    if overhang > MAX_OVERHANG:
        return f"box {shown} leaves the image of {width}x{height} by {overhang:g} px"
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if x2 <= x1 or y2 <= y1:
        return f"box {shown} lies outside the image of {width}x{height}"
    return x1, y1, x2, y2


def divide(
    items: Iterable[T], val_fraction: float, seed: int, *, key: Callable[[T], str] = str
) -> tuple[list[T], list[T]]:
    """(train, val): `val_fraction` of the items, at least one, drawn for val; both keep the order given.

    A pure function of the items' keys and the seed: neither the machine nor the order of the items matters.
    Raises DataError for fewer than two items, since neither split may be empty.
    """
    items = list(items)
    if len(items) < 2:
        problem = f"{len(items)} image(s) cannot be divided into train and val"
        raise DataError(f"splits: {problem} - add images or split lists", code="too-few-images")
    num_val = min(max(round(len(items) * val_fraction), 1), len(items) - 1)
    ranked = sorted(
        range(len(items)),
        key=lambda i: hashlib.sha256(f"{seed}:{key(items[i])}".encode("utf-8", "surrogatepass")).digest(),
    )
    chosen = set(ranked[:num_val])
    return [x for i, x in enumerate(items) if i not in chosen], [x for i, x in enumerate(items) if i in chosen]


def check_classes(file: Path | str, names: Sequence[str]) -> None:
    """Raises DataError unless there is at least one class name, none empty and none twice."""
    if not names:
        raise DataError(f"{file}: classes: none - name at least one", code="class-names")
    for i, name in enumerate(names):
        if not name.strip() or name in names[:i]:
            problem = f"{name!r} is {'there twice' if name else 'empty'}"
            raise DataError(f"{file}: classes: {problem} - use distinct names", code="class-names")


def refusal(code: str, file: Path, problem: str) -> DataError:
    """For a data set that cannot be read at all; `problem` says how to fix it too."""
    return DataError(f"{file}: {problem}", code=code)


def read_text(file: Path) -> str:
    """The content of a list or label file, with or without a byte order mark. Raises DataError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise refusal("not-text", file, f"not UTF-8 text ({error}) - save it as UTF-8") from error


def shown(text: str, limit: int = 40) -> str:
    """Text of a user's file, quoted, on one line and not longer than needed to recognise it."""
    return repr(text if len(text) <= limit else text[:limit] + "...")
