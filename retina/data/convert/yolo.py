"""Reads YOLO data sets: images/, labels/ and data.yaml or classes.txt (Ultralytics), or *.data, *.names and lists of
images with labels beside them (darknet, CVAT's YOLO 1.1).

A label file has one object per line, coordinates as fractions of the image: `class cx cy w h`, or `class x1 y1 x2 y2 x3
y3 ...` for a polygon, of which the bounding box is taken.
"""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from retina.data.convert.records import (
    Object,
    Record,
    RecordError,
    Records,
    check_classes,
    divide,
    header_of,
    make_object,
    parse_labels,
    quoted,
    read_lines,
    read_records,
    warnings_of,
)
from retina.data.image_lists import list_images
from retina.errors import DataError

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
TRAIN_FOLDERS = ("images/train", "train/images")
VAL_FOLDERS = ("images/val", "val/images", "images/valid", "valid/images")
TEST_FOLDERS = ("images/test", "test/images")
_MOST = 0.25
"""How far a fraction may lie outside of 0..1: boxes over the edge are clipped; what lies farther out is in pixels."""
Listed = tuple[Path, str]
"""An image and its path inside the output's split folder."""


def read_yolo(
    source: Path, *, classes: Sequence[str] | None = None, val_fraction: float = 0.2, seed: int = 0
) -> Records:
    """The records of a YOLO folder; nothing is written.

    Splits: `train`, `val` and `test` of data.yaml (a folder, a list file, or several of them), or of darknet's *.data,
    or train.txt, valid.txt and test.txt; else images/{train,val,test} or {train,val,test}/images. Where there is no
    val, or plain images/ only, `val_fraction` is drawn for it.
    Classes: `classes`, else `names` of data.yaml, else *.names or classes.txt; class k of a label is the k-th name.
    An image without label file, or with an empty one, is a negative image; two images of one label file are faults.
    Raises DataError when the folder is not understood, has no class names, or has not one label file (that is a
    misplaced labels/ folder, not 0 objects).
    """
    faults: list[RecordError] = []
    table, file = _read_yaml(source)
    if file is None:
        table, file = _read_darknet(source)
    names = tuple(classes) if classes is not None else _names(source, table, file)
    if file is not None and ("train" in table or "val" in table):
        places = [_from_yaml(split, table, file, faults) for split in ("train", "val", "test")]
    else:
        places = [_from_folders(source, folders) for folders in (TRAIN_FOLDERS, VAL_FOLDERS, TEST_FOLDERS)]
        if not places[0][0] and not places[1][0]:
            places = [_from_folders(source, ["images"]), ([], []), places[2]]
    (train, val, test), folders = [listed for listed, _ in places], [folder for _, more in places for folder in more]
    if not train:
        problem = "no training images - use images/train, or `train:` in data.yaml"
        raise DataError(f"{source}: {problem}", code="no-train-images")
    everything = train + val + test
    faults += _orphans(everything, folders)
    drawn: list[str] = []
    if not val:
        train, val, drawn = divide(
            train, val_fraction, seed, key=lambda listed: listed[1], image=lambda listed: listed[0]
        )
    labels = {image: label_path(image) for image, _ in everything}
    unlabelled = sum(not file.is_file() for file in labels.values())
    if unlabelled == len(labels):
        problem = "no image has a label file - labels/ stands beside images/"
        raise DataError(f"{label_path(train[0][0])}: {problem}", code="no-labels")
    twins: dict[Path, list[str]] = {}
    for image, label in labels.items():
        twins.setdefault(label, []).append(image.name)

    def read(listed: Listed, faults: list[RecordError]) -> Record:
        label = labels[listed[0]]
        if len(twins[label]) > 1 and label.is_file():
            problem = f"is that of {' and '.join(twins[label])} - rename one of them and write its labels"
            raise RecordError(label, 1, problem)
        return _read_record(*listed, names, faults)

    records = [read_records(split, read, faults) for split in (train, val, test)]
    warnings = warnings_of(source, [record for split in records for record in split], names) + drawn
    if unlabelled:
        problem = f"{unlabelled} of {len(labels)} images have no label file: taken as images without objects"
        warnings.append(f"{source}: {problem} - remove them if they were never annotated")
    return Records(records[0], records[1], names, tuple(faults), tuple(warnings), records[2])


