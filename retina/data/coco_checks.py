"""The checks of COCO annotation files: what a file must be as a whole, and what each of its records must be.

A file that is not built like one raises at once; faults of single records are collected, one line each.
"""

import difflib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retina.errors import DataError

_REQUIRED = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
}
_LARGEST_ID = 2**63 - 1


class RecordsError(DataError):
    """Faults in records of one file. `str()` is the first and how many more; `faults` holds one line for each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(faults)
        self.faults = [fault.replace("\n", " ") for fault in faults]

    def __str__(self) -> str:
        return self.faults[0] + (f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else "")


def load_document(file: Path) -> dict[str, Any]:
    """Parse the file and check what holds the records, not the records."""
    if not file.is_file():
        raise DataError(f"{file}: no such annotation file{listing(file.parent)} - give the path of a COCO JSON file")
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}) - check its permissions and the disk") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON ({error}) - export it again, or finish its download") from error
    if isinstance(document, list):
        raise DataError(
            f"{file}: is a list, as files of detection results are, not an object - give the annotation file, the one "
            "with `images`, `annotations` and `categories`"
        )
    if not isinstance(document, dict):
        raise DataError(f"{file}: holds a {type(document).__name__}, not an object - give a COCO annotation file")
    for section in ("images", "annotations", "categories"):
        if not isinstance(document.get(section), list):
            state = "is not a list" if section in document else f"is missing (there is {some(list(document))})"
            raise DataError(f"{file}: `{section}` {state} - give a COCO annotation file, or export it again")
        if not document[section] and section != "annotations":
            raise DataError(f"{file}: `{section}` is empty - give a file with at least one record there")
    return document


def check_categories(file: Path, records: list[Any], faults: list[str]) -> dict[int, str]:
    """Name of every category id. Ids of faulty records count too, so that one fault does not cause thousands."""
    name_of: dict[int, str] = {}
    taken: dict[str, int] = {}
    for position, record in enumerate(records):
        problem = _missing_keys(record, "categories")
        if not problem and not _is_id(record["id"]):
            problem = f"id {record['id']!r} is not a whole number - number the categories"
        if problem:
            faults.append(f"{file}: categories[{position}]: {problem}")
            continue
        category_id, name = record["id"], record["name"]
        if category_id in name_of:
            problem = f"id is already that of {name_of[category_id]!r} - give every category its own id"
        elif not isinstance(name, str) or not name.strip():
            problem = f"name {name!r} is no text - give every category a name"
        elif name in taken:
            problem = f"name {name!r} is already that of category {taken[name]} - merge the two, or rename one"
        if problem:
            faults.append(f"{file}: category {category_id}: {problem}")
        name_of.setdefault(category_id, str(name))
        taken.setdefault(str(name), category_id)
    return name_of


def check_images(
    file: Path, records: list[Any], faults: list[str]
) -> tuple[dict[int, int], list[str], list[tuple[int, int]]]:
    """Row of every image id, with names and (height, width) by row. Ids of faulty records count too."""
    row_of: dict[int, int] = {}
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    for position, record in enumerate(records):
        problem = _missing_keys(record, "images")
        if not problem and not _is_id(record["id"]):
            problem = f"id {record['id']!r} is not a whole number - number the images"
        if problem:
            faults.append(f"{file}: images[{position}]: {problem}")
            if isinstance(record, dict) and _is_id(record.get("id")):
                row_of.setdefault(record["id"], len(names))
                names.append(str(record.get("file_name", "no file_name")))
                sizes.append((1, 1))
            continue
        image_id, name, height, width = record["id"], record["file_name"], record["height"], record["width"]
        if image_id in row_of:
            problem = f"id is already that of {names[row_of[image_id]]} - give every image its own id"
        elif not isinstance(name, str) or not name:
            problem = f"file_name {name!r} is no text - give the image's path inside the image folder"
        elif not all(_is_number(side) and 0 < side < 2**31 and side == int(side) for side in (height, width)):
            problem = f"width {width!r} and height {height!r} are not whole numbers above 0 - give the image's pixels"
        if problem:
            faults.append(f"{file}: image {image_id} ({name}): {problem}")
            height = width = 1
        row_of.setdefault(image_id, len(names))
        names.append(str(name))
        sizes.append((int(height), int(width)))
    return row_of, names, sizes


def check_annotations(
    file: Path,
    records: list[Any],
    row_of: Mapping[int, int],
    file_names: Sequence[str],
    name_of: Mapping[int, str],
    classes: Sequence[str],
    faults: list[str],
) -> None:
    """Every annotation must be whole and of an image and a category of the file, the latter one of `classes`."""
    known = {category_id for category_id, name in name_of.items() if name in classes}
    outside: Counter[int] = Counter()
    for position, record in enumerate(records):
        problem = _annotation_problem(record, row_of, name_of)
        if problem:
            faults.append(f"{file}: {_describe(record, position, row_of, file_names)}: {problem}")
        elif record["category_id"] not in known:
            outside[record["category_id"]] += 1
    for category_id, count in outside.items():
        name = name_of[category_id]
        faults.append(
            f"{file}: category {category_id} ({name}): used by {count} annotation{'s' * (count > 1)} but not among the "
            f"classes {some(classes)} - {_nearest(name, classes)}"
        )


def _annotation_problem(record: Any, row_of: Mapping[int, int], name_of: Mapping[int, str]) -> str | None:
    """The first fault of an annotation as "problem - fix", or None."""
    problem = _missing_keys(record, "annotations")
    if problem:
        return problem
    image_id, category_id, box, area = record["image_id"], record["category_id"], record["bbox"], record.get("area")
    if not _is_id(image_id) or image_id not in row_of:
        return f"image_id {image_id!r} is not in `images` - add the image, or remove the annotation"
    if not _is_id(category_id) or category_id not in name_of:
        return f"category_id {category_id!r} is not in `categories` - add the category, or correct the id"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox {box!r:.80} is not four finite numbers - write [x, y, width, height] in pixels"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {box!r} has a negative side (width {box[2]}, height {box[3]}) - correct or remove it"
    if area is not None and not (_is_number(area) and area >= 0):
        return f"area {area!r} is not a number from 0 up - correct it, or leave it out"
    if record.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd {record['iscrowd']!r} is neither 0 nor 1 - correct it, or leave it out"
    return None


def _missing_keys(record: Any, section: str) -> str | None:
    if not isinstance(record, dict):
        return f"is {record!r:.40}, not an object - write an object with {', '.join(_REQUIRED[section])}"
    for key in _REQUIRED[section]:
        if key not in record:
            return f"has no `{key}` - add it"
    return None


def _describe(record: Any, position: int, row_of: Mapping[int, int], file_names: Sequence[str]) -> str:
    """`annotation 17 of image 5 (a.jpg)`, as far as the record says so."""
    if not isinstance(record, dict):
        return f"annotations[{position}]"
    who = f"annotation {record['id']}" if _is_id(record.get("id")) else f"annotations[{position}]"
    image_id: Any = record.get("image_id")
    if _is_id(image_id) and image_id in row_of:
        who += f" of image {image_id} ({file_names[row_of[image_id]]})"
    return who


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST_ID


def _is_number(value: Any) -> bool:
    """A finite number of JSON: neither true nor "1" nor NaN, and not an integer beyond float64."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "") if names else "nothing"


def listing(folder: Path) -> str:
    """What a reader who looked in vain may want to see: the content of the nearest folder that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    return f", but {folder} holds {some(names)}"


def _nearest(name: str, classes: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, classes, n=1)
    if close:
        return f"rename it to {close[0]!r} if that is meant, or remove its annotations"
    return "remove its annotations, or train with this class"
