"""COCO object-detection files, read and checked into flat arrays.

With retina/data/results.py the only place that knows COCO's conventions (`xywh` boxes, sparse category ids);
everything inside the library sees `xyxy` boxes and labels 0..K-1. Segmentations and annotation ids are never looked at.
Format: https://cocodataset.org/#format-data.
"""

import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64

from retina.data import cache as annotation_cache
from retina.data.annotations import Annotations, offsets_of
from retina.data.cache import CachedAnnotations, Request
from retina.data.checks import (
    DataReport,
    Images,
    RecordsError,
    around_rotated,
    box_problems,
    check_annotations,
    check_categories,
    check_images,
    check_links,
    convention_problem,
    describe,
)
from retina.data.document import parse_document
from retina.data.ids import id_column
from retina.data.oddities import count_oddities, record_oddities, rotations
from retina.data.packed_records import PackedRecords
from retina.errors import DataError


def read_coco(
    file: str | Path,
    image_root: str | Path,
    *,
    classes: Sequence[str] | None = None,
    report: DataReport | None = None,
    skip_faulty: bool = False,
    allow_outside: bool = False,
    ids_only: bool = False,
) -> Annotations:
    """Read and check a COCO annotation file. The result of a large one is stored: see `retina.data.cache`.

    Without `classes`, labels follow ascending category id. With `classes` (of a training set or a checkpoint) they
    follow that order and categories are matched by name: a category outside `classes` that some annotation uses is a
    fault, an unused one is left out, and a class that the file does not know gets None in `category_ids`.
    Missing (or null) `iscrowd` reads as 0 and `area` as width * height. Whether the images exist is not checked here,
    only that no name, by its spelling or by a symbolic link, leads out of `image_root`, unless `allow_outside`.
    With `ids_only` nothing of an image counts but its id: enough to score detections that are known already.

    With `skip_faulty`, faulty annotations are left out, and faulty images together with their annotations, and images
    that have none but faulty ones; `report` lists them. Warnings go to `report` in any case.

    Raises DataError if the file is missing, not JSON, not built like an annotation file, or has all its boxes in
    another convention; RecordsError, which lists all faults, if single records are wrong. With `skip_faulty` it is
    raised only for categories, or if no image is left.
    """
    if classes is not None and len(set(classes)) != len(classes):
        raise ValueError(f"classes are not unique: {list(classes)}")
    report = DataReport() if report is None else report
    request = Request(None if classes is None else list(classes), allow_outside or ids_only, ids_only)
    file, image_root = Path(file), Path(image_root)
    entry = annotation_cache.find_entry(file, request)
    reading = _load(entry, file, image_root, request)
    if reading is None:
        with annotation_cache.only_one(entry) if entry else nullcontext():
            reading = _load(entry, file, image_root, request)
            if reading is None:
                return _parse_at_ease(file, image_root, request, report, skip_faulty=skip_faulty)
    report.warnings += reading.warnings
    if reading.faults and not skip_faulty:
        raise RecordsError(reading.faults)
    report.faults += reading.faults
    return reading.annotations


def _load(entry: Path | None, file: Path, image_root: Path, request: Request) -> CachedAnnotations | None:
    if entry is None:
        return None
    return annotation_cache.load(entry, file, image_root, allow_outside=request.allow_outside)


def _parse_at_ease(
    file: Path, image_root: Path, request: Request, report: DataReport, *, skip_faulty: bool
) -> Annotations:
    """Python's garbage collector would go through millions of new records again and again, and find nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        reading = _parse(file, image_root, request, report, skip_faulty=skip_faulty)
    finally:
        if was_on:
            gc.enable()
    report.faults += reading.faults
    return reading.annotations


def _parse(
    file: Path, image_root: Path, request: Request, report: DataReport, *, skip_faulty: bool
) -> CachedAnnotations:
    """Reads and checks the JSON itself, and stores the result of a large file. Warnings go to `report` at once."""
    findings = DataReport(warnings=report.warnings)
    known_warnings = len(report.warnings)
    document = parse_document(file, report.warnings, ids_only=request.ids_only)
    entry = annotation_cache.entry_of(document.digest, document.size, request)
    name_of = check_categories(file, document.categories, findings)
    unclear = bool(findings.faults)
    images = check_images(file, document.images, findings, allow_outside=request.allow_outside)
    if not request.allow_outside and check_links(file, images, image_root, findings):
        entry = None  # links may be mended while the file stays as it is
    if unclear:  # nearly every annotation would be at fault for its category
        raise RecordsError(findings.faults)

    classes = request.classes
    if classes is None:
        classes = [name_of[category_id] for category_id in sorted(name_of)]
    records = document.annotations
    positions, faulty = check_annotations(file, records.pieces(), images, name_of, classes, findings)
    columns = _columns(records, positions, images, classes, name_of)
    annotations = _arrange(file, image_root, classes, name_of, images, records, columns, faulty, findings)
    if findings.faults and not (skip_faulty and len(annotations)):
        raise RecordsError(findings.faults)
    reading = CachedAnnotations(annotations, findings.faults, report.warnings[known_warnings:])
    complaint = annotation_cache.store(entry, reading, allow_outside=request.allow_outside) if entry else None
    if complaint and complaint not in report.warnings:
        report.warnings.append(complaint)
    return reading


class _Columns(NamedTuple):
    """Sound annotations, in the file's order."""

    positions: Int64[np.ndarray, "T"]
    """In the file."""
    rows: Int32[np.ndarray, "T"]
    """Of `Images.sound`."""
    xywh: Float[np.ndarray, "T 4"]
    labels: Int64[np.ndarray, "T"]
    crowd: Bool[np.ndarray, "T"]
    areas: Float[np.ndarray, "T"]
    """NaN where the file has none."""
    degrees: Float[np.ndarray, "T"]
    oddities: Int64[np.ndarray, "3"]