def label_path(image: Path) -> Path:
    """Where the labels of an image are: its last folder named `images` becomes `labels`, the suffix .txt (or .TXT)."""
    plain = _label_path(image.with_suffix(".txt"))
    upper = plain.with_suffix(".TXT")
    return upper if not plain.is_file() and upper.is_file() else plain


def _label_path(file: Path) -> Path:
    top = next((folder for folder in file.parents if folder.name == "images"), None)
    return top.with_name("labels") / file.relative_to(top) if top else file


def parse_line(text: str, size: tuple[int, int], classes: Sequence[str]) -> Object:
    """The object of one label line in an image of `size` (height, width). Raises ValueError, as "problem - fix"."""
    tokens = text.split()
    values = []
    for token in tokens:
        try:
            values.append(float(token))
        except ValueError:
            raise ValueError(f"{quoted(token)} is not a number - a line is `class cx cy w h` with numbers") from None
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        fix = "a line is `class cx cy w h`, or a class and the points of a polygon"
        raise ValueError(f"{len(values)} numbers - {fix}")
    if not values[0].is_integer() or not 0 <= values[0] < len(classes):
        problem = f"class {tokens[0]} is not in 0..{len(classes) - 1}"
        raise ValueError(f"{problem} - correct the line or the list of classes")
    height, width = size
    xs, ys = values[1::2], values[2::2]
    for value in values[1:]:
        if not -_MOST <= value <= 1 + _MOST:  # also NaN
            raise ValueError(f"{value:g} is outside [0, 1] - divide x by the image width and y by its height")
    if len(values) == 5:
        (cx, w), (cy, h) = xs, ys
        edges = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    else:
        edges = (min(xs), min(ys), max(xs), max(ys))
    box = (edges[0] * width, edges[1] * height, edges[2] * width, edges[3] * height)
    return make_object(classes[int(values[0])], box, size)


def _read_record(image: Path, file_name: str, classes: Sequence[str], faults: list[RecordError]) -> Record:
    labels = label_path(image)
    text = parse_labels(labels, lambda data: data.decode("utf-8-sig"), "UTF-8 text")
    header = header_of(image, labels)
    objects = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            objects += [parse_line(line, header.size, classes)] if line.strip() else []
        except ValueError as error:
            faults.append(RecordError(labels, number, str(error)))
    return Record(image, file_name, header.size, tuple(objects), header.turns_unseen)


class _PlainLoader(yaml.BaseLoader):
    """Strings, lists and dictionaries without aliases: a few lines of them stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)


def _read_yaml(source: Path) -> tuple[dict[str, Any], Path | None]:
    """data.yaml as strings, lists and dictionaries (so that a class called `no` stays a name), and its path."""
    if not source.is_dir():
        fix = "give the folder that holds images/ and labels/"
        raise DataError(f"{source}: no such folder - {fix}", code="no-such-folder")
    files = [source / name for name in YAML_NAMES if (source / name).is_file()]
    files = files or sorted(file for file in source.glob("*.y*ml") if not file.name.startswith("."))
    if not files:
        return {}, None
    file = files[0]
    if len(files) > 1:
        problem = f"{len(files)} YAML files ({file.name}, ...) - call the right one data.yaml"
        raise DataError(f"{source}: {problem}", code="data-yaml")
    try:
        table = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: not valid YAML ({reason}) - correct it", code="data-yaml") from error
    if not isinstance(table, dict):
        raise DataError(f"{file}: not a mapping - write `train:`, `val:` and `names:`", code="data-yaml")
    if "kpt_shape" in table:
        problem = "kpt_shape: pose labels are not boxes - export the data set for detection"
        raise DataError(f"{file}: {problem}", code="data-yaml")
    return table, file


def _read_darknet(source: Path) -> tuple[dict[str, Any], Path | None]:
    """The same of darknet's *.data, or of the lists that are there; `names` are the lines of the file of names."""
    tables = sorted(file for file in source.glob("*.data") if not file.name.startswith("."))
    table: dict[str, Any] = {}
    for line in read_lines(tables[0]) if tables else []:
        key, equals, value = line.partition("=")
        table |= {key.strip(): value.strip()} if equals else {}
    lists = {"train": ("train.txt",), "val": ("valid.txt", "val.txt"), "test": ("test.txt",)}
    for split, choices in lists.items():
        here = next((name for name in choices if (source / name).is_file()), None)
        stated = table.pop("valid", None) if split == "val" else table.get(split)
        table |= {split: stated or here} if stated or here else {}
    files = [source / PurePosixPath(table.pop("names", "")).name, *sorted(source.glob("[!.]*.names"))]
    if file := next((file for file in files if file.is_file()), None):
        table["names"] = [name for name in read_lines(file) if name]
    return table, (tables[0] if tables else source / "train.txt") if table else None


