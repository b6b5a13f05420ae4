"""The checks of single records of COCO annotation files: every fault is collected, one line each, in a report."""

import difflib
import json
import posixpath
import re
import reprlib
import sys
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.data.ids import LARGEST_ID, is_id
from retina.data.paths import links_outside, name_problem
from retina.errors import DataError, plain
from retina.files import make_folder, write_whole

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlist = _REPR.maxdict = 6
_REPR.maxlevel = 3


@dataclass
class DataReport:
    """Faults and warnings of a data set, each one line as in `retina.errors`.

    A fault keeps records from being used as they are; a warning does not.
    """

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was read of each split: places and counts."""
    advice: list[str] = field(default_factory=list)
    """What a sound data set asks of the settings."""

    def lines(self, limit: int = 20) -> list[str]:
        """For a screen: at most `limit` faults, then at most `limit` warnings; no kind crowds out another."""
        return _digest(self.faults, limit) + [f"warning: {line}" for line in _digest(self.warnings, limit)]

    def write(self, file: Path) -> None:
        """All of it as JSON, in one step, with the folder. Raises OSError."""
        content = {
            "healthy": not self.faults,
            "num_faults": len(self.faults),
            "num_warnings": len(self.warnings),
            "splits": self.splits,
            "faults": [plain(line) for line in self.faults],
            "warnings": [plain(line) for line in self.warnings],
            "advice": [plain(line) for line in self.advice],
        }
        make_folder(file.parent)
        write_whole(file, (json.dumps(content, indent=2) + "\n").encode("ascii"))  # names are escaped, odd ones too


def brief(value: object) -> str:
    """A user's value as Python writes it, cut where it is wider or deeper than needed to recognise it."""
    return _REPR.repr(value)


def _digest(lines: Sequence[str], limit: int) -> list[str]:
    """The lines themselves if they are few; else the first of every kind, with how many more there are of it."""
    if len(lines) <= limit:
        return [plain(line) for line in lines]
    kinds: dict[str, list[str]] = {}
    for line in lines:  # those with the same remedy, except for the names and numbers in it, have one cause
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", line.rpartition(" - ")[2])
        kinds.setdefault(kind, []).append(line)
    share = max(1, limit // len(kinds))
    shown = []
    for same in list(kinds.values())[:limit]:
        shown += [plain(line) for line in same[:share]]
        if len(same) > share:
            shown[-1] += f" (and {len(same) - share:,} more like it)"
    if len(kinds) > limit:
        shown.append(f"and {sum(map(len, list(kinds.values())[limit:])):,} more")
    return shown


def alike_names(classes: Sequence[str]) -> list[str]:
    """One line for class names that differ in case or white space only, as "problem - fix"."""
    spellings: dict[str, list[str]] = {}
    for name in classes:
        spellings.setdefault("".join(name.split()).casefold(), []).append(brief(name))
    alike = [" and ".join(names) for names in spellings.values() if len(names) > 1]
    problem = f"{some(alike)} differ in case or blanks only, and are classes of their own"
    return [f"{problem} - if one is meant, give it one name and category"] if alike else []


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    first = ", ".join(name if len(name) <= 80 else brief(name) for name in names[:8])
    return first + (f", ... ({len(names)} in all)" if len(names) > 8 else "") if names else "nothing"


_REQUIRED = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
}


