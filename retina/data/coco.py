"""COCO object-detection files, read and checked into flat arrays.

With retina/data/results.py the only place that knows COCO's conventions (`xywh` boxes, sparse category ids);
everything inside the library sees `xyxy` boxes and labels 0..K-1. Segmentations and annotation ids are never looked at.
Format: https://cocodataset.org/#format-data.
"""

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from retina.data import cache as annotation_cache
from retina.data.annotations import Annotations
from retina.data.cache import CachedAnnotations, Request
from retina.data.checks import (
    DataReport,
    RecordsError,
    check_annotations,
    check_categories,
    check_images,
    check_links,
)
from retina.data.document import parse_document
from retina.data.sound_records import arranged, sound_records


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
    columns = sound_records(records, positions, images, classes, name_of)
    annotations = arranged(file, image_root, classes, name_of, images, records, columns, faulty, findings)
    if findings.faults and not (skip_faulty and len(annotations)):
        raise RecordsError(findings.faults)
    reading = CachedAnnotations(annotations, findings.faults, report.warnings[known_warnings:])
    complaint = annotation_cache.store(entry, reading, allow_outside=request.allow_outside) if entry else None
    if complaint and complaint not in report.warnings:
        report.warnings.append(complaint)
    return reading
