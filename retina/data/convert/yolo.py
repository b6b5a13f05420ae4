"""Reads YOLO data sets in the layouts of Ultralytics: images/, labels/ and data.yaml or classes.txt.

A label file has one object per line, coordinates as fractions of the image: `class cx cy w h`, or `class x1 y1 x2 y2 x3
y3 ...` for a polygon, of which the bounding box is taken.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from retina.data.convert.records import (
    MAX_OVERHANG,
    Fault,
    Object,
    Record,
    Records,
    check_box,
    check_classes,
    divide,
    read_text,
    refusal,
    shown,
)
from retina.data.images import image_size, list_images
from retina.errors import DataError

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLIT_FOLDERS = {
    "train": ("images/train", "train/images"),
    "val": ("images/val", "val/images", "images/valid", "valid/images"),
}
Listed = tuple[Path, str]
"""An image and its path inside the output's split folder."""


def read_yolo(
    source: Path, *, classes: Sequence[str] | None = None, val_fraction: float = 0.2, seed: int = 0
) -> Records:
    """The records of a YOLO folder; nothing is written.

    Splits: `train` and `val` of data.yaml (a folder, a list file, or several of them), else images/{train,val} or
    {train,val}/images; with only one of them, or plain images/, `val_fraction` is drawn for val. `test` is not read.
    Classes: `classes`, else `names` of data.yaml, else classes.txt; class k of a label file is the k-th name.
    An image without label file, or with an empty one, is a negative image. Raises DataError when the folder is not
    understood, has no class names, or has not one label file (that is a misplaced labels/ folder, not 0 objects).
    """
    faults: list[Fault] = []
    table, file = _read_yaml(source)
    names = tuple(classes) if classes is not None else _names(source, table, file)
    if file is not None and ("train" in table or "val" in table):
        (train, folders), (val, more) = (_from_yaml(split, table, file, faults) for split in ("train", "val"))
    else:
        (train, folders), (val, more) = (_from_folders(source, split) for split in ("train", "val"))
        if not train and not val:
            train, folders = _list_folder(source / "images"), [source / "images"]
    if not train:
        raise refusal("no-train-images", source, "no training images - use images/train, or `train:` in data.yaml")
    faults += _orphans(train + val, folders + more)
    if not val:
        train, val = divide(train, val_fraction, seed, key=lambda listed: listed[1])
    if not any(label_path(image).is_file() for image, _ in train + val):
        raise refusal("no-labels", label_path(train[0][0]), "no image has a label file - labels/ stands beside images/")
    splits = [
        tuple(record for listed in split if (record := _read_record(*listed, names, faults)) is not None)
        for split in (train, val)
    ]
    return Records(splits[0], splits[1], names, tuple(faults))


def label_path(image: Path) -> Path:
    """Where the labels of an image are: its last folder named `images` becomes `labels`, the suffix .txt."""
    parts = list(image.with_suffix(".txt").parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts)


def parse_line(text: str, size: tuple[int, int], classes: Sequence[str]) -> Object | tuple[str, str]:
    """The object of one label line in an image of `size` (height, width), or (problem, fix)."""
    tokens = text.split()
    try:
        values = [float(token) for token in tokens]
    except ValueError:
        bad = next(token for token in tokens if not _is_number(token))
        return f"{shown(bad)} is not a number", "a line is `class cx cy w h` with numbers"
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        return f"{len(values)} numbers", "a line is `class cx cy w h`, or a class and the points of a polygon"
    if not values[0].is_integer() or not 0 <= values[0] < len(classes):
        return f"class {tokens[0]} is not in 0..{len(classes) - 1}", "correct the line or the list of classes"
    height, width = size
    xs, ys = values[1::2], values[2::2]
    slack_x, slack_y = MAX_OVERHANG / width, MAX_OVERHANG / height
    for value, slack in [*((x, slack_x) for x in xs), *((y, slack_y) for y in ys)]:
        if not -slack <= value <= 1 + slack:  # also NaN
            return f"{value:g} is outside [0, 1]", "divide x by the image width and y by its height"
    if len(values) == 5:
        (cx, w), (cy, h) = xs, ys
        edges = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    else:
        edges = (min(xs), min(ys), max(xs), max(ys))
    name = classes[int(values[0])]
    box = check_box((edges[0] * width, edges[1] * height, edges[2] * width, edges[3] * height), size)
    return Object(name, box) if not isinstance(box, str) else (f"{box} (class {name!r})", "correct or remove the line")


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _read_record(image: Path, file_name: str, classes: Sequence[str], faults: list[Fault]) -> Record | None:
    labels = label_path(image)
    try:
        size = image_size(image)
        text = labels.read_text(encoding="utf-8-sig") if labels.is_file() else ""
    except DataError as error:
        problem, _, fix = str(error).rpartition(" - ")
        faults.append(Fault(labels, 1, problem, fix))
        return None
    except ValueError as error:
        faults.append(Fault(labels, 1, f"not UTF-8 text ({error})", "export the file again or remove it"))
        return None
    objects = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            item = parse_line(line, size, classes)
            if isinstance(item, Object):
                objects.append(item)
            else:
                faults.append(Fault(labels, number, *item))
    return Record(image, file_name, size, tuple(objects))


