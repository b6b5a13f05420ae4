"""Stronger augmentations than the paper's: colours and scales. Beside the road.

Settings name them as `retina.data.transforms.ColorJitter` and `.LargeScaleJitter`."""

import math
import random
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from retina.data.transforms import Boxes, Pixels, Transform, resize, scaled_size, sides

GREY = np.array([0.299, 0.587, 0.114])
"""What red, green and blue contribute to brightness (Rec. 601)."""
_TO_YIQ = np.array([GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue by random amounts, all in one pass over the pixels.

    Brightness, contrast and saturation are factors, uniform in 1 - x .. 1 + x (none below 0): of the pixel, of its
    distance from the image's mean grey, of its distance from its own grey. `hue` turns colours by a uniform -hue .. hue
    of the full circle around the grey axis, from red towards green, in the plane of YIQ's I and Q. One 3x4 matrix does
    all four, as NVIDIA DALI's ColorTwist (P. Haeberli, Matrix Operations for Pixels Processing, 1993), because nothing
    is clipped in between. albumentations and torchvision turn hue in HSV, clip after each, and take a random order.

    The result is within one grey level of the exact one. Raises ValueError if an amount is negative or `hue` above 0.5.
    """

    keeps_sizes = scale_free = rgb_only = True

    def __init__(
        self, brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2, hue: float = 0.05, p: float = 0.5
    ) -> None:
        self.p = p
        self.factors, self.hue = (brightness, contrast, saturation), hue
        if min(*self.factors, hue) < 0 or hue > 0.5:
            amounts = f"{brightness}, {contrast}, {saturation} and hue {hue}"
            raise ValueError(f"amounts must not be negative and hue must lie in 0..0.5, got {amounts}")

    def draw(self, generator: random.Random) -> tuple[float, float, float, float]:
        """Factors of brightness, contrast and saturation, and the turn of hue."""
        brightness, contrast, saturation = (generator.uniform(max(0.0, 1 - x), 1 + x) for x in self.factors)
        return brightness, contrast, saturation, generator.uniform(-self.hue, self.hue)

    def apply(self, image: Pixels, boxes: Boxes, generator: random.Random) -> tuple[Pixels, Boxes]:
        matrix = color_matrix(*self.draw(generator), mean_grey=GREY @ cv2.mean(image)[:3])
        return cv2.transform(image, matrix), boxes


def color_matrix(
    brightness: float, contrast: float, saturation: float, turn: float, mean_grey: float
) -> Float64[ndarray, "3 4"]:
    """The matrix that a pixel (r, g, b, 1) is multiplied by.

    With x' = brightness * x and m' = brightness * mean_grey, the result is m' + contrast * (S x' - m'), where S scales
    I and Q of YIQ by `saturation` and turns them by 2 pi `turn`, and leaves greys as they are.
    """
    along, across = (saturation * part(2 * math.pi * turn) for part in (math.cos, math.sin))
    in_yiq = np.array([[1, 0, 0], [0, along, across], [0, -across, along]])
    linear = brightness * contrast * (_FROM_YIQ @ in_yiq @ _TO_YIQ)
    offset = np.full((3, 1), brightness * (1 - contrast) * mean_grey)
    return np.hstack((linear, offset))


class LargeScaleJitter(Transform):
    """Resize so that the image fits `height` x `width` times a random factor, then cut out what exceeds the target.

    scale = u * min(height / h, width / w), u uniform in `scale`; the window lies anywhere in it. An image
    smaller than the target stays so: the collate pads. Sources: Ghiasi et al., Simple Copy-Paste, arXiv 2012.07177,
    section 3; RetinaNet trained with it: Du et al., arXiv 2107.00057."""

    def __init__(self, height: int, width: int, scale: Sequence[float] = (0.1, 2.0)) -> None:
        self.height, self.width = height, width
        self.scale = [float(bound) for bound in scale]
        if min(height, width) < 1:
            raise ValueError(f"height and width must be positive, got {height} and {width}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be [low, high] with 0 < low <= high, got {self.scale}")

    def apply(self, image: Pixels, boxes: Boxes, generator: random.Random) -> tuple[Pixels, Boxes]:
        fit = min(self.height / image.shape[0], self.width / image.shape[1])
        resized = scaled_size(image.shape[:2], fit * generator.uniform(*self.scale))
        height, width = min(self.height, resized[0]), min(self.width, resized[1])
        top, left = generator.randint(0, resized[0] - height), generator.randint(0, resized[1] - width)
        moved = boxes.copy()
        moved[:, :4] = (boxes[:, :4] * sides(resized) - (left, top, left, top)) / sides((height, width))
        return np.ascontiguousarray(resize(image, resized)[top : top + height, left : left + width]), moved
