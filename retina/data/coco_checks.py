"""The checks of single records of COCO annotation files: every fault is collected, one line each."""

import difflib
import posixpath
import sys
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from retina.data.coco_document import some
from retina.data.paths import links_outside, name_problem
from retina.data.report import brief
from retina.errors import DataError, plain

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
        self.faults = [plain(fault) for fault in faults]

    def __str__(self) -> str:
        return self.faults[0] + (f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else "")


class Image(NamedTuple):
    """A sound record of `images`."""

    id: int
    name: str
    size: tuple[int, int]
    """(height, width)"""


@dataclass
class Images:
    """The records of `images`, sorted into those to use and those not."""

    sound: list[Image] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    """File name of every id that a faulty record claims. Its annotations are not faulty for that, but have no image."""
    ids_unclear: bool = False
    """Whether a record lacks the id that others may refer to: then an unknown id is not one more fault."""


def check_categories(file: Path, records: list[Any], faults: list[str]) -> dict[int, str]:
    """Name of every category id. Ids of faulty records count too, so that one fault does not cause thousands."""
    name_of: dict[int, str] = {}
    taken: dict[str, int] = {}
    for position, record in enumerate(records):
        problem = _missing_keys(record, "categories")
        if not problem and not _is_id(record["id"]):
            problem = f"id {brief(record['id'])} is not a whole number - number the categories"
        if problem:
            faults.append(f"{file}: categories[{position}]: {problem}")
            continue
        category_id, name = record["id"], record["name"]
        if category_id in name_of:
            problem = f"id is already that of {brief(name_of[category_id])} - give every category its own id"
        elif not isinstance(name, str) or not name.strip():
            problem = f"name {brief(name)} is no text - give every category a name"
        elif name in taken:
            problem = f"name {brief(name)} is already that of category {taken[name]} - merge the two, or rename one"
        if problem:
            faults.append(f"{file}: category {category_id}: {problem}")
        name_of.setdefault(category_id, str(name))
        taken.setdefault(str(name), category_id)
    return name_of


def check_images(
    file: Path, records: list[Any], faults: list[str], warnings: list[str], *, allow_outside: bool
) -> Images:
    """The images and their faults. Of records that contradict each other, none is used; of equal ones, the first."""
    images = Images()
    by_id: dict[int, Image] = {}
    by_name: dict[str, Image] = {}
    by_folded: dict[str, Image] = {}
    for position, record in enumerate(records):
        problem = _missing_keys(record, "images")
        if not problem and not _is_id(record["id"]):
            problem = f"id {brief(record['id'])} is not a whole number - number the images"
        if problem:
            faults.append(f"{file}: images[{position}]: {problem}")
            if isinstance(record, dict) and _is_id(record.get("id")):
                images.left_out[record["id"]] = str(record.get("file_name", "no file_name"))
            else:
                images.ids_unclear = True
            continue
        image_id, name = record["id"], record["file_name"]
        problem = _image_problem(record, allow_outside)
        if problem:
            faults.append(f"{file}: image {image_id} ({name if isinstance(name, str) else brief(name)}): {problem}")
            images.left_out[image_id] = str(name)
            continue
        image = Image(image_id, name, (int(record["height"]), int(record["width"])))
        path = posixpath.normpath(name) if "./" in name or "//" in name else name
        folded = path.casefold()
        if twin := by_id.get(image_id):
            problem = f"id is already that of {twin.name} - give every image its own id"
        elif twin := by_name.get(path):
            problem = f"file_name is already that of image {twin.id} - merge the two records"
        elif other := by_folded.get(folded):
            warnings.append(
                f"{file}: image {image_id} ({name}): differs from image {other.id} ({other.name}) in case only - "
                "rename one: on some disks they are one file"
            )
        if problem and twin:
            faults.append(f"{file}: image {image_id} ({name}): {problem}")
            if (twin.id, twin.name) != (image_id, name):
                images.left_out |= {image_id: name, twin.id: twin.name}
            images.ids_unclear |= twin.id == image_id
            continue
        by_id[image_id] = by_name[path] = by_folded[folded] = image
        images.sound.append(image)
    images.sound = [image for image in images.sound if image.id not in images.left_out]
    return images


def check_links(file: Path, images: Images, image_root: Path, faults: list[str]) -> bool:
    """Takes out the images that symbolic links lead out of the image folder; whether there are any."""
    outside = links_outside(image_root, [image.name for image in images.sound])
    for row, target in outside.items():
        image = images.sound[row]
        faults.append(
            f"{file}: image {image.id} ({image.name}): a symbolic link leads out of the image folder, to "
            f"{brief(target)} - copy the file there, or set data.allow_outside=true"
        )
        images.left_out[image.id] = image.name
    images.sound = [image for image in images.sound if image.id not in images.left_out]
    return bool(outside)


