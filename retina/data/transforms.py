"""From a decoded photograph and its boxes to a training or evaluation sample.

Boxes stay in step with pixels: both move by the same ratio of whole-pixel sizes, so rounding a new image size never
shifts a box against its object. Images stay uint8 from end to end; mean and std belong to the model.
Transforms of albumentations and torchvision work as well: `retina.data.adapters`.
"""

import os
import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from numpy import ndarray

from retina._lazy import lazy
from retina.data.channels import resize_channels
from retina.errors import ConfigError

if TYPE_CHECKING:  # beside the road
    from retina.data.augmentations import ColorJitter as ColorJitter
    from retina.data.augmentations import LargeScaleJitter as LargeScaleJitter
else:
    __getattr__, __dir__, _ = lazy(__name__)

# albumentations, where it is imported after this module, asks the network for its newest version unless this is set.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

Pixels = UInt8[ndarray, "_ _ _"]
Boxes = Float64[ndarray, "_ 5"]
"""x1, y1, x2, y2 as fractions of the image, and the row that the object has in the sample: it travels with its box."""


_DEFERRED = 3 << 22
"""Bytes of an image that may wait for its resize: beyond, that costs little beside the decoding."""


class Transform:
    """A random change of an image and its boxes, made with probability `p`. Subclasses say `apply`.

    All randomness must come from the generator that `apply` is given, because a sample must not depend on anything
    but its seed. Boxes may come out beyond the image: `Pipeline` clips them."""

    p: float = 1.0
    keeps_sizes = False
    """Whether image and boxes keep their sizes."""
    scale_free = False
    """Whether it does the same before a resize and after it: then large photographs may be decoded smaller."""
    rgb_only = False

    def __call__(self, image: Pixels, boxes: Boxes, seed: int) -> tuple[Pixels, Boxes]:
        generator = random.Random(seed)
        if self.p < 1 and generator.random() >= self.p:
            return image, boxes
        return self.apply(image, boxes, generator)

    def apply(self, image: Pixels, boxes: Boxes, generator: random.Random) -> tuple[Pixels, Boxes]:
        raise NotImplementedError


class HorizontalFlip(Transform):
    """Left becomes right, with probability `p`."""

    keeps_sizes = scale_free = True
    axis = 0

    def __init__(self, p: int | float = 0.5) -> None:
        self.p = p

    def apply(self, image: Pixels, boxes: Boxes, generator: random.Random) -> tuple[Pixels, Boxes]:
        flipped = boxes.copy()
        flipped[:, self.axis], flipped[:, self.axis + 2] = 1 - boxes[:, self.axis + 2], 1 - boxes[:, self.axis]
        return cv2.flip(image, 1 - self.axis).reshape(image.shape), flipped


class VerticalFlip(HorizontalFlip):
    """Top becomes bottom, with probability `p`."""

    axis = 1


class ResizeShortSide(Transform):
    """Resize with the ratio kept: the short side becomes `short_side`, unless the long one would exceed `long_side`.

    scale = min(short_side / min(h, w), long_side / max(h, w)), new sizes rounded to the nearest pixel. Of several
    `short_side` one is drawn per image. The rule of Faster R-CNN (Ren et al., arXiv 1506.01497)."""

    def __init__(self, short_side: int | Sequence[int], long_side: int | None = None) -> None:
        self.short_side = [int(short_side)] if isinstance(short_side, int) else [int(side) for side in short_side]
        self.long_side = long_side
        if not self.short_side or min(self.short_side) < 1 or (long_side is not None and long_side < 1):
            raise ValueError(f"sides must be positive, got short_side={short_side}, long_side={long_side}")

    def apply(self, image: Pixels, boxes: Boxes, generator: random.Random) -> tuple[Pixels, Boxes]:
        return resize(image, self.size_of(image.shape[:2], generator.choice(self.short_side))), boxes

    def size_of(self, size: tuple[int, ...], short_side: int) -> tuple[int, int]:
        """(height, width) that an image of this (height, width) becomes."""
        scale = short_side / min(size)
        if self.long_side is not None:
            scale = min(scale, self.long_side / max(size))
        return scaled_size(size, scale)