def _names(source: Path, table: dict[str, Any], file: Path | None) -> tuple[str, ...]:
    """Class names in order of their index."""
    names: Any = table.get("names")
    if names and file is not None:
        if isinstance(names, dict):
            if sorted(names) != sorted(map(str, range(len(names)))):
                problem = f"keys are not 0..{len(names) - 1} - number the classes without gaps"
                raise DataError(f"{file}: names: {problem}", code="class-names")
            names = [names[str(k)] for k in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{file}: names: not a list - write `names: [cat, dog]`", code="class-names")
        stated = table.get("nc", str(len(names)))
        if stated != str(len(names)):
            problem = f"nc: {stated}, but {len(names)} names - correct one of them"
            raise DataError(f"{file}: {problem}", code="class-names")
    else:
        files = [f for f in (source / "classes.txt", source / "labels" / "classes.txt") if f.is_file()]
        if not files:
            fix = "add data.yaml or classes.txt, or pass classes=a,b,c"
            raise DataError(f"{source}: no class names - {fix}", code="class-names")
        file = files[0]
        names = [name for name in read_lines(file) if name]
    check_classes(file, names)
    return tuple(names)


def _from_folders(source: Path, places: Sequence[str]) -> tuple[list[Listed], list[Path]]:
    """Images of the first of the places that is there, and that folder."""
    folders = [source / place for place in places if (source / place).is_dir()][:1]
    return [listed for folder in folders for listed in _list_folder(folder)], folders


def _from_yaml(
    split: str, table: dict[str, Any], file: Path, faults: list[RecordError]
) -> tuple[list[Listed], list[Path]]:
    """Images of a split of data.yaml, and the folders that are wholly in it."""
    values = table.get(split) or []
    home = file.parent
    root = home / str(table.get("path") or "")
    listed: list[Listed] = []
    folders = []
    for value in map(str, values if isinstance(values, list) else [values]):
        # exports of Roboflow say `../train/images` for a folder beside data.yaml, those of CVAT `data/train.txt`
        places = (
            root / value,
            home / value,
            home / value.removeprefix("../"),
            home / (value.partition("/")[2] or value),
        )
        place = next((place for place in places if place.exists()), None)
        if place is None:
            problem = f"{split}: no {places[0]} - correct `{split}:` or `path:`"
            raise DataError(f"{file}: {problem}", code="no-such-split")
        if place.is_dir():
            listed += _list_folder(place)
            folders.append(place)
        else:
            listed += _list_file(place, (place.parent, root, home), faults)
    return listed, folders


def _list_folder(folder: Path) -> list[Listed]:
    """Images of a folder and its sub-folders, by name."""
    return [(file, file.relative_to(folder).as_posix()) for file in list_images(folder)]


def _list_file(file: Path, roots: Sequence[Path], faults: list[RecordError]) -> list[Listed]:
    """Images that a text file lists, one path per line, relative to one of the roots."""
    images = []
    for number, name in enumerate(read_lines(file), 1):
        if name:
            paths = (root / place for root in roots for place in (name, name.partition("/")[2] or name))
            image = next((path for path in paths if path.is_file()), None)
            if image is None:
                faults.append(RecordError(file, number, f"missing image {roots[0] / name} - add it or remove the line"))
            else:
                images.append(Path(os.path.abspath(image)))
    top = Path(os.path.commonpath([image.parent for image in images])) if images else Path()
    return [(image, image.relative_to(top).as_posix()) for image in dict.fromkeys(images)]


def _orphans(listed: Sequence[Listed], folders: Sequence[Path]) -> list[RecordError]:
    """Label files without image, in the label folders of whole image folders."""
    known = {label_path(image) for image, _ in listed}
    faults = []
    for folder in folders:
        labels = label_path(folder / "x.txt").parent
        for file in sorted(labels.rglob("*.txt")) if labels != folder else []:
            if file not in known and file.name != "classes.txt" and not file.name.startswith("."):
                missing = folder / file.relative_to(labels).with_suffix(".jpg")
                fix = "add the image (any usual suffix) or remove both"
                faults.append(RecordError(file, 1, f"missing image {missing} - {fix}"))
    return faults