def check_annotations(
    file: Path,
    records: list[Any],
    images: Images,
    name_of: Mapping[int, str],
    classes: Sequence[str],
    faults: list[str],
    warnings: list[str],
) -> list[int]:
    """Positions of the annotations that are whole, of a sound image, and of a category that is one of `classes`."""
    names = images.left_out | {image.id: image.name for image in images.sound}
    known = {category_id for category_id, name in name_of.items() if name in classes}
    outside: Counter[int] = Counter()
    sound = []
    for position, record in enumerate(records):
        problem = _annotation_problem(record, names, name_of)
        if problem and images.ids_unclear and problem.startswith("image_id "):
            continue
        if problem:
            faults.append(f"{file}: {describe(record, position, names)}: {problem}")
        elif record["category_id"] not in known:
            outside[record["category_id"]] += 1
        elif record["image_id"] not in images.left_out:
            sound.append(position)
    for category_id, count in outside.items():
        name = name_of[category_id]
        faults.append(
            f"{file}: category {category_id} ({name}): used by {count} annotation{'s' * (count > 1)} but not among the "
            f"classes {some(classes)} - {_nearest(name, classes)}"
        )
    _warn_of_ids(file, records, warnings)
    return sound


def describe(record: Any, position: int, names: Mapping[int, str]) -> str:
    """`annotation 17 of image 5 (a.jpg)`, as far as the record says so. `names` are file names by image id."""
    if not isinstance(record, dict):
        return f"annotations[{position}]"
    who = f"annotation {record['id']}" if _is_id(record.get("id")) else f"annotations[{position}]"
    image_id: Any = record.get("image_id")
    return who + (f" of image {image_id} ({names[image_id]})" if _is_id(image_id) and image_id in names else "")


def _image_problem(record: Mapping[str, Any], allow_outside: bool) -> str | None:
    name, height, width = record["file_name"], record["height"], record["width"]
    if not isinstance(name, str) or not name:
        return f"file_name {brief(name)} is no text - give the image's path inside the image folder"
    if problem := name_problem(name, allow_outside=allow_outside):
        return problem
    if not all(_is_number(side) and 0 < side < 2**31 and side == int(side) for side in (height, width)):
        return (
            f"width {brief(width)} and height {brief(height)} are not whole numbers above 0 - give the image's pixels"
        )
    return None


def _annotation_problem(record: Any, images: Container[int], categories: Container[int]) -> str | None:
    """The first fault of an annotation as "problem - fix", or None."""
    problem = _missing_keys(record, "annotations")
    if problem:
        return problem
    image_id, category_id, box, area = record["image_id"], record["category_id"], record["bbox"], record.get("area")
    if not _is_id(image_id) or image_id not in images:
        fix = _as_id(image_id, images) or "add the image, or remove the annotation"
        return f"image_id {brief(image_id)} is not in `images` - {fix}"
    if not _is_id(category_id) or category_id not in categories:
        fix = _as_id(category_id, categories) or "add the category, or correct the id"
        return f"category_id {brief(category_id)} is not in `categories` - {fix}"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox {brief(box)} is not four finite numbers - write [x, y, width, height] in pixels"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {brief(box)} has a negative side (width {box[2]}, height {box[3]}) - correct or remove it"
    if area is not None and not (_is_number(area) and area >= 0):
        return f"area {brief(area)} is not a number from 0 up - correct it, or leave it out"
    if record.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd {brief(record['iscrowd'])} is neither 0 nor 1 - correct it, or leave it out"
    return None


def _warn_of_ids(file: Path, records: list[Any], warnings: list[str]) -> None:
    """Annotation ids mean nothing here, but other tools drop annotations over them: one warning for the file."""
    ids = [record["id"] for record in records if isinstance(record, dict) and _is_id(record.get("id"))]
    if len(set(ids)) < len(ids):
        twice = [annotation_id for annotation_id, count in Counter(ids).items() if count > 1]
        warnings.append(
            f"{file}: annotations: id {some([str(annotation_id) for annotation_id in twice])} used more than once - "
            "renumber them for other tools; here they are not used"
        )


def _missing_keys(record: Any, section: str) -> str | None:
    if not isinstance(record, dict):
        return f"is {brief(record)}, not an object - write an object with {', '.join(_REQUIRED[section])}"
    for key in _REQUIRED[section]:
        if key not in record:
            return f"has no `{key}` - add it"
    return None


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST_ID


def _as_id(value: Any, known: Container[int]) -> str | None:
    """How to mend an id that is one of the known ones, but written as text or with a decimal point."""
    is_text = isinstance(value, str) and len(value) < 20 and value.isascii() and value.isdigit()
    if not is_text and not (isinstance(value, float) and value.is_integer()):
        return None
    return f"write it as the whole number {int(value)}" if int(value) in known else None


def _is_number(value: Any) -> bool:
    """A finite number of JSON: neither true nor "1" nor NaN, and not an integer beyond float64."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _nearest(name: str, classes: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, classes, n=1)
    if close:
        return f"rename it to {close[0]!r} if that is meant, or remove its annotations"
    return "remove its annotations, or train with this class"
