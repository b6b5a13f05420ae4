"""What the readers of other annotation formats share: one record per image, faults with file and line, the checks."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar
from xml.parsers import expat

import numpy as np

from retina.data.alike import scenes
from retina.data.checks import MAX_OVERHANG, alike_names, around_rotated, some
from retina.data.image_files import Header, read_header
from retina.data.image_lists import other_files
from retina.errors import DataError

Xyxy = tuple[float, float, float, float]
T = TypeVar("T")


class RecordError(DataError):
    """One record of a data set cannot be used; text: "problem - fix"."""

    def __init__(self, file: Path, line: int, text: str) -> None:
        super().__init__(f"{file}:{line}: {text}", code="record")
        self.file, self.line, self.text = file, line, text


class Object(NamedTuple):
    """One annotated object: class name and box in pixels of the image after EXIF rotation."""

    name: str
    box: Xyxy
    crowd: bool = False
    is_clipped: bool = False
    """Whether it left the image by more than rounding does."""


class Record(NamedTuple):
    """One image and its objects; no objects is a negative image."""

    image: Path
    file_name: str
    """Where the image goes inside its split's folder: a relative path with `/`."""
    size: tuple[int, int]
    """(height, width) after EXIF rotation."""
    objects: tuple[Object, ...]
    turns_unseen: bool = False
    """Whether EXIF turns the image without a change of its size."""


class Records(NamedTuple):
    """A data set as read: the sound records of each split, every fault, and what is odd.

    A faulty object is missing from its record; an image is missing altogether if its annotations cannot be known, or
    if all its objects are faulty: it is no negative.
    """

    train: tuple[Record, ...]
    val: tuple[Record, ...]
    classes: tuple[str, ...]
    faults: tuple[RecordError, ...]
    warnings: tuple[str, ...] = ()
    test: tuple[Record, ...] = ()
    """Empty where the source has no third split."""


def read_records(
    split: Iterable[T], read: Callable[[T, list[RecordError]], Record], faults: list[RecordError]
) -> tuple[Record, ...]:
    """`read` of each image. It lists faulty objects itself, and raises RecordError for an image that cannot be used."""
    records = []
    for item in split:
        known_faults = len(faults)
        try:
            record = read(item, faults)
        except RecordError as fault:
            faults.append(fault)
            continue
        if record.objects or len(faults) == known_faults:
            records.append(record)
    return tuple(records)


def warnings_of(source: Path, records: Sequence[Record], classes: Sequence[str]) -> list[str]:
    """Warnings of what is read but may not be meant: clipped and repeated boxes, class names that look alike."""
    objects = [(row, item) for row, record in enumerate(records) for item in record.objects]
    lines = []
    if clipped := sum(item.is_clipped for _, item in objects):
        lines.append(f"{source}: {clipped} boxes leave their images: clipped - see that sizes and units are right")
    if repeated := len(objects) - len({(row, item.name, item.box) for row, item in objects}):
        lines.append(f"{source}: {repeated} objects repeat another one of their image - remove them at the source")
    if turned := sum(record.turns_unseen for record in records):
        fix = "look at some with their boxes; where they lie elsewhere, remove the rotation from the file"
        lines.append(f"{source}: {turned} images are turned by EXIF without a change of size - {fix}")
    if others := other_files(source) if source.is_dir() else []:
        names = some([file.name for file in others])
        lines.append(f"{source}: {len(others)} files are no images that can be read: left out ({names}) - convert them")
    return lines + [f"{source}: classes: {line}" for line in alike_names(classes)]


def parse_labels(file: Path, parse: Callable[[bytes], T], kind: str) -> T:
    """What `parse` makes of a label file, or of nothing, where there is none. Raises RecordError.

    kind: what the file should have been."""
    try:
        return parse(file.read_bytes() if file.is_file() else b"")
    except (expat.ExpatError, ValueError, LookupError) as error:
        line = getattr(error, "lineno", 1)
        raise RecordError(file, line, f"not {kind} ({error}) - export the file again or remove it") from error


def header_of(image: Path, labels: Path) -> Header:
    """Raises RecordError, which names the label file, for an image that cannot be read."""
    try:
        return read_header(image)
    except DataError as error:
        raise RecordError(labels, 1, str(error)) from error


