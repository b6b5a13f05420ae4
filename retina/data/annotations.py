"""What a data set's annotation file says, in the form that everything behind the reader works on."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Shaped, UInt8

from retina.data.pixels import AS_STORED, PixelFormat


@dataclass(frozen=True, eq=False)
class Annotations:
    """An annotation file as flat arrays, without a Python object per record: forked workers share their pages.

    Images keep the order of the file, those without objects too; the objects of image i, crowd regions included, are
    rows `offsets[i]:offsets[i + 1]`, in the file's order.
    """

    file: Path
    """The JSON file."""
    image_root: Path
    """The folder that file names are relative to."""
    classes: tuple[str, ...]
    """Label k is `classes[k]`."""
    category_ids: tuple[int | None, ...]
    """The file's own id of every class; None for a class (of a training set or checkpoint) that it does not know."""
    image_ids: Shaped[np.ndarray, "N"]
    """The file's own: int64, or text."""
    sizes: Int64[np.ndarray, "N 2"]
    """(height, width) as the file states."""
    offsets: Int64[np.ndarray, "N+1"]
    boxes: Float64[np.ndarray, "T 4"]
    """xyxy in pixels; float64, because metrics need the digits of the file."""
    labels: Int64[np.ndarray, "T"]
    crowd: Bool[np.ndarray, "T"]
    areas: Float64[np.ndarray, "T"]
    """The file's `area`, or width * height of the box where it has none."""
    names: UInt8[np.ndarray, "S"]
    """File names of all images in UTF-8, one behind the other; see `file_name`."""
    name_offsets: Int64[np.ndarray, "N+1"]
    pixels: PixelFormat = AS_STORED
    """How the images' values are to be read; whoever trains or scores decides."""

    def __len__(self) -> int:
        """Images, with or without objects."""
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """Name of image `index` as the file states it, sub-folders included."""
        index = range(len(self))[index]
        name = self.names[self.name_offsets[index] : self.name_offsets[index + 1]]
        return name.tobytes().decode("utf-8", "surrogatepass")

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
        images = (self.names, self.name_offsets, self.image_ids, self.sizes, self.offsets)
        for array in (*images, self.boxes, self.labels, self.crowd, self.areas):
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def offsets_of(counts: Int[np.ndarray, "N"]) -> Int64[np.ndarray, "N+1"]:
    """Where each of so many rows begins, and the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