class RecordsError(DataError):
    """Faults in records of one file. `str()` is the first and how many more; `faults` holds one line for each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(faults[0], code="records")
        self.args = (faults,)  # what it is made of anew in another process
        self.faults = [plain(fault) for fault in faults]

    def __str__(self) -> str:
        return self.faults[0] + (f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else "")


class ImageRecord(NamedTuple):
    """A sound record of `images`."""

    id: int | str
    name: str
    size: tuple[int, int]
    """(height, width)"""


@dataclass
class Images:
    """The records of `images`, sorted into those to use and those not."""

    sound: list[ImageRecord] = field(default_factory=list)
    left_out: dict[int | str, str] = field(default_factory=dict)
    """File name of every id that a faulty record claims. Its annotations are not faulty for that, but have no image."""
    ids_unclear: bool = False
    """Whether a record lacks the id that others may refer to: then an unknown id is not one more fault."""


def check_categories(file: Path, records: list[Any], report: DataReport) -> dict[int, str]:
    """Name of every category id. Ids of faulty records count too, so that one fault does not cause thousands."""
    name_of: dict[int, str] = {}
    id_of: dict[str, int] = {}
    for record in _with_ids(file, "categories", records, report)[0]:
        category_id, name = record["id"], record["name"]
        problem = None
        if category_id in name_of:
            problem = f"id is already that of {brief(name_of[category_id])} - give every category its own id"
        elif not isinstance(name, str) or not name.strip():
            problem = f"name {brief(name)} is no text - give every category a name"
        elif name in id_of:
            problem = f"name {brief(name)} is already that of category {id_of[name]} - merge the two, or rename one"
        if problem:
            report.faults.append(f"{file}: category {category_id}: {problem}")
        name_of.setdefault(category_id, str(name))
        id_of.setdefault(str(name), category_id)
    return name_of


def check_images(file: Path, records: list[Any], report: DataReport, *, allow_outside: bool) -> Images:
    """The images and their faults. Of records that contradict each other, none is used; of equal ones, the first."""
    images = Images()
    by_id: dict[int | str, ImageRecord] = {}
    by_path: dict[str, ImageRecord] = {}
    by_folded: dict[str, ImageRecord] = {}
    sound, others = _with_ids(file, "images", records, report)
    for record in others:
        if isinstance(record, dict) and is_id(record.get("id")):
            images.left_out[record["id"]] = str(record.get("file_name", "no file_name"))
        else:
            images.ids_unclear = True
    for record in sound:
        image_id, name = record["id"], record["file_name"]
        where = f"{file}: image {image_id} ({name if isinstance(name, str) else brief(name)})"
        if problem := _image_problem(record, allow_outside):
            report.faults.append(f"{where}: {problem}")
            images.left_out[image_id] = str(name)
            continue
        image = ImageRecord(image_id, name, (int(record["height"]), int(record["width"])))
        path = posixpath.normpath(name) if "./" in name or "//" in name else name
        folded = path.casefold()
        if twin := by_id.get(image_id) or by_path.get(path):
            problem = f"file_name is already that of image {twin.id} - merge the two records"
            if twin.id == image_id:
                problem = f"id is already that of {twin.name} - give every image its own id"
                images.ids_unclear = True
            report.faults.append(f"{where}: {problem}")
            if (twin.id, twin.name) != (image_id, name):
                images.left_out |= {image_id: name, twin.id: twin.name}
            continue
        if alike := by_folded.get(folded):
            report.warnings.append(
                f"{where}: differs from image {alike.id} ({alike.name}) in case only - rename one: on some disks they "
                "are one file"
            )
        by_id[image_id] = by_path[path] = by_folded[folded] = image
        images.sound.append(image)
    images.sound = [image for image in images.sound if image.id not in images.left_out]
    return images


def check_links(file: Path, images: Images, image_root: Path, report: DataReport) -> bool:
    """Takes out the images that symbolic links lead out of the image folder; whether there are any."""
    outside = links_outside(image_root, [image.name for image in images.sound])
    for row, target in outside.items():
        image = images.sound[row]
        report.faults.append(
            f"{file}: image {image.id} ({image.name}): a symbolic link leads out of the image folder, to "
            f"{brief(target)} - copy the file there, or set allow_outside=true"
        )
        images.left_out[image.id] = image.name
    images.sound = [image for image in images.sound if image.id not in images.left_out]
    return bool(outside)


def check_annotations(
    file: Path,
    pieces: Iterable[tuple[int, list[Any]]],
    images: Images,
    name_of: Mapping[int, str],
    classes: Sequence[str],
    report: DataReport,
) -> tuple[Int64[np.ndarray, "A"], set[int | str]]:
    """Positions of the annotations that are whole, of a sound image, and of a category that is one of `classes`; and
    the ids of images that have others."""
    names = images.left_out | {image.id: image.name for image in images.sound}
    known = {category_id for category_id, name in name_of.items() if name in classes}
    outside: Counter[int] = Counter()
    sound = array("q")  # millions of Python's integers would take five times the memory
    ids = _Ids()
    faulty: set[int | str] = set()
    for position, record in chain.from_iterable(enumerate(records, first) for first, records in pieces):
        ids.add(record)
        problem = _annotation_problem(record, names, name_of)
        if problem and images.ids_unclear and problem.startswith("image_id "):
            continue
        if problem:
            report.faults.append(f"{file}: {describe(record, position, names)}: {problem}")
            if isinstance(record, dict) and is_id(record.get("image_id")):
                faulty.add(record["image_id"])
        elif record["category_id"] not in known:
            outside[record["category_id"]] += 1
            faulty.add(record["image_id"])
        elif record["image_id"] not in images.left_out:
            sound.append(position)
    for category_id, count in outside.items():
        name = name_of[category_id]
        close = difflib.get_close_matches(name, classes, n=1)
        fix = "remove its annotations, or train with this class"
        if close:
            fix = f"rename it to {close[0]!r} if that is meant, or remove its annotations"
        report.faults.append(
            f"{file}: category {category_id} ({name}): used by {count} annotation{'s' * (count > 1)} but not among the "
            f"classes {some(classes)} - {fix}"
        )
    # annotation ids mean nothing here, but other tools drop annotations over them
    if twice := ids.twice():
        report.warnings.append(
            f"{file}: annotations: id {some(twice)} used more than once - renumber them for other tools; here they are "
            "not used"
        )
    return np.array(sound, dtype=np.int64), faulty


class _Ids:
    """Ids of annotations, of which some may be used more than once."""

    def __init__(self) -> None:
        self._numbers = array("q")
        self._texts: Counter[str] = Counter()

    def add(self, record: Any) -> None:
        value = record.get("id") if isinstance(record, dict) else None
        if type(value) is int and abs(value) <= LARGEST_ID:
            self._numbers.append(value)
        elif is_id(value):
            self._texts[value] += 1  # type: ignore[index]

    def twice(self) -> list[str]:
        """Those that are used more than once, in the order of their first use."""
        values, firsts, counts = np.unique(np.array(self._numbers), return_index=True, return_counts=True)
        repeated = sorted(zip(firsts[counts > 1].tolist(), values[counts > 1].tolist(), strict=True))
        return [str(value) for _, value in repeated] + [text for text, count in self._texts.items() if count > 1]


def describe(record: Any, position: int, names: Mapping[int | str, str]) -> str:
    """`annotation 17 of image 5 (a.jpg)`, as far as the record says so. `names` are file names by image id."""
    if not isinstance(record, dict):
        return f"annotations[{position}]"
    who = f"annotation {record['id']}" if is_id(record.get("id")) else f"annotations[{position}]"
    image_id: Any = record.get("image_id")
    return who + (f" of image {image_id} ({names[image_id]})" if is_id(image_id) and image_id in names else "")


def _image_problem(record: Mapping[str, Any], allow_outside: bool) -> str | None:
    name, height, width = record["file_name"], record["height"], record["width"]
    if not isinstance(name, str) or not name:
        return f"file_name {brief(name)} is no text - give the image's path inside the image folder"
    if problem := name_problem(name, allow_outside=allow_outside):
        return problem
    if not all(_is_number(side) and 0 < side < 2**31 and side == int(side) for side in (height, width)):
        sides = f"width {brief(width)} and height {brief(height)}"
        return f"{sides} are not whole numbers above 0 - give the image's pixels"
    return None


def _annotation_problem(record: Any, images: Container[int | str], categories: Container[int]) -> str | None:
    """The first fault of an annotation as "problem - fix", or None."""
    problem = _missing_keys(record, "annotations")
    if problem:
        return problem
    image_id, category_id, box, area = record["image_id"], record["category_id"], record["bbox"], record.get("area")
    if not is_id(image_id) or image_id not in images:
        return f"image_id {brief(image_id)} is not in `images` - add the image, or remove the annotation"
    if not is_id(category_id) or category_id not in categories:
        return f"category_id {brief(category_id)} is not in `categories` - add the category, or correct the id"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox {brief(box)} is not four finite numbers - write [x, y, width, height] in pixels"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {brief(box)} has a negative side (width {box[2]}, height {box[3]}) - correct or remove it"
    if area is not None and not (_is_number(area) and area >= 0):
        return f"area {brief(area)} is not a number from 0 up - correct it, or leave it out"
    if record.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd {brief(record['iscrowd'])} is neither 0 nor 1 - correct it, or leave it out"
    return None


def _with_ids(file: Path, section: str, records: list[Any], report: DataReport) -> tuple[list[Any], list[Any]]:
    """Records that have all keys and an id, and the others, which are faults. Only images may have text as id."""
    sound: list[Any] = []
    others: list[Any] = []
    for position, record in enumerate(records):
        problem = _missing_keys(record, section)
        if not problem and not (is_id(record["id"]) and (section == "images" or type(record["id"]) is int)):
            problem = f"id {brief(record['id'])} is not a whole number - number the {section}"
        if problem:
            report.faults.append(f"{file}: {section}[{position}]: {problem}")
        (others if problem else sound).append(record)
    return sound, others


def _missing_keys(record: Any, section: str) -> str | None:
    if not isinstance(record, dict):
        return f"is {brief(record)}, not an object - write an object with {', '.join(_REQUIRED[section])}"
    for key in _REQUIRED[section]:
        if key not in record:
            return f"has no `{key}` - add it"
    return None


def _is_number(value: Any) -> bool:
    """A finite number of JSON: neither true nor "1" nor NaN, and not an integer beyond float64."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