def around(box: Xyxy, degrees: float) -> Xyxy:
    """The upright box around one that is turned about its centre."""
    x1, y1, x2, y2 = box
    xywh = around_rotated(np.array([[x1, y1, x2 - x1, y2 - y1]]), np.array([degrees]))
    x, y, width, height = xywh[0].tolist()
    return x, y, x + width, y + height


def make_object(name: str, box: Xyxy, size: tuple[int, int], *, crowd: bool = False) -> Object:
    """An object with its box clipped to the image of `size` (height, width).

    Raises ValueError, as "problem - fix", for a number that is not finite, and for no positive width and height,
    before or after clipping.
    """
    x1, y1, x2, y2 = box
    height, width = size
    overhang = max(-x1, -y1, x2 - width, y2 - height)
    clipped = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if not all(map(math.isfinite, box)):
        problem = "is not finite"
    elif x2 <= x1 or y2 <= y1:
        problem = f"has no area (width {x2 - x1:g}, height {y2 - y1:g})"
    elif clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        problem = f"lies outside the image of {width}x{height}"
    else:
        return Object(name, clipped, crowd, overhang > MAX_OVERHANG)
    numbers = ", ".join(f"{value:g}" for value in box)
    raise ValueError(f"box [{numbers}] {problem} (class {quoted(name)}) - correct or remove the object")


def divide(
    items: Iterable[T],
    val_fraction: float,
    seed: int,
    *,
    key: Callable[[T], str] = str,
    image: Callable[[T], Path | None] = lambda item: None,
) -> tuple[list[T], list[T], list[str]]:
    """(train, val, warnings): `val_fraction` of the items, at least one, drawn for val; both keep the order given.

    image: where the image of an item lies. Those of one scene (frames of a video, say) come into one split, so there
        may be more or fewer of them in val; a single scene is cut in two.

    A pure function of the items' keys, their images and the seed: neither the machine nor the order of the items
    matters. Raises DataError for fewer than two items, since neither split may be empty.
    """
    items = list(items)
    if len(items) < 2:
        problem = f"{len(items)} image(s) cannot be divided into train and val"
        raise DataError(f"splits: {problem} - add images or split lists", code="too-few-images")
    num_val = min(max(round(len(items) * val_fraction), 1), len(items) - 1)

    def rank(row: int) -> bytes:
        return hashlib.sha256(f"{seed}:{key(items[row])}".encode("utf-8", "surrogatepass")).digest()

    groups: dict[int, list[int]] = {}
    for row, scene in enumerate(scenes([image(item) for item in items]).tolist()):
        groups.setdefault(scene, []).append(row)
    ranked = sorted(groups.values(), key=lambda rows: min(map(rank, rows)))
    drawn: list[int] = []
    for rows in ranked:
        drawn += rows if len(drawn) + len(rows) <= num_val else []
    if not drawn:  # all scenes are larger than val is to be
        drawn = min(ranked, key=len) if len(ranked) > 1 else ranked[0][-num_val:]
    val_rows = set(drawn)
    train, val = ([items[row] for row in range(len(items)) if (row in val_rows) == held] for held in (False, True))
    large = [rows for rows in groups.values() if len(rows) > 1]
    problem = (
        f"{sum(map(len, large))} images are of {len(large)} scenes, as frames of a video are: none is in both splits"
    )
    if len(ranked) == 1:
        problem = f"all {len(items)} images look like one scene: val is the end of it, and scores will look too good"
    return train, val, [f"splits: {problem} - look at them, or divide the images yourself"] if large else []


def check_classes(file: Path | str, names: Sequence[str]) -> None:
    """Raises DataError unless there is at least one class name, none empty and none twice."""
    if not names:
        raise DataError(f"{file}: classes: none - name at least one", code="class-names")
    for name in names:
        if not name.strip() or list(names).count(name) > 1:
            problem = f"{name!r} is {'there twice' if name.strip() else 'empty'}"
            raise DataError(f"{file}: classes: {problem} - use distinct names", code="class-names")


def read_lines(file: Path) -> list[str]:
    """The lines of a list of names, without spaces around them. Raises DataError if it is not UTF-8."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except ValueError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}) - save it as UTF-8", code="not-text") from error


def quoted(text: str, limit: int = 40) -> str:
    """Text of a user's file, quoted, on one line and not longer than needed to recognise it."""
    return repr(text if len(text) <= limit else text[:limit] + "...")
