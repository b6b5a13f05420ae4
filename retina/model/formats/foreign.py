"""What a checkpoint of another program comes down to: tensors under our names, and what its numbers mean."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from retina.errors import ConfigError

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Source:
    """A file as it was read."""

    file: Path
    state: dict[str, Tensor]
    other: dict[str, Any] = field(default_factory=dict)
    """What lay beside the weights: plain values, of which only text, numbers and lists of them are looked at."""

    def sha256(self) -> str:
        with self.file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()


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
        for name, count in (("mean", 3), ("std", 3), ("delta_std", 4)):
            values = getattr(self, name)
            if len(values) != count or not all(_is_number(v) and (v > 0 or name == "mean") for v in values):
                raise ConfigError(f"conventions.{name}: {list(values)} is not allowed - give {count} positive numbers")
        for name in ("short_side", "long_side", "divisor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"conventions.{name}: {getattr(self, name)} is not allowed - give 1 or more")
        if not _is_number(self.norm_eps) or self.norm_eps < 0:
            raise ConfigError(f"conventions.norm_eps: {self.norm_eps} is not allowed - give 0 or more")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A recognised checkpoint, its tensors renamed and their numbers as they were."""

    program: str
    """Whose it is, to be shown."""
    state: dict[str, Tensor]
    """Under the names of our detector; without a head it is a plain backbone."""
    names: dict[str, str]
    """Our name of each tensor to theirs."""
    conventions: Conventions
    unused: dict[str, str]
    """Their tensors that are left out on purpose, and why."""
    unknown: list[str]
    """Their tensors that mean nothing to us."""
    classes: list[str | None] | None = None
    """Of the rows of the class layer, where the file says; None in a place: a row that stands for nothing."""
    first_id: int = 1
    """The category id of the first row, where classes are not COCO's."""
    background_first: bool = False
    """Classes are often counted from 1, and the first row then stands for nothing."""
    cell_anchors: list[Tensor] | None = None
    """Of each level, in their order, where the file holds them."""
    notes: list[str] = field(default_factory=list)
    """What was decided from what."""

    @property
    def is_detector(self) -> bool:
        return "head.box.predict.weight" in self.state


Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern for their whole name, and our name: a template or a function of the match."""


@dataclass(frozen=True)
class Renamed:
    state: dict[str, Tensor]
    names: dict[str, str]
    unused: dict[str, str]
    unknown: list[str]


def rename(state: Mapping[str, Tensor], rules: Iterable[Rule], unused: Iterable[tuple[str, str]] = ()) -> Renamed:
    """The tensors under our names by the first rule that fits. `unused` pairs a pattern with a reason."""
    renamed = Renamed({}, {}, {}, [])
    compiled = [(re.compile(pattern), target) for pattern, target in rules]
    reasons = [(re.compile(pattern), reason) for pattern, reason in unused]
    for key, value in state.items():
        found = next(((match, target) for rule, target in compiled if (match := rule.fullmatch(key))), None)
        reason = next((reason for pattern, reason in reasons if pattern.fullmatch(key)), None)
        name = ""
        if found:
            match, target = found
            name = target(match) if callable(target) else match.expand(target)
        if name and name not in renamed.state:
            renamed.state[name] = value
            renamed.names[name] = key
        elif reason:
            renamed.unused[key] = reason
        else:
            renamed.unknown.append(key)
    return renamed


def tower_rules(theirs: str, ours: str, *, conv: str, norm: str, has_norm: bool) -> list[Rule]:
    """Rules for a tower of numbered layers. `conv` and `norm` are patterns of what stands between the number and
    `weight` or `bias`; ours are in one sequence of convolution, norm where there is one, ReLU."""
    step = 3 if has_norm else 2

    def place(offset: int) -> Callable[[re.Match[str]], str]:
        return lambda match: f"head.{ours}.convs.{step * int(match[1]) + offset}.{match[2]}"

    return [
        (rf"{theirs}\.(\d+){conv}\.(weight|bias)", place(0)),
        (rf"{theirs}\.(\d+){norm}\.(weight|bias)", place(1)),
    ]