# Boxes against their images, vectorised, because annotation files have a million of them. Boxes are COCO's
# [x, y, width, height] in pixels.
MAX_OVERHANG = 1.0
"""Pixels by which a box may leave its image: rounding in annotation tools, clipped."""
_FARTHEST = 2.0**31
UNKNOWN = 2**31 - 1
"""Sides of an image of which nothing is known: boxes are not compared with them."""
_ENOUGH = 3  # boxes from which on a file may be judged as a whole
_NEARLY_ALL = 0.99
_OFTEN = 0.3  # share of boxes leaving their images that true [x, y, width, height] never has


class BoxProblem(NamedTuple):
    """Something about one box, as "problem - fix"."""

    row: int
    text: str
    is_fault: bool


def convention_problem(xywh: Float64[np.ndarray, "T 4"], sizes: Int64[np.ndarray, "T 2"]) -> str | None:
    """Tells that a whole file is normalised to 0..1, or holds [x1, y1, x2, y2], as "problem - fix".

    `sizes` are (height, width) of the image of every box. Fractions: nearly all numbers are within 0..1 and some are no
    integers. Corners: nearly all boxes are sound when read so, while as [x, y, width, height] many leave their images.
    """
    if len(xywh) < _ENOUGH or sizes.min() == UNKNOWN:
        return None
    small = ((xywh >= 0) & (xywh <= 1)).all(axis=1)
    if small.mean() >= _NEARLY_ALL and (xywh != np.round(xywh)).any() and sizes.min() > 1:
        return (
            f"{small.mean():.0%} of the boxes lie within 0..1, so they are fractions of the image - multiply x and "
            "width by the image's width, y and height by its height (tools/convert.py format=yolo reads YOLO labels)"
        )
    height, width = sizes.T
    corners = (xywh[:, 2] > xywh[:, 0]) & (xywh[:, 3] > xywh[:, 1])
    corners &= (xywh[:, 2] <= width + MAX_OVERHANG) & (xywh[:, 3] <= height + MAX_OVERHANG)
    leaving = (_overhang(xywh, sizes) > MAX_OVERHANG).mean()
    if corners.mean() >= _NEARLY_ALL and leaving >= _OFTEN and leaving * len(xywh) >= _ENOUGH - 1:
        return (
            f"the boxes are [x1, y1, x2, y2]: so read they fit, as [x, y, width, height] {leaving:.0%} of them leave "
            "their images - write [x1, y1, x2 - x1, y2 - y1]"
        )
    return None