class _PlainLoader(yaml.BaseLoader):
    """Strings, lists and dictionaries without aliases: a few lines of them stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)


def _read_yaml(source: Path) -> tuple[dict[str, Any], Path | None]:
    """data.yaml as strings, lists and dictionaries (so that a class called `no` stays a name), and its path."""
    if not source.is_dir():
        raise refusal("no-such-folder", source, "no such folder - give the folder that holds images/ and labels/")
    files = [source / name for name in YAML_NAMES if (source / name).is_file()]
    files = files or sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    if not files:
        return {}, None
    if len(files) > 1:
        problem = f"{len(files)} YAML files ({files[0].name}, ...)"
        raise refusal("data-yaml", source, f"{problem} - call the right one data.yaml")
    try:
        table = yaml.load(files[0].read_text(encoding="utf-8-sig"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise refusal("data-yaml", files[0], f"not valid YAML ({' '.join(str(error).split())}) - correct it") from error
    if not isinstance(table, dict):
        raise refusal("data-yaml", files[0], "not a mapping - write `train:`, `val:` and `names:`")
    if "kpt_shape" in table:
        raise refusal("data-yaml", files[0], "kpt_shape: pose labels are not boxes - export the data set for detection")
    return table, files[0]


def _names(source: Path, table: dict[str, Any], file: Path | None) -> tuple[str, ...]:
    """Class names in order of their index."""
    names: Any = table.get("names")
    if names and file is not None:
        if isinstance(names, dict):
            if sorted(names) != sorted(map(str, range(len(names)))):
                raise refusal(
                    "class-names", file, f"names: keys are not 0..{len(names) - 1} - number the classes without gaps"
                )
            names = [names[str(k)] for k in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise refusal("class-names", file, "names: not a list of names - write `names: [cat, dog]`")
    else:
        files = [f for f in (source / "classes.txt", source / "labels" / "classes.txt") if f.is_file()]
        if not files:
            raise refusal("class-names", source, "no class names - add data.yaml or classes.txt, or pass classes=a,b,c")
        file = files[0]
        names = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    check_classes(file, names)
    return tuple(names)


def _from_folders(source: Path, split: str) -> tuple[list[Listed], list[Path]]:
    folders = [source / name for name in SPLIT_FOLDERS[split] if (source / name).is_dir()][:1]
    return [listed for folder in folders for listed in _list_folder(folder)], folders


def _from_yaml(split: str, table: dict[str, Any], file: Path, faults: list[Fault]) -> tuple[list[Listed], list[Path]]:
    """Images of a split of data.yaml, and the folders that are wholly in it."""
    value = table.get(split) or []
    values = value if isinstance(value, list) else [value]
    home = file.parent
    root = home / str(table.get("path") or "")
    listed: list[Listed] = []
    folders = []
    for value in map(str, values):
        # Exports of Roboflow say `../train/images` for a folder beside data.yaml.
        places = (root / value, home / value, home / value.removeprefix("../"))
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise refusal("no-such-split", file, f"{split}: no {places[0]} - correct `{split}:` or `path:`")
        if place.is_dir():
            listed += _list_folder(place)
            folders.append(place)
        else:
            listed += _list_file(place, (place.parent, root, home), faults)
    return listed, folders


def _list_folder(folder: Path) -> list[Listed]:
    """Images of a folder and its sub-folders, by name."""
    files = list_images(folder) if folder.is_dir() else []
    return [(file, file.relative_to(folder).as_posix()) for file in files]


def _list_file(file: Path, roots: Sequence[Path], faults: list[Fault]) -> list[Listed]:
    """Images that a text file lists, one path per line, relative to one of the roots."""
    images = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if name := line.strip():
            image = next((root / name for root in roots if (root / name).is_file()), None)
            if image is None:
                faults.append(Fault(file, number, f"missing image {roots[0] / name}", "add it or remove the line"))
            else:
                images.append(Path(os.path.abspath(image)))
    top = Path(os.path.commonpath([image.parent for image in images])) if images else Path()
    return [(image, image.relative_to(top).as_posix()) for image in dict.fromkeys(images)]


def _orphans(listed: Sequence[Listed], folders: Sequence[Path]) -> list[Fault]:
    """Label files without image, in the label folders of whole image folders."""
    known = {label_path(image) for image, _ in listed}
    faults = []
    for folder in folders:
        labels = label_path(folder / "x.txt").parent
        for file in sorted(labels.rglob("*.txt")) if labels != folder else []:
            if file not in known and file.name != "classes.txt":
                missing = folder / file.relative_to(labels).with_suffix(".jpg")
                faults.append(
                    Fault(file, 1, f"missing image {missing}", "add the image (any usual suffix) or remove both")
                )
    return faults
