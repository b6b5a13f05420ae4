"""What the programs of others take for granted and no tensor says."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from retina.errors import ConfigError

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What a program takes for granted and no tensor says. Lists are per RGB channel, boxes (x, y, w, h)."""

    bgr: bool = False
    """The first convolution takes blue, green, red."""
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    """On the scale 0..255."""
    stride_in_1x1: bool = False
    """A bottleneck halves its map in the first 1x1 convolution, as MSRA's did; else in the 3x3."""
    norm_eps: float = 1e-5
    norm_fixed: bool = False
    """The statistics of the backbone's BatchNorm were fixed while it was trained."""
    p7_relu: bool = True
    """A ReLU between P6 and P7."""
    anchor_sizes: Sequence[float] | None = None
    """One per level in pixels; None: 4 strides."""
    anchor_scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0)
    anchor_offset: float = 0.0
    """Of the first centre from the corner of the image, in strides."""
    anchors_rounded: bool = False
    """Corners on whole pixels."""
    anchors_spread: bool = False
    """Anchors are canvas // cells pixels apart, not a stride."""
    anchors_by_scale: bool = False
    """A cell's anchors go [scale ratio]; else [ratio scale] as ours."""
    delta_std: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    """What predicted deltas are multiplied with before boxes are made of them."""
    short_side: int = 800
    long_side: int = 1333
    divisor: int = 32
    score_threshold: float = 0.05
    candidates_per_level: int = 1000
    nms_iou: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        for name, count in (("std", 3), ("delta_std", 4)):
            values = getattr(self, name)
            self._check(name, len(values) == count and _positive(values), f"give {count} positive numbers")
        inside = len(self.mean) == 3 and all(0 <= value <= 255 for value in self.mean)
        self._check("mean", inside, "give 3 numbers from 0 to 255")
        for name in ("anchor_sizes", "anchor_scales", "anchor_ratios"):
            self._check(name, _positive(getattr(self, name) or ()), "give positive numbers")
        for name in ("short_side", "long_side", "divisor"):
            self._check(name, getattr(self, name) >= 1, "give 1 or more")
        self._check("short_side", self.short_side <= self.long_side, f"give at most the long side, {self.long_side}")
        self._check("norm_eps", 0 <= self.norm_eps < math.inf, "give 0 or more")
        self._check("anchor_offset", 0 <= self.anchor_offset <= 1, "give 0 to 1 stride")

    def _check(self, name: str, ok: bool, fix: str) -> None:
        value = getattr(self, name)
        if not ok:
            shown = list(value) if isinstance(value, Sequence) else value
            raise ConfigError(f"conventions.{name}: {shown} is not allowed - {fix}")


def _positive(values: Sequence[float]) -> bool:
    return all(0 < value < math.inf for value in values)


def given_conventions(usual: Conventions, given: Mapping[str, Any]) -> Conventions:
    """The usual ones with those that are given (not None) in their place."""
    known = [f.name for f in fields(Conventions)]
    for name in given:
        if name not in known:
            raise ConfigError(f"conventions.{name}: does not exist - choose among {', '.join(known)}")
    return replace(usual, **{name: _like(usual, name, value) for name, value in given.items() if value is not None})


def _like(usual: Conventions, name: str, value: Any) -> Any:
    """The value as the type that this convention has. Raises ConfigError for another."""
    default = getattr(usual, name)
    if default is None or isinstance(default, Sequence):
        if isinstance(value, (list, tuple)) and value and all(map(_is_number, value)):
            return [float(one) for one in value]
    elif isinstance(default, float):
        if _is_number(value):
            return float(value)
    elif type(value) is type(default):
        return value
    example = "[32, 64]" if default is None else default
    raise ConfigError(f"conventions.{name}: {value!r:.60} is of the wrong type - give the like of {example}")


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