def box_problems(xywh: Float64[np.ndarray, "T 4"], sizes: Int64[np.ndarray, "T 2"]) -> Iterator[BoxProblem]:
    """What is wrong (outside the image) or odd (partly outside, no area, below a pixel) about single boxes, by row.

    The numbers must be finite and no side negative. Of several problems of a box, the gravest."""
    unknown = sizes[:, 0] == UNKNOWN
    overhang = np.where(unknown, 0.0, _overhang(xywh, sizes))
    with np.errstate(over="ignore"):
        reach = np.minimum(xywh[:, :2] + xywh[:, 2:], sizes[:, ::-1]) - np.maximum(xywh[:, :2], 0)
    outside = ~unknown & ((reach < 0) | ((reach == 0) & (xywh[:, 2:] > 0))).any(axis=1)
    side = xywh[:, 2:].min(axis=1)
    too_far = np.abs(xywh).max(axis=1, initial=0) > _FARTHEST
    image = "the image of {width}x{height}"
    kinds: list[tuple[Bool[np.ndarray, "T"], str, bool]] = [
        (too_far, "is larger than any image - correct or remove it", True),
        (outside, f"lies outside {image} - correct it, or the image's width and height", True),
        (
            overhang > MAX_OVERHANG,
            f"leaves {image} by {{by:g}} px - training clips it; correct it, or the image's width and height",
            False,
        ),
        (side == 0, "has no area - training leaves it out; correct or remove it", False),
        (side < 1, "is less than a pixel wide or high - training may leave it out; check its units", False),
    ]
    reported = np.zeros(len(xywh), dtype=np.bool_)
    problems: list[BoxProblem] = []
    for mask, text, is_fault in kinds:
        for row in np.flatnonzero(mask & ~reported).tolist():
            height, width = sizes[row].tolist()
            numbers = ", ".join(f"{value:.12g}" for value in xywh[row].tolist())
            words = text.format(width=width, height=height, by=overhang[row])
            problems.append(BoxProblem(row, f"bbox [{numbers}] {words}", is_fault))
        reported |= mask
    return iter(sorted(problems))


def around_rotated(xywh: Float64[np.ndarray, "T 4"], degrees: Float64[np.ndarray, "T"]) -> Float64[np.ndarray, "T 4"]:
    """The upright boxes around boxes that are turned about their centres, as CVAT exports them: unturned."""
    cos, sin = np.abs(np.cos(np.deg2rad(degrees))), np.abs(np.sin(np.deg2rad(degrees)))
    width, height = xywh[:, 2], xywh[:, 3]
    sides = np.stack([width * cos + height * sin, width * sin + height * cos], axis=1)
    return np.round(np.concatenate([xywh[:, :2] + (xywh[:, 2:] - sides) / 2, sides], axis=1), 6)


def _overhang(xywh: Float64[np.ndarray, "T 4"], sizes: Int64[np.ndarray, "T 2"]) -> Float64[np.ndarray, "T"]:
    """Pixels by which each box leaves its image at the worst edge; negative inside."""
    with np.errstate(over="ignore"):  # 1e308 is a number too
        beyond = xywh[:, :2] + xywh[:, 2:] - sizes[:, ::-1]
    return np.maximum(beyond, -xywh[:, :2]).max(axis=1, initial=-np.inf)
