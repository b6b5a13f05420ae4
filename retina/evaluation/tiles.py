"""Detections of the tiles of images, put together to those of the images. Beside the road."""

from typing import Any

import numpy as np
import torch

from retina.data.tiled import TiledAnnotations
from retina.evaluation.metrics import DetectionArrays
from retina.ops.seams import is_cut, merge
from retina.types import Detections


def merge_tiles(
    detections: DetectionArrays,
    tiles: TiledAnnotations,
    *,
    nms_iou: float = 0.5,
    class_agnostic: bool = False,
    **_: Any,
) -> DetectionArrays:
    """Detections of images, in their pixels, from those of tiles, in the tiles' pixels: as `Detector.predict` has them.

    The settings are those of `postprocess`, of which others are not needed."""
    merged: list[tuple[int, Detections]] = []
    image_of = tiles.image_of[detections.indices]
    for image in np.unique(image_of).tolist():
        rows = slice(*np.searchsorted(image_of, [image, image + 1]).tolist())  # tiles of an image follow each other
        height, width = tiles.images.sizes[image].tolist()
        boxes = torch.from_numpy(detections.boxes[rows].copy())
        cut = torch.zeros(len(boxes), dtype=torch.bool)
        for tile in np.unique(detections.indices[rows]).tolist():
            places = torch.from_numpy(np.flatnonzero(detections.indices[rows] == tile))
            top, left, bottom, right = tiles.windows[tile].tolist()
            cut[places] = is_cut(boxes[places].float(), (top, left, bottom, right), (height, width))
            boxes[places] += boxes.new_tensor([left, top, left, top])
        scores, labels = (torch.from_numpy(values[rows]) for values in (detections.scores, detections.labels))
        whole = merge(
            Detections(boxes.float(), scores.float(), labels), cut, nms_iou=nms_iou, class_agnostic=class_agnostic
        )
        merged.append((image, whole))
    counts = [len(whole.scores) for _, whole in merged]
    images = np.repeat(np.array([image for image, _ in merged], np.int64), counts)
    fields = [torch.cat(values).numpy() for values in zip(*(whole for _, whole in merged), strict=True)]
    if not fields:
        return detections
    return DetectionArrays(images, fields[0].astype(np.float64), fields[1].astype(np.float64), fields[2])
