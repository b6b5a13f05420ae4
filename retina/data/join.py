"""Several annotation files as one data set, and a part of one. Beside the road."""

import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from retina.data.annotations import Annotations, offsets_of


def join(parts: Sequence[Annotations]) -> Annotations:
    """The images of all parts, one part after the other. Classes are united by name, those of the first part first.

    Ids are those of the files where all are distinct. Else images are numbered, and a class whose category id is taken
    gets a free one: what is written is then no file's alone. The image folder is the one that holds those of all parts.
    """
    if len(parts) == 1:
        return parts[0]
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    label_of = {name: label for label, name in enumerate(classes)}
    root = Path(os.path.commonpath([part.image_root.absolute() for part in parts]))
    names = [
        (part.image_root.absolute().relative_to(root) / part.file_name(row)).as_posix().encode("utf-8", "surrogatepass")
        for part in parts
        for row in range(len(part))
    ]
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    return Annotations(
        file=Path(" + ".join(str(part.file) for part in parts)),
        image_root=root,
        classes=classes,
        category_ids=_category_ids(parts, classes),
        image_ids=_image_ids(parts),
        sizes=np.concatenate([part.sizes for part in parts]),
        offsets=offsets_of(counts),
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([np.array([label_of[name] for name in part.classes])[part.labels] for part in parts]),
        crowd=np.concatenate([part.crowd for part in parts]),
        areas=np.concatenate([part.areas for part in parts]),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_offsets=offsets_of(np.array([len(name) for name in names], dtype=np.int64)),
        pixels=parts[0].pixels,
    )


def share(annotations: Annotations, fraction: float) -> Annotations:
    """So large a part of the images, at least one, in their order. They are drawn by a hash of their names, so that a
    smaller part is within a larger one, and a part stays the same when images are added."""
    if fraction == 1:
        return annotations
    names = (annotations.file_name(row).encode("utf-8", "surrogatepass") for row in range(len(annotations)))
    keys = [blake2b(name, digest_size=8).digest() for name in names]
    kept = sorted(range(len(keys)), key=keys.__getitem__)[: max(1, round(fraction * len(keys)))]
    return select(annotations, np.array(sorted(kept), dtype=np.int64))


def select(annotations: Annotations, rows: Int64[np.ndarray, "n"]) -> Annotations:
    """The images of these rows alone, with their objects."""
    objects, letters = (_ranges(offsets, rows) for offsets in (annotations.offsets, annotations.name_offsets))
    return replace(
        annotations,
        image_ids=annotations.image_ids[rows],
        sizes=annotations.sizes[rows],
        offsets=offsets_of(np.diff(annotations.offsets)[rows]),
        boxes=annotations.boxes[objects],
        labels=annotations.labels[objects],
        crowd=annotations.crowd[objects],
        areas=annotations.areas[objects],
        names=annotations.names[letters],
        name_offsets=offsets_of(np.diff(annotations.name_offsets)[rows]),
    )


def _ranges(offsets: Int64[np.ndarray, "N"], rows: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "T"]:
    """The positions `offsets[row]:offsets[row + 1]` of each row, one row after the other."""
    counts = np.diff(offsets)[rows]
    begins = np.repeat(offsets[rows] - (np.cumsum(counts) - counts), counts)
    return begins + np.arange(len(begins))


def _category_ids(parts: Sequence[Annotations], classes: Sequence[str]) -> tuple[int | None, ...]:
    ids: dict[str, int] = {}
    for part in parts:
        for name, category_id in zip(part.classes, part.category_ids, strict=True):
            if name not in ids and category_id is not None:
                taken = category_id in ids.values()
                ids[name] = max(ids.values()) + 1 if taken else category_id
    return tuple(ids.get(name) for name in classes)


def _image_ids(parts: Sequence[Annotations]) -> np.ndarray:
    if len({part.image_ids.dtype.kind for part in parts}) == 1:
        ids = np.concatenate([part.image_ids for part in parts])
        if len(np.unique(ids)) == len(ids):
            return ids
    return np.arange(1, sum(map(len, parts)) + 1)
