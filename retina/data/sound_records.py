"""What sound annotations hold, as columns. Beside the road."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from retina.data.annotations import Annotations, offsets_of
from retina.data.checks import DataReport, Images, around_rotated, box_problems, convention_problem, describe
from retina.data.ids import id_column
from retina.data.oddities import count_oddities, record_oddities, rotations
from retina.data.packed_records import PackedRecords
from retina.errors import DataError


class SoundRecords(NamedTuple):
    """Sound annotations, in the file's order."""

    positions: Int64[np.ndarray, "T"]
    """In the file."""
    rows: Int32[np.ndarray, "T"]
    """Of `Images.sound`."""
    xywh: Float64[np.ndarray, "T 4"]
    labels: Int64[np.ndarray, "T"]
    crowd: Bool[np.ndarray, "T"]
    areas: Float64[np.ndarray, "T"]
    """NaN where the file has none."""
    degrees: Float64[np.ndarray, "T"]
    oddities: Int64[np.ndarray, "3"]


def sound_records(
    records: PackedRecords,
    positions: Int64[np.ndarray, "T"],
    images: Images,
    classes: Sequence[str],
    name_of: Mapping[int, str],
) -> SoundRecords:
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
    return SoundRecords(positions, rows, xywh, labels, crowd, areas, degrees, oddities)


def arranged(
    file: Path,
    image_root: Path,
    classes: Sequence[str],
    name_of: Mapping[int, str],
    images: Images,
    records: PackedRecords,
    columns: SoundRecords,
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
