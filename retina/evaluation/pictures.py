"""Pictures of detections beside the ground truth, of images spread evenly over a data set. Beside the road."""

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from retina.data.coco import Annotations
from retina.data.images import MAX_PIXELS, read_image
from retina.errors import DataError
from retina.evaluation.metrics import DetectionArrays
from retina.files import make_folder, write_whole
from retina.types import Detections
from retina.visualize import Limits, grid, side_by_side

_GRID_SIDE = 2400  # pixels: a screenful that TensorBoard still loads at once


def evaluation_pictures(
    annotations: Annotations,
    detections: DetectionArrays,
    *,
    max_images: int,
    score_threshold: Limits = 0.3,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "H W 3"]:
    """One picture of up to `max_images` images, each beside its detections with score >= threshold.

    The same images in every evaluation of a data set, so that the pictures of a run can be compared. An image that
    cannot be read is left out, because the loader reports it; without any, the picture is one grey pixel."""
    pairs = _pairs(annotations, detections, max_images, score_threshold, max_pixels)
    pictures = [picture for _, picture in pairs] or [np.full((1, 1, 3), 128, np.uint8)]
    whole = Image.fromarray(grid(pictures))
    whole.thumbnail((_GRID_SIDE, _GRID_SIDE))
    return np.asarray(whole).copy()


def write_evaluation_pictures(
    folder: Path,
    annotations: Annotations,
    detections: DetectionArrays,
    *,
    max_images: int,
    score_threshold: Limits,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """A JPEG for each of those images, named `<id, or number>_<file name>.jpg`; returns how many."""
    count = 0
    for index, picture in _pairs(annotations, detections, max_images, score_threshold, max_pixels):
        make_folder(folder, within=folder.parent)
        # the id keeps images of equal names apart; folders of the file name could lead out of `folder`
        stem = os.fsencode(Path(annotations.file_name(index)).stem)[:200].decode(errors="ignore")
        image_id = annotations.image_ids[index].item()
        name = f"{image_id if isinstance(image_id, int) else index}_{stem}.jpg"
        content = BytesIO()
        Image.fromarray(picture).save(content, "JPEG", quality=90)
        write_whole(folder / name, content.getvalue())
        count += 1
    return count


def _pairs(
    annotations: Annotations, detections: DetectionArrays, max_images: int, score_threshold: Limits, max_pixels: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "_ _ 3"]]]:
    """Indices of the images, spread evenly, and their pictures."""
    for index in np.unique(np.linspace(0, len(annotations) - 1, max_images).round().astype(int)).tolist():
        try:
            image = read_image(annotations.path(index), max_pixels=max_pixels, pixels=annotations.pixels)
        except DataError:
            continue
        objects = slice(annotations.offsets[index], annotations.offsets[index + 1])
        truth = (annotations.boxes[objects], annotations.labels[objects])
        rows = detections.indices == index
        boxes, scores, labels = (torch.from_numpy(field[rows]) for field in detections[1:])
        predicted = Detections(boxes.float(), scores.float(), labels)
        classes, crowd = annotations.classes, annotations.crowd[objects]
        yield index, side_by_side(image, *truth, predicted, classes, crowd=crowd, score_threshold=score_threshold)
