"""COCO object-detection files: read and checked into flat arrays, and detections written in COCO's results format.

The only place that knows COCO's conventions (`xywh` boxes, sparse category ids); everything inside the library sees
`xyxy` boxes and labels 0..K-1. Segmentations and annotation ids are never looked at.
Format: https://cocodataset.org/#format-data and #format-results.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from retina.data.box_checks import box_problems, convention_problem
from retina.data.coco_checks import (
    Images,
    RecordsError,
    check_annotations,
    check_categories,
    check_images,
    describe,
)
from retina.data.coco_document import listing, load_document
from retina.data.report import DataReport
from retina.errors import DataError
from retina.files import write_whole


@dataclass(frozen=True, eq=False)
class Annotations:
    """A COCO file as flat arrays (no Python object per record, so forked workers share the pages).

    Images keep the order of the file; the objects of image i are rows `offsets[i]:offsets[i + 1]`, in the file's order.
    Images without objects are kept, and so are crowd regions.
    """

    file: Path
    """The JSON file."""
    image_root: Path
    """The folder that file names are relative to."""
    classes: tuple[str, ...]
    """Label k is `classes[k]`."""
    category_ids: tuple[int | None, ...]
    """The file's own id of every class; None for a class (of a training set or checkpoint) that it does not know."""
    image_ids: Int64[np.ndarray, "N"]
    sizes: Int64[np.ndarray, "N 2"]
    """(height, width) as the file states."""
    offsets: Int64[np.ndarray, "N+1"]
    boxes: Float64[np.ndarray, "T 4"]
    """xyxy in pixels; float64, for metrics need the digits of the file."""
    labels: Int64[np.ndarray, "T"]
    crowd: Bool[np.ndarray, "T"]
    areas: Float64[np.ndarray, "T"]
    """The file's `area`, or width * height of the box where it has none."""
    names: bytes
    """File names of all images in UTF-8, one behind the other; see `file_name`."""
    name_offsets: Int64[np.ndarray, "N+1"]

    def __len__(self) -> int:
        """Images, with or without objects."""
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """Name of image `index` as the file states it, sub-folders included."""
        index = range(len(self))[index]
        return _decode(self.names[self.name_offsets[index] : self.name_offsets[index + 1]])

    def path(self, index: int) -> Path:
        """Where image `index` lies."""
        return self.image_root / self.file_name(index)

    @property
    def num_objects(self) -> int:
        """Objects of all images, crowd regions not counted."""
        return int(np.count_nonzero(~self.crowd))

    def class_counts(self) -> Int64[np.ndarray, "K"]:
        """Objects of each class, crowd regions not counted."""
        return np.bincount(self.labels[~self.crowd], minlength=len(self.classes)).astype(np.int64)

    def fingerprint(self) -> str:
        """SHA-256 over classes, ids, names, sizes and objects: equal exactly when training would see the same data.

        Where the files lie does not count, so a data set may be moved between a run and its resumption.
        """
        digest = hashlib.sha256(json.dumps([self.classes, self.category_ids]).encode())
        digest.update(self.names)
        for array in (self.name_offsets, self.image_ids, self.sizes, self.offsets, self.boxes, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(self.crowd.tobytes() + self.areas.tobytes())
        return digest.hexdigest()


def read_coco(
    file: Path,
    image_root: Path,
    *,
    classes: Sequence[str] | None = None,
    report: DataReport | None = None,
    skip_faulty: bool = False,
    allow_outside: bool = False,
) -> Annotations:
    """Read and check a COCO annotation file.

    Without `classes`, labels follow ascending category id. With `classes` (of a training set or a checkpoint) they
    follow that order and categories are matched by name: a category outside `classes` that some annotation uses is a
    fault, an unused one is left out, and a class that the file does not know gets None in `category_ids`.
    Missing (or null) `iscrowd` reads as 0 and `area` as width * height. Whether the images exist is not checked here,
    only that no name, by its spelling or by a symbolic link, leads out of `image_root`, unless `allow_outside`.

    With `skip_faulty`, faulty annotations are left out, and faulty images together with their annotations; `report`
    lists them. Warnings go to `report` in any case.

    Raises:
        DataError: the file is missing, not JSON, not built like an annotation file, or has all its boxes in another
            convention.
        RecordsError: single records are wrong; all of them are listed. With `skip_faulty` only for categories, or if
            no image is left.
    """
    faults: list[str] = []
    warnings = report.warnings if report is not None else []
    document = load_document(file, warnings)
    name_of = check_categories(file, document["categories"], faults)
    unclear = bool(faults)
    images = check_images(file, document["images"], image_root, faults, warnings, allow_outside=allow_outside)
    if unclear:  # nearly every annotation would be at fault for its category
        raise RecordsError(faults)

    if classes is None:
        classes = [name_of[category_id] for category_id in sorted(name_of)]
    elif len(set(classes)) != len(classes):
        raise ValueError(f"classes are not unique: {list(classes)}")

    records = document["annotations"]
    positions = check_annotations(file, records, images, name_of, classes, faults, warnings)
    objects = _objects(file, records, positions, images, faults, warnings)
    if faults and not (skip_faulty and images.sound):
        raise RecordsError(faults)
    if report is not None:
        report.faults += faults

    id_of = {name: category_id for category_id, name in name_of.items()}
    label_of = {id_of[name]: label for label, name in enumerate(classes) if name in id_of}
    records, rows, xywh = objects
    areas = np.array([a.get("area") for a in records], dtype=np.float64)  # None becomes nan
    encoded = [_encode(image.name) for image in images.sound]
    order = np.argsort(rows, kind="stable")
    xywh = xywh[order]
    return Annotations(
        file=file,
        image_root=image_root,
        classes=tuple(classes),
        category_ids=tuple(id_of.get(name) for name in classes),
        image_ids=np.array([image.id for image in images.sound], dtype=np.int64),
        sizes=np.array([image.size for image in images.sound], dtype=np.int64),
        offsets=_offsets(np.bincount(rows, minlength=len(images.sound))),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        labels=np.array([label_of[a["category_id"]] for a in records], dtype=np.int64)[order],
        crowd=np.array([bool(a.get("iscrowd")) for a in records], dtype=np.bool_)[order],
        areas=np.where(np.isnan(areas[order]), xywh[:, 2] * xywh[:, 3], areas[order]),
        names=b"".join(encoded),
        name_offsets=_offsets(np.array([len(name) for name in encoded])),
    )


class _Objects(NamedTuple):
    """Sound annotations, in the file's order."""

    records: list[dict[str, Any]]
    rows: Int64[np.ndarray, "T"]
    """Which image each is of."""
    xywh: Float64[np.ndarray, "T 4"]


def _objects(
    file: Path, records: list[Any], positions: list[int], images: Images, faults: list[str], warnings: list[str]
) -> _Objects:
    """The annotations at `positions` whose boxes fit. Raises DataError if all boxes are in another convention."""
    row_of = {image.id: row for row, image in enumerate(images.sound)}
    sound = [records[position] for position in positions]
    rows = np.array([row_of[a["image_id"]] for a in sound], dtype=np.int64)
    xywh = np.array([a["bbox"] for a in sound], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([image.size for image in images.sound], dtype=np.int64).reshape(-1, 2)[rows]
    if problem := convention_problem(xywh, sizes):
        raise DataError(f"{file}: annotations: {problem}")
    names = {image.id: image.name for image in images.sound}
    kept = np.ones(len(rows), dtype=np.bool_)
    for found in box_problems(xywh, sizes):
        line = f"{file}: {describe(sound[found.row], positions[found.row], names)}: {found.text}"
        (faults if found.is_fault else warnings).append(line)
        kept[found.row] = not found.is_fault
    return _Objects([a for a, keep in zip(sound, kept.tolist(), strict=True) if keep], rows[kept], xywh[kept])


def locate_split(root: Path, split: str) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of a split ("train", "val") of a data set in COCO's layout.

    `annotations/instances_{split}.json` and `{split}/`, or the names of the 2017 release, `annotations/
    instances_{split}2017.json` and `{split}2017/`; DataError names what was expected and how to point elsewhere.
    """
    files = [root / "annotations" / f"instances_{split}{year}.json" for year in ("", "2017")]
    folders = [root / f"{split}{year}" for year in ("", "2017")]
    file = next((f for f in files if f.is_file()), None)
    folder = next((f for f in folders if f.is_dir()), None)
    if file is not None and folder is not None:
        return file, folder
    if file is None:
        where = listing(files[0].parent if files[0].parent.is_dir() else root)
        problem = f"expected {files[0]} or {files[1]} (with images in {split}/ or {split}2017/){where}"
    else:
        problem = f"expected the images in {folders[0]}/ or {folders[1]}/{listing(root)}"
    raise DataError(
        f"{root}: split {split!r}: {problem} - put them there, or name them: "
        f"data.{split}.annotations=<file.json> data.{split}.images=<folder>"
    )


def write_results(
    file: Path,
    annotations: Annotations,
    indices: Int[np.ndarray, "D"],
    boxes: Float[np.ndarray, "D 4"],
    scores: Float[np.ndarray, "D"],
    labels: Int[np.ndarray, "D"],
) -> None:
    """Write detections in COCO's results format: image and category ids of the file, `xywh` boxes, nothing rounded.

    `indices` are rows of `annotations`; boxes are xyxy in pixels of the original images. The file appears in one step,
    whole, with its folder. A detection of a class that `annotations` has no category id for raises DataError.
    """
    unknown = [k for k in np.unique(labels).tolist() if annotations.category_ids[k] is None]
    if unknown:
        raise DataError(
            f"{annotations.file}: class {annotations.classes[unknown[0]]!r}: detected, but the file has no category of "
            "that name to write it under - add it to the file's `categories`"
        )
    xy, wh = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    columns = (annotations.image_ids[indices], labels, np.concatenate([xy, wh], axis=1), scores)
    results = [
        {"image_id": image_id, "category_id": annotations.category_ids[label], "bbox": box, "score": score}
        for image_id, label, box, score in zip(*(column.tolist() for column in columns), strict=True)
    ]
    data = json.dumps(results, allow_nan=False).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, data)


def _offsets(counts: Int[np.ndarray, "N"]) -> Int64[np.ndarray, "N+1"]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")
