"""Reads data sets in CSV tables with one object per row.

TensorFlow's tutorials and Roboflow write `filename, width, height, class, xmin, ymin, xmax, ymax`, DeepForest
`image_path, xmin, ymin, xmax, ymax, label`, keras-retinanet `path, x1, y1, x2, y2, class` without a head. A row without
box stands for an image without objects."""

import csv
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from retina.data.convert.records import (
    Object,
    Record,
    RecordError,
    Records,
    divide,
    header_of,
    make_object,
    quoted,
    read_lines,
    read_records,
    warnings_of,
)
from retina.data.image_lists import list_images
from retina.errors import DataError

_COLUMNS = {
    "image": ("filename", "image_path", "file_name", "image", "image_name", "path", "file", "img", "image_id"),
    "class": ("class", "label", "class_name", "name", "category", "label_name"),
    "xmin": ("xmin", "x_min", "x1", "left"),
    "ymin": ("ymin", "y_min", "y1", "top"),
    "xmax": ("xmax", "x_max", "x2", "right"),
    "ymax": ("ymax", "y_max", "y2", "bottom"),
}
"""Names of each column, in any case."""
_HEADLESS = ("image", "xmin", "ymin", "xmax", "ymax", "class")
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class Row(NamedTuple):
    """A line of a table."""

    file: Path
    line: int
    values: Mapping[str, str]
    """By our names of the columns; `width` and `height` too where they are there."""


def read_csv(
    source: Path, *, classes: Sequence[str] | None = None, val_fraction: float = 0.2, seed: int = 0
) -> Records:
    """The records of the tables in a folder (or of one table); nothing is written.

    Splits: tables or folders whose name has `train`, `val` (`valid`) or `test` as a word; without val, test is val;
    with only one split, or none, `val_fraction` of the images is drawn for val. Images are where the table says, from
    its folder or the source, or anywhere below the source under that name. Images that no row names are left out and
    counted. Raises DataError when there is no such table.
    """
    tables = [source] if source.is_file() else sorted(file for file in source.rglob("*") if _is_table(file))
    rows = [row for table in tables for row in _read_table(table)]
    if not rows:
        problem = "no CSV table with columns such as filename, xmin, ymin, xmax, ymax, class - give the folder of one"
        raise DataError(f"{source}: {problem}", code="not-csv")
    root = source.parent if source.is_file() else source
    images = _Images(root)
    splits: dict[str, dict[str, list[Row]]] = {"train": {}, "val": {}, "test": {}}
    for row in rows:
        splits[_split_of(row.file, root)].setdefault(f"{row.file.parent / row.values['image']}", []).append(row)
    train, val, test = (list(split.values()) for split in splits.values())
    if not val:
        val, test = test, []
    drawn: list[str] = []
    if not (train and val):
        keys: dict[str, Any] = {"key": lambda rows: rows[0].values["image"], "image": lambda rows: images.of(rows[0])}
        train, val, drawn = divide(train or val, val_fraction, seed, **keys)
    faults: list[RecordError] = []

    def read(rows: list[Row], faults: list[RecordError]) -> Record:
        image = images.find(rows[0])
        header = header_of(image, rows[0].file)
        objects = []
        for row in rows:
            try:
                objects += _objects(row, header.size, classes)
            except ValueError as error:
                faults.append(RecordError(row.file, row.line, str(error)))
        place = PurePosixPath(image.relative_to(root) if image.is_relative_to(root) else image.name)
        return Record(image, place.as_posix(), header.size, tuple(objects), header.turns_unseen)

    records = [read_records(split, read, faults) for split in (train, val, test)]
    everything = [record for split in records for record in split]
    names = sorted({item.name for record in everything for item in record.objects}) if classes is None else classes
    warnings = warnings_of(root, everything, names) + drawn
    if unnamed := images.count_unused():
        warnings.append(f"{root}: {unnamed} images are in no table: left out - annotate them, or leave it so")
    return Records(records[0], records[1], tuple(names), tuple(faults), tuple(warnings), records[2])


def _is_table(file: Path) -> bool:
    return file.suffix.lower() == ".csv" and not file.name.startswith(".") and file.is_file()


