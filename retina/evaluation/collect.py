"""Detections of an evaluation, gathered from all ranks as flat arrays, each image once."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from retina.distributed import gather_arrays
from retina.evaluation.metrics import DetectionArrays
from retina.types import Detections


class DetectionCollector:
    """Keeps the detections of this rank's images on the CPU until `gather` puts those of all ranks together."""

    def __init__(self) -> None:
        self._images: list[np.ndarray] = [np.empty(0, np.int64)]
        self._counts: list[np.ndarray] = [np.empty(0, np.int64)]
        self._boxes: list[np.ndarray] = [np.empty((0, 4), np.float64)]
        self._scores: list[np.ndarray] = [np.empty(0, np.float64)]
        self._labels: list[np.ndarray] = [np.empty(0, np.int64)]

    def add(self, indices: Int64[Tensor, "B"], detections: Sequence[Detections]) -> None:
        """Add a batch: record indices of its images, and their detections in pixels of the original images.

        An image without detections is added like any other. Copies to the CPU once per batch, not once per image.
        """
        if len(indices) != len(detections):
            raise ValueError(f"{len(indices)} indices for the detections of {len(detections)} images")
        if not detections:
            return
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*detections, strict=True))
        self._images.append(indices.cpu().numpy().astype(np.int64))
        self._counts.append(np.array([len(one.scores) for one in detections], dtype=np.int64))
        self._boxes.append(boxes.cpu().double().numpy())
        self._scores.append(scores.cpu().double().numpy())
        self._labels.append(labels.cpu().numpy().astype(np.int64))

    def gather(self) -> DetectionArrays:
        """Detections of all ranks, the same on every rank, sorted by image and then in the order they were added.

        An image added more than once (a sampler repeats some so that ranks have equally many) counts once: the first
        time on the lowest rank.
        """
        lists = (self._images, self._counts, self._boxes, self._scores, self._labels)
        ranks = gather_arrays([np.concatenate(parts) for parts in lists])
        images, counts, boxes, scores, labels = (np.concatenate(parts) for parts in zip(*ranks, strict=True))

        kept, first = np.unique(images, return_index=True)
        begins = (np.cumsum(counts) - counts)[first]
        lengths = counts[first]
        total = int(lengths.sum())
        rows = np.arange(total) + np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
        return DetectionArrays(np.repeat(kept, lengths), boxes[rows], scores[rows], labels[rows])
