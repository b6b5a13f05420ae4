"""Detections as `detections.json`: COCO's results format, with names and sizes beside the ids. Beside the road.

Format: https://cocodataset.org/#format-results; docs/decisions.md describes the keys.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from retina.data.annotations import Annotations
from retina.errors import DataError
from retina.files import make_folder, write_whole


class Pictured(NamedTuple):
    """What a result says of its image."""

    image_id: int | str
    file_name: str
    width: int
    height: int


def result(
    image: Pictured, category_id: int | None, category: str, box: Sequence[float], score: float
) -> dict[str, Any]:
    """One detection; `box` is xyxy in pixels of the image."""
    x1, y1, x2, y2 = box
    values = {"image_id": image.image_id, "category_id": category_id, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    names = {"category": category, "file_name": image.file_name, "width": image.width, "height": image.height}
    return values | {"score": score} | names


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
        problem = "detected, but the file has no category of that name to write it under - add it to `categories`"
        name = annotations.classes[unknown[0]]
        raise DataError(f"{annotations.file}: class {name!r}: {problem}", code="unknown-class")
    images = {
        index: Pictured(
            annotations.image_ids[index].item(), annotations.file_name(index), *annotations.sizes[index][::-1].tolist()
        )
        for index in np.unique(indices).tolist()
    }
    columns = (indices, labels, boxes.astype(np.float64), scores)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    results = [
        result(images[index], annotations.category_ids[label], annotations.classes[label], box, score)
        for index, label, box, score in rows
    ]
    data = json.dumps(results, allow_nan=False).encode()
    make_folder(file.parent)
    write_whole(file, data)
