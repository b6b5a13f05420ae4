"""Boxes against their images: single ones that are wrong or odd, and whole files in another convention.

Vectorised, for annotation files have a million of them. Boxes are COCO's [x, y, width, height] in pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.data.records import MAX_OVERHANG

_FARTHEST = 2.0**31
_ENOUGH = 3
"""Boxes from which on a file may be judged as a whole."""
_NEARLY_ALL = 0.99
_OFTEN = 0.3
"""Share of boxes leaving their images that true [x, y, width, height] never has."""


class BoxProblem(NamedTuple):
    """Something about one box, as "problem - fix"."""

    row: int
    text: str
    is_fault: bool


def convention_problem(xywh: Float64[np.ndarray, "T 4"], sizes: Int64[np.ndarray, "T 2"]) -> str | None:
    """Tells that a whole file is normalised to 0..1, or holds [x1, y1, x2, y2], as "problem - fix".

    `sizes` are (height, width) of the image of every box. Fractions: nearly all numbers are within 0..1 and some are no
    integers. Corners: nearly all boxes are sound when read so, while as [x, y, width, height] many leave their images.
    """
    if len(xywh) < _ENOUGH:
        return None
    small = ((xywh >= 0) & (xywh <= 1)).all(axis=1)
    if small.mean() >= _NEARLY_ALL and (xywh != np.round(xywh)).any() and sizes.min() > 1:
        return (
            f"{small.mean():.0%} of the boxes lie within 0..1, so they are fractions of the image - multiply x and "
            "width by the image's width, y and height by its height (tools/convert.py format=yolo reads YOLO labels)"
        )
    height, width = sizes.T
    corners = (xywh[:, 2] > xywh[:, 0]) & (xywh[:, 3] > xywh[:, 1])
    corners &= (xywh[:, 2] <= width + MAX_OVERHANG) & (xywh[:, 3] <= height + MAX_OVERHANG)
    leaving = (_overhang(xywh, sizes) > MAX_OVERHANG).mean()
    if corners.mean() >= _NEARLY_ALL and leaving >= _OFTEN and leaving * len(xywh) >= _ENOUGH - 1:
        return (
            f"the boxes are [x1, y1, x2, y2]: so read they fit, as [x, y, width, height] {leaving:.0%} of them leave "
            "their images - write [x1, y1, x2 - x1, y2 - y1]"
        )
    return None


def box_problems(xywh: Float64[np.ndarray, "T 4"], sizes: Int64[np.ndarray, "T 2"]) -> Iterator[BoxProblem]:
    """What is wrong (outside the image) or odd (partly outside, no area, below a pixel) about single boxes, by row.

    The numbers must be finite and no side negative. Of several problems of a box, the gravest."""
    overhang = _overhang(xywh, sizes)
    with np.errstate(over="ignore"):
        reach = np.minimum(xywh[:, :2] + xywh[:, 2:], sizes[:, ::-1]) - np.maximum(xywh[:, :2], 0)
    outside = ((reach < 0) | ((reach == 0) & (xywh[:, 2:] > 0))).any(axis=1)
    side = xywh[:, 2:].min(axis=1)
    kinds: list[tuple[Bool[np.ndarray, "T"], str, bool]] = [
        (
            np.abs(xywh).max(axis=1, initial=0) > _FARTHEST,
            "is larger than any image - correct or remove it",
            True,
        ),
        (
            outside,
            "lies outside the image of {width}x{height} - correct it, or the image's width and height",
            True,
        ),
        (
            overhang > MAX_OVERHANG,
            "leaves the image of {width}x{height} by {overhang:g} px - training clips it; correct it, or the image's "
            "width and height",
            False,
        ),
        (side == 0, "has no area - training leaves it out; correct or remove it", False),
        (side < 1, "is less than a pixel wide or high - training may leave it out; check its units", False),
    ]
    told = np.zeros(len(xywh), dtype=np.bool_)
    found: list[BoxProblem] = []
    for mask, text, is_fault in kinds:
        for row in np.flatnonzero(mask & ~told).tolist():
            height, width = sizes[row].tolist()
            shown = ", ".join(f"{value:.12g}" for value in xywh[row].tolist())
            words = text.format(width=width, height=height, overhang=overhang[row])
            found.append(BoxProblem(row, f"bbox [{shown}] {words}", is_fault))
        told |= mask
    return iter(sorted(found))


def _overhang(xywh: Float64[np.ndarray, "T 4"], sizes: Int64[np.ndarray, "T 2"]) -> Float64[np.ndarray, "T"]:
    """Pixels by which each box leaves its image at the worst edge; negative inside."""
    with np.errstate(over="ignore"):  # 1e308 is a number too
        beyond = xywh[:, :2] + xywh[:, 2:] - sizes[:, ::-1]
    return np.maximum(beyond, -xywh[:, :2]).max(axis=1, initial=-np.inf)