def _columns(
    records: PackedRecords,
    positions: Int64[np.ndarray, "T"],
    images: Images,
    classes: Sequence[str],
    name_of: Mapping[int, str],
) -> _Columns:
    """Of the records at these positions."""
    row_of = {image.id: row for row, image in enumerate(images.sound)}
    id_of = {name: category_id for category_id, name in name_of.items()}
    label_of = {id_of[name]: label for label, name in enumerate(classes) if name in id_of}
    num = len(positions)
    kinds = (np.int32, np.int64, np.bool_, np.float64, np.float64)
    rows, labels, crowd, areas, degrees = (np.empty(num, kind) for kind in kinds)
    xywh, oddities = np.empty((num, 4)), np.zeros(3, np.int64)
    for first, piece in records.pieces():
        begin, end = np.searchsorted(positions, [first, first + len(piece)]).tolist()
        part = slice(begin, end)
        sound = [piece[position - first] for position in positions[part].tolist()]
        rows[part] = [row_of[a["image_id"]] for a in sound]
        labels[part] = [label_of[a["category_id"]] for a in sound]
        crowd[part] = [bool(a.get("iscrowd")) for a in sound]
        areas[part] = np.array([a.get("area") for a in sound], dtype=np.float64)  # None becomes nan
        xywh[part] = np.array([a["bbox"] for a in sound], dtype=np.float64).reshape(-1, 4)
        degrees[part] = rotations(sound)
        oddities += count_oddities(sound, xywh[part])
    return _Columns(positions, rows, xywh, labels, crowd, areas, degrees, oddities)


def _arrange(
    file: Path,
    image_root: Path,
    classes: Sequence[str],
    name_of: Mapping[int, str],
    images: Images,
    records: PackedRecords,
    columns: _Columns,
    faulty: set[int | str],
    report: DataReport,
) -> Annotations:
    """Sound records, the objects of an image beside each other. Boxes that do not fit go to `report`.

    An image is left out if all its annotations are faulty, those of `faulty` images among them: it is no negative.
    Raises DataError if all boxes are in another convention."""
    xywh, rows, areas = columns.xywh, columns.rows, columns.areas
    sizes = np.array([image.size for image in images.sound], dtype=np.int64).reshape(-1, 2)
    object_sizes = sizes[rows]
    if convention := convention_problem(xywh, object_sizes):
        raise DataError(f"{file}: annotations: {convention}", code="box-convention")
    report.warnings += record_oddities(file, columns.oddities)
    if turned := int(np.count_nonzero(columns.degrees)):
        xywh = np.where(columns.degrees[:, None] != 0, around_rotated(xywh, columns.degrees), xywh)
        state = (
            f"{turned} boxes are turned (`attributes.rotation`, as CVAT has it): the upright boxes around them count"
        )
        report.warnings.append(f"{file}: annotations: {state} - nothing to do here; other tools take the unturned ones")
    usable = np.ones(len(rows), dtype=np.bool_)
    problems = [*box_problems(xywh, object_sizes)]
    del object_sizes
    named = records.at([int(columns.positions[problem.row]) for problem in problems])
    names = {image.id: image.name for image in images.sound} if problems else {}
    for problem in problems:
        position = int(columns.positions[problem.row])
        line = f"{file}: {describe(named[position], position, names)}: {problem.text}"
        (report.faults if problem.is_fault else report.warnings).append(line)
        usable[problem.row] = not problem.is_fault

    bad = np.array([image.id in faulty for image in images.sound], dtype=np.bool_)
    bad[rows[~usable]] = True
    bad[rows[usable]] = False
    sound = [image for image, is_bad in zip(images.sound, bad.tolist(), strict=True) if not is_bad]
    order = np.flatnonzero(usable)
    order = order[np.argsort(rows[order], kind="stable")]
    counts = np.bincount(rows[order], minlength=len(bad))[~bad]
    id_of = {name: category_id for category_id, name in name_of.items()}
    encoded = [image.name.encode("utf-8", "surrogatepass") for image in sound]
    xywh, areas = xywh[order], areas[order]
    areas = np.where(np.isnan(areas), xywh[:, 2] * xywh[:, 3], areas)
    xywh[:, 2:] += xywh[:, :2]
    return Annotations(
        file=file,
        image_root=image_root,
        classes=tuple(classes),
        category_ids=tuple(id_of.get(name) for name in classes),
        image_ids=id_column([image.id for image in sound]),
        sizes=sizes[~bad],
        offsets=offsets_of(counts),
        boxes=xywh,
        labels=columns.labels[order],
        crowd=columns.crowd[order],
        areas=areas,
        names=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        name_offsets=offsets_of(np.array([len(name) for name in encoded], dtype=np.int64)),
    )