class Sample(NamedTuple):
    """One image with its objects, in numpy: what a dataset yields and a pipeline maps to another."""

    image: UInt8[ndarray, "H W C"]
    boxes: Float32[ndarray, "M 4"]
    labels: Int64[ndarray, "M"]
    crowd: Bool[ndarray, "M"]
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    """Which record of the annotations it is."""
    original_size: tuple[int, int]
    """(height, width) of the image file after EXIF rotation, before any transform."""
    size: tuple[int, int] | None = None
    """(height, width) that the image is still to be resized to, in whose pixels boxes are; None: it is as it is."""


class Pipeline:
    """Named transforms, applied in order to an image and its boxes: ours, or what `retina.data.adapters` adapts.

    Coordinates are float64 fractions of the image meanwhile. After each transform that may change a box's size, and at
    the end, boxes are clipped to the image; one that is then narrower or lower than `min_size` pixels, or has less than
    `min_visibility` of the area it had before that clip, is dropped with its label and crowd flag. Boxes without area
    are dropped. (`albumentations.Compose` with `clip`, `filter_invalid_bboxes`, `check_each_transform`.)

    Each transform draws from a random stream of its own, keyed by its name in the mapping, so that switching one off
    does not change what the others do.

    Raises ValueError if `min_size` is not positive or `min_visibility` not in 0..1, ConfigError for what is no
    transform; on use, ConfigError if an image comes out as anything but uint8 of its channels, ValueError if a
    transform makes a box NaN or infinite, and whatever a transform raises.
    """

    def __init__(self, transforms: Mapping[str, Any], *, min_size: float = 1.0, min_visibility: float = 0.1) -> None:
        if not min_size > 0:
            raise ValueError(f"min_size must be positive, got {min_size}")
        if not 0 <= min_visibility <= 1:
            raise ValueError(f"min_visibility must lie in 0..1, got {min_visibility}")
        # a box of exactly min_size must survive what float32 does to its sides
        self.min_size, self.min_visibility = min_size * (1 - 1e-3), min_visibility * (1 - 1e-6)
        self.transforms: dict[str, Transform] = {}
        for name, transform in transforms.items():
            if not isinstance(transform, Transform):
                from retina.data.adapters import adapt  # only for other libraries' transforms

                transform = adapt(transform, name, min_size=self.min_size, min_visibility=self.min_visibility)
            self.transforms[name] = transform
        *before, last = self.transforms.values() if self.transforms else [None]
        self._resize = last if isinstance(last, ResizeShortSide) else None
        self._may_reduce = all(transform.scale_free for transform in before if transform)

    def __call__(self, sample: Sample, seed: int) -> Sample:
        """The transformed sample: a pure function of the sample and the seed."""
        unsized = self.without_last_resize(sample, seed)
        return unsized._replace(image=resize(unsized.image, unsized.size), size=None)

    def without_last_resize(self, sample: Sample, seed: int) -> Sample:
        """The transformed sample, except the pixels of a `ResizeShortSide` that comes last: `Sample.size` is set
        instead, so that `collate` can resize straight onto the canvas of the batch. Large images are resized at once,
        so that a batch in the making holds few bytes."""
        image = sample.image
        size: tuple[int, int] = sample.size or (image.shape[0], image.shape[1])
        boxes = np.empty((len(sample.boxes), 5))
        boxes[:, :4] = _clip(sample.boxes / sides(size))
        boxes[:, 4] = np.arange(len(boxes))
        boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
        checked = False
        for name, transform in self.transforms.items():
            stream = stable_hash(seed, name)
            if transform is self._resize:
                size = self._resize.size_of(size, random.Random(stream).choice(self._resize.short_side))
            else:
                shape = image.shape[:2]
                image, boxes = transform(image, boxes, stream)
                if image.shape[:2] != shape:
                    size = image.shape[0], image.shape[1]
            checked = not transform.scale_free
            boxes = self._kept(boxes, size) if checked else boxes
        boxes = boxes if checked else self._kept(boxes, size)
        if image.dtype != np.uint8 or image.shape[2:] != sample.image.shape[2:]:
            problem = f"{', '.join(self.transforms)}: the image came out as {image.dtype} of shape {image.shape}"
            fix = "leave out normalisation and conversions, the model does them"
            raise ConfigError(f"augment: {problem} - {fix}", code="augment")
        if image.size > _DEFERRED:
            image = resize(image, size)
        rows = boxes[:, 4].round().astype(np.int64)
        return sample._replace(
            image=np.ascontiguousarray(image),
            boxes=(boxes[:, :4] * sides(size)).astype(np.float32),
            labels=sample.labels[rows],
            crowd=sample.crowd[rows],
            size=size,
        )

    def least_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """How small, as (height, width), an image of this size may come here: as the resize at the end makes it, if
        nothing before that counts in pixels. None: as it is."""
        if not (self._resize and self._may_reduce):
            return None
        return self._resize.size_of(size, max(self._resize.short_side))

    def _kept(self, boxes: Float[ndarray, "..."], size: tuple[int, int]) -> Boxes:
        """Boxes clipped to the image, without those that are then too small."""
        if len(boxes) == 0:  # of any shape: some transforms forget the columns
            return np.empty((0, 5))
        if not np.isfinite(boxes).all():
            raise ValueError("a transform made a box that is not finite")
        clipped = boxes.astype(np.float64)
        clipped[:, :4] = _clip(boxes[:, :4])
        width, height = (clipped[:, 2:4] - clipped[:, :2]).T
        before = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        large = np.minimum(width * size[1], height * size[0]) >= self.min_size
        return clipped[large & (width * height >= before * self.min_visibility)]


