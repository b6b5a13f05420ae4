"""Samples of different sizes onto one canvas."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retina.data.transforms import Sample, resize
from retina.errors import ConfigError
from retina.types import Batch, Targets


def collate(
    samples: Sequence[Sample],
    *,
    divisor: int,
    pad_value: tuple[int, int, int],
    canvases: Sequence[tuple[int, int]] | None = None,
    shared: bool = False,
) -> Batch:
    """Put images at the top left of a common canvas filled with `pad_value`, and pad their targets to a common count.

    The canvas is the greatest height by the greatest width, each rounded up to a multiple of `divisor`; with
    `canvases` it is instead the one of least area among them (height, width) that holds every image, the first of equal
    ones. Images are [B 3 H W] in channels_last memory, which is the order in which they are decoded. Each pixel is
    written once, by the resize that `Sample.size` asks for or as a copy, and with `shared` to memory that other
    processes can map. Boxes and labels of padding are zero; without any object M is 0.

    Raises ValueError if there are no samples, ConfigError if no canvas is large enough or one is no multiple of
    `divisor`, RuntimeError if there is too little (shared) memory.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    sizes = [sample.size or sample.image.shape[:2] for sample in samples]
    canvas = _canvas(sizes, divisor, canvases)
    images = _uninitialised((len(samples), *canvas, 3), shared)
    count = max(len(sample.boxes) for sample in samples)
    boxes = np.zeros((len(samples), count, 4), dtype=np.float32)
    labels = np.zeros((len(samples), count), dtype=np.int64)
    valid = np.zeros((len(samples), count), dtype=bool)
    crowd = np.zeros((len(samples), count), dtype=bool)
    padding = np.full((canvas[1], 3), pad_value, dtype=np.uint8)
    for row, (sample, (height, width)) in enumerate(zip(samples, sizes, strict=True)):
        target = images[row].numpy()
        resize(sample.image, (height, width), out=target[:height, :width])
        # by rows: numpy writes one pixel after the other, and would take longer over them than to decode the image
        target[:height, width:] = padding[width:]
        target[height:] = padding
        objects = len(sample.boxes)
        boxes[row, :objects] = sample.boxes
        labels[row, :objects] = sample.labels
        valid[row, :objects] = ~sample.crowd
        crowd[row, :objects] = sample.crowd
    return Batch(
        images=images.permute(0, 3, 1, 2),
        sizes=torch.tensor(sizes, dtype=torch.int64),
        targets=Targets(*map(torch.from_numpy, (boxes, labels, valid, crowd))),
        indices=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        original_sizes=torch.tensor([sample.original_size for sample in samples], dtype=torch.int64),
    )


def _uninitialised(shape: tuple[int, ...], shared: bool) -> UInt8[Tensor, "..."]:
    if not shared:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))  # numpy asks for huge pages, PyTorch does not
    # as PyTorch's own collate does; `share_memory_` would copy what is not yet written
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


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
