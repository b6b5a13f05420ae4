"""Samples of different sizes onto one canvas."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray

from retina.data.transforms import Sample
from retina.errors import ConfigError
from retina.types import Batch, Targets


def collate(
    samples: Sequence[Sample],
    *,
    divisor: int,
    pad_value: tuple[int, int, int],
    canvases: Sequence[tuple[int, int]] | None = None,
) -> Batch:
    """Put images at the top left of a common canvas filled with `pad_value`, and pad their targets to a common count.

    The canvas is the greatest height by the greatest width, each rounded up to a multiple of `divisor`; with
    `canvases` it is instead the one of least area among them (height, width) that holds every image, the first of equal
    ones. Images are [B 3 H W] in channels_last memory, which is the order in which they are decoded, so that collating
    copies each pixel once. Boxes and labels of padding are zero; without any object M is 0.

    Raises ValueError if there are no samples, ConfigError if no canvas is large enough or one is no multiple of
    `divisor`.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    canvas = _canvas([sample.image.shape[:2] for sample in samples], divisor, canvases)
    # uninitialised: every byte is written below, content and padding once each
    images = np.empty((len(samples), *canvas, 3), dtype=np.uint8)
    count = max(len(sample.boxes) for sample in samples)
    boxes = np.zeros((len(samples), count, 4), dtype=np.float32)
    labels = np.zeros((len(samples), count), dtype=np.int64)
    valid = np.zeros((len(samples), count), dtype=bool)
    crowd = np.zeros((len(samples), count), dtype=bool)
    for row, sample in enumerate(samples):
        _place(sample.image, images[row], pad_value)
        objects = len(sample.boxes)
        boxes[row, :objects] = sample.boxes
        labels[row, :objects] = sample.labels
        valid[row, :objects] = ~sample.crowd
        crowd[row, :objects] = sample.crowd
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        sizes=torch.tensor([sample.image.shape[:2] for sample in samples], dtype=torch.int64),
        targets=Targets(*map(torch.from_numpy, (boxes, labels, valid, crowd))),
        indices=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        original_sizes=torch.tensor([sample.original_size for sample in samples], dtype=torch.int64),
    )


def _place(image: ndarray, canvas: ndarray, pad_value: tuple[int, int, int]) -> None:
    height, width = image.shape[:2]
    canvas[:height, :width] = image
    canvas[:height, width:] = pad_value
    canvas[height:] = pad_value


def _canvas(
    sizes: Sequence[tuple[int, ...]], divisor: int, canvases: Sequence[tuple[int, int]] | None
) -> tuple[int, int]:
    height, width = (max(side) for side in zip(*sizes, strict=True))
    if canvases is None:
        return -(-height // divisor) * divisor, -(-width // divisor) * divisor
    shown = ", ".join(f"{h}x{w}" for h, w in canvases)
    if any(side % divisor for canvas in canvases for side in canvas):
        raise ConfigError(f"data.canvases: {shown} (height x width) are not all multiples of {divisor} - round them up")
    fitting = [(h, w) for h, w in canvases if h >= height and w >= width]
    if not fitting:
        raise ConfigError(
            f"data.canvases: none of {shown} (height x width) holds images of {height}x{width}"
            " - add a larger one, or make images smaller"
        )
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])