def default_pipeline(short_side: int = 800, long_side: int | None = 1333) -> Pipeline:
    """The paper's training recipe: half of the images flipped, and the resize of evaluation."""
    return Pipeline({"flip": HorizontalFlip(), "resize": ResizeShortSide(short_side, long_side)})


def eval_pipeline(short_side: int = 800, long_side: int | None = 1333) -> Pipeline:
    """The pipeline of evaluation and inference: nothing but the resize."""
    return Pipeline({"resize": ResizeShortSide(short_side, long_side)})


def stable_hash(*parts: int | str) -> int:
    """A 64-bit number that depends on the parts and on nothing else: no process, machine, or library version."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def _clip(fractions: Float[ndarray, "M 4"]) -> Float[ndarray, "M 4"]:
    return np.minimum(np.maximum(fractions, 0.0), 1.0)  # np.clip takes as long as the rest of the box arithmetic


def sides(size: tuple[int, int]) -> Float64[ndarray, "4"]:
    height, width = size
    return np.array([width, height, width, height], dtype=np.float64)


def scaled_size(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """(height, width) times `scale`, to the nearest pixel."""
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def resize(
    image: UInt8[ndarray, "H W C"], size: tuple[int, int] | None, out: UInt8[ndarray, "h w C"] | None = None
) -> UInt8[ndarray, "h w C"]:
    """The image at (height, width); written into `out`, a window of a larger array, where that is given."""
    if size is None or image.shape[:2] == size:
        if out is None:
            return image
        out[:] = image
        return out
    height, width = size
    # Bilinear reads four pixels only, so when it shrinks it skips the others and aliases; area averages all of them.
    # When it enlarges, area would repeat whole pixels.
    shrinks = height < image.shape[0] or width < image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    if image.shape[2] > 4:
        return resize_channels(image, (width, height), interpolation, out)
    return cv2.resize(image, (width, height), dst=out, interpolation=interpolation).reshape(height, width, -1)
