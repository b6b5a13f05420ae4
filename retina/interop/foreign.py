"""What a checkpoint of another program comes down to: tensors under our names, and what its numbers mean."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from retina.errors import CheckpointError, ConfigError

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
            raise ConfigError(f"{shown} is not allowed - {fix}", code="not-allowed", key=f"conventions.{name}")


def _positive(values: Sequence[float]) -> bool:
    return all(0 < value < math.inf for value in values)


def given_conventions(usual: Conventions, given: Mapping[str, Any]) -> Conventions:
    """The usual ones with those that are given (not None) in their place."""
    known = [f.name for f in fields(Conventions)]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"does not exist - choose among {', '.join(known)}", code="unknown-key", key=f"conventions.{name}"
            )
    return replace(usual, **{name: _like(usual, name, value) for name, value in given.items() if value is not None})


def _like(usual: Conventions, name: str, value: Any) -> Any:
    """The value as the type that this convention has. Raises ConfigError for another."""
    default = getattr(usual, name)
    if default is None or isinstance(default, Sequence):
        if isinstance(value, (list, tuple)) and value and all(map(_is_number, value)):
            return [float(number) for number in value]
    elif isinstance(default, float):
        if _is_number(value):
            return float(value)
    elif type(value) is type(default):
        return value
    example = "[32, 64]" if default is None else default
    raise ConfigError(
        f"{value!r:.60} is of the wrong type - give the like of {example}", code="wrong-type", key=f"conventions.{name}"
    )


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


@dataclass(frozen=True)
class Source:
    """A file as it was read."""

    file: Path
    state: dict[str, Tensor]
    other: dict[str, Any] = field(default_factory=dict)
    """What lay beside the weights: plain values, of which only text, numbers and lists of them are looked at."""
    no_arrays: list[str] = field(default_factory=list)
    """Names among the weights that stand for something else."""

    def sha256(self) -> str:
        with self.file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()


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
        fitting = next(((match, target) for rule, target in compiled if (match := rule.fullmatch(key))), None)
        reason = next((reason for pattern, reason in reasons if pattern.fullmatch(key)), None)
        name = ""
        if fitting:
            match, target = fitting
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


_SHOWN = 8
"""Names in one line."""


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def refusal(line: str, lists: Mapping[str, Sequence[str]], *, code: str) -> CheckpointError:
    """The fault of this line, with the whole of the lists that `some` cuts short as notes (PEP 678)."""
    fault = CheckpointError(line, code=code)
    for title, names in lists.items():
        if len(names) > _SHOWN:
            fault.add_note(f"{title}: {', '.join(names)}")
    return fault


FIRST_CONVOLUTION = "backbone.stem.conv1.weight"
CLASS_LAYER, BOX_LAYER = "head.classification.predict", "head.box.predict"

_RESNETS = {
    # blocks of the third stage, bottlenecks or not, rows and columns of the first 3x3 convolution
    (2, False, 64, 64): "resnet18",
    (6, False, 64, 64): "resnet34",
    (6, True, 64, 64): "resnet50",
    (23, True, 64, 64): "resnet101",
    (36, True, 64, 64): "resnet152",
    (6, True, 128, 4): "resnext50_32x4d",
    (23, True, 256, 8): "resnext101_32x8d",
    (23, True, 256, 4): "resnext101_64x4d",
    (6, True, 128, 128): "wide_resnet50_2",
    (23, True, 128, 128): "wide_resnet101_2",
}


def shape_of(state: dict[str, Tensor], key: str, dimensions: int, file: Path) -> tuple[int, ...]:
    """Raises CheckpointError for a tensor that is missing or has another number of dimensions, or none of a size."""
    if key not in state:
        raise CheckpointError(
            f"{file}: lacks what would be {key} here - give the whole state dict of a model", code="missing-tensor"
        )
    shape = tuple(state[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"{file}: {key} is {list(shape)}, which has no place in a RetinaNet - give another file", code="wrong-shape"
        )
    return shape


def backbone_name(state: dict[str, Tensor], file: Path) -> str:
    first = shape_of(state, "backbone.layer1.0.conv2.weight", 4, file)
    blocks = {match[1] for key in state if (match := re.match(r"backbone\.layer3\.(\d+)\.", key))}
    shapes = len(blocks), "backbone.layer1.0.conv3.weight" in state, first[0], first[1]
    if shapes not in _RESNETS:
        raise CheckpointError(
            f"{file}: its backbone, of {len(blocks)} blocks in stage 3 and {first[0]}x{first[1]} channels in the first "
            f"3x3 convolution, is not known - choose one with {', '.join(_RESNETS.values())}",
            code="unknown-backbone",
        )
    return _RESNETS[shapes]


def backbone_norm(state: dict[str, Tensor]) -> str:
    """GroupNorm has no statistics, and only a norm that was trained counts its batches."""
    keys = [key for key in state if key.startswith("backbone.")]
    if not any(key.endswith(".running_var") for key in keys):
        return "group"
    return "batch" if any(key.endswith(".num_batches_tracked") for key in keys) else "frozen"


def num_anchors(state: dict[str, Tensor], file: Path, conventions: Conventions) -> int:
    """Per cell."""
    (rows,) = shape_of(state, f"{BOX_LAYER}.bias", 1, file)
    expected = len(conventions.anchor_scales) * len(conventions.anchor_ratios)
    if rows != 4 * expected:
        raise ConfigError(
            f"{file}: predicts {rows / 4:g} boxes per cell, where {len(conventions.anchor_scales)} scales and "
            f"{len(conventions.anchor_ratios)} ratios make {expected} - give conventions.anchor_scales and "
            "conventions.anchor_ratios as it was trained with",
            code="anchors",
        )
    return expected


def model_arguments(
    state: dict[str, Tensor], file: Path, conventions: Conventions, *, num_classes: int
) -> dict[str, Any]:
    """Keyword arguments of `retinanet`."""
    channels = shape_of(state, "fpn.lateral.0.weight", 4, file)[0]
    inputs, extra = (
        len({match[1] for key in state if (match := re.match(rf"fpn\.{part}\.(\d+)\.", key))})
        for part in ("lateral", "extra")
    )
    convolutions = [
        key for key, value in state.items() if re.match(r"head\.box\.convs\.\d+\.weight", key) and value.ndim == 4
    ]
    last_level = shape_of(state, f"fpn.lateral.{inputs - 1}.weight", 4, file)[1]
    p6_inputs = shape_of(state, "fpn.extra.0.weight", 4, file)[1] if extra else last_level
    head_channels = shape_of(state, f"{BOX_LAYER}.weight", 4, file)[1]
    return {
        "num_classes": num_classes,
        "backbone": backbone_name(state, file),
        "norm": backbone_norm(state),
        "norm_eps": conventions.norm_eps,
        "stride_in_1x1": conventions.stride_in_1x1,
        "levels": list(range(6 - inputs, 6 + extra)),
        "fpn_channels": channels,
        "p6_from": "c5" if p6_inputs == last_level else "p5",
        "p7_relu": conventions.p7_relu,
        "head_convs": len(convolutions),
        "head_channels": None if head_channels == channels else head_channels,
        "head_norm": "group" if len(convolutions) and "head.box.convs.1.weight" in state else None,
        "anchor_sizes": None if conventions.anchor_sizes is None else list(conventions.anchor_sizes),
        "anchor_scales": list(conventions.anchor_scales),
        "anchor_ratios": list(conventions.anchor_ratios),
        "anchors_rounded": conventions.anchors_rounded,
        "anchors_spread": conventions.anchors_spread,
        "anchor_offset": conventions.anchor_offset,
        "mean": list(conventions.mean),
        "std": list(conventions.std),
    }