def _read_table(file: Path) -> list[Row]:
    """The rows of a table of boxes; none of a table of something else."""
    lines = read_lines(file)
    delimiter = max(",;\t", key=next((line for line in lines if line), "").count)
    try:
        table = [*csv.reader(lines, delimiter=delimiter)]
    except csv.Error as error:
        raise DataError(f"{file}: not CSV ({error}) - export it again", code="not-csv") from error
    first: list[str] = next((cells for cells in table if cells), [])
    places = _head(first) or _headless(first)
    rows = []
    for number, cells in enumerate(table if places else [], 1):
        values = {name: cells[at].strip() for name, at in places.items() if at < len(cells)}
        if values.get("image") and _head(cells) != places:
            rows.append(Row(file, number, values))
    return rows


def _head(cells: Sequence[str]) -> dict[str, int]:
    """Where each column stands; nothing if one is missing."""
    names = [cell.strip().lower() for cell in cells]
    at = {key: next((names.index(name) for name in choices if name in names), -1) for key, choices in _COLUMNS.items()}
    sizes = {key: names.index(key) for key in ("width", "height") if key in names}
    return {} if min(at.values()) < 0 else at | sizes


def _headless(cells: Sequence[str]) -> dict[str, int]:
    def fits(cell: str) -> bool:
        return not cell.strip() or cell.strip().replace(".", "", 1).lstrip("-").isdigit()

    return {name: at for at, name in enumerate(_HEADLESS)} if len(cells) == 6 and all(map(fits, cells[1:5])) else {}


def _split_of(table: Path, root: Path) -> str:
    words = "/".join(table.relative_to(root).with_suffix("").parts).lower()
    parts = "".join(letter if letter.isalnum() else " " for letter in words).split()
    return next((split for split, names in _SPLITS.items() if any(name in parts for name in names)), "train")


def _objects(row: Row, size: tuple[int, int], classes: Sequence[str] | None) -> list[Object]:
    """The object of a row, or none. Raises ValueError, as "problem - fix"."""
    texts = [row.values.get(edge, "") for edge in _EDGES]
    if not any(texts):
        return []
    edges = []
    for name, text in zip(_EDGES, texts, strict=True):
        try:
            edges.append(float(text))
        except ValueError:
            raise ValueError(f"{name} is {quoted(text)}, not a number - write the edge in pixels") from None
    if not any(edges):  # as DeepForest writes images without objects
        return []
    for side, true in (("width", size[1]), ("height", size[0])):
        if row.values.get(side, "0").removesuffix(".0") not in ("", "0", str(true)):
            stated = quoted(row.values[side])
            raise ValueError(f"{side} is {stated}, the image's is {true} after EXIF rotation - correct it and the box")
    name = row.values.get("class", "")
    if not name:
        raise ValueError("a box without class - name its class")
    if classes is not None and name not in classes:
        near = difflib.get_close_matches(name, classes, 1)
        hint = f"did you mean {near[0]!r}? else " if near else ""
        raise ValueError(f"unknown class {quoted(name)} - {hint}add it to classes=")
    x1, y1, x2, y2 = edges
    return [make_object(name, (x1, y1, x2, y2), size)]


class _Images:
    """The image files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self._used = root, set[Path]()
        self._by_name: dict[str, list[Path]] = {}
        for file in list_images(root):
            self._by_name.setdefault(file.name, []).append(file)

    def of(self, row: Row) -> Path | None:
        stated = row.values["image"].replace("\\", "/")
        places = [row.file.parent / stated, self.root / stated]
        known = self._by_name.get(PurePosixPath(stated).name, [])
        return next((place for place in places if place in known), None) or (known[0] if len(known) == 1 else None)

    def find(self, row: Row) -> Path:
        """Raises RecordError if there is none, or several of that name."""
        image = self.of(row)
        if image is None:
            stated = row.values["image"]
            last = PurePosixPath(stated.replace("\\", "/")).name
            known = self._by_name.get(last, [])
            problem = f"{len(known)} images are called {quoted(last)}" if known else f"missing image {quoted(stated)}"
            raise RecordError(row.file, row.line, f"{problem} - add it, or write its path from the table's folder")
        self._used.add(image)
        return image

    def count_unused(self) -> int:
        return sum(file not in self._used for files in self._by_name.values() for file in files)
