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
FIRST_CONVOLUTION = "backbone.stem.conv1.weight"
CLASS_LAYER, BOX_LAYER = "head.classification.predict", "head.box.predict"


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
    canvas_strides: bool = False
    """Anchors are canvas // cells pixels apart, not a stride."""
    anchors_by_scale: bool = False
    """A cell's anchors go [scale ratio]; else [ratio scale] as ours."""
    delta_std: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    """What predicted deltas are multiplied with before boxes are made of them."""
    short_side: int = 800
    long_side: int = 1333
    pad_multiple: int = 32
    score_threshold: float = 0.05
    candidates_per_level: int = 1000
    nms_iou: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, fix: str) -> None:
            if not fits:
                value = getattr(self, name)
                shown = list(value) if isinstance(value, Sequence) else value
                raise ConfigError(f"{shown} is not allowed - {fix}", code="not-allowed", key=f"conventions.{name}")

        for name, count in (("std", 3), ("delta_std", 4)):
            values = getattr(self, name)
            check(name, len(values) == count and _positive(values), f"give {count} positive numbers")
        within = len(self.mean) == 3 and all(0 <= value <= 255 for value in self.mean)
        check("mean", within, "give 3 numbers from 0 to 255")
        for name in ("anchor_sizes", "anchor_scales", "anchor_ratios"):
            check(name, _positive(getattr(self, name) or ()), "give positive numbers")
        for name in ("short_side", "long_side", "pad_multiple"):
            check(name, getattr(self, name) >= 1, "give 1 or more")
        check("short_side", self.short_side <= self.long_side, f"give at most the long side, {self.long_side}")
        check("norm_eps", 0 <= self.norm_eps < math.inf, "give 0 or more")
        check("anchor_offset", 0 <= self.anchor_offset <= 1, "give 0 to 1 stride")


def _positive(values: Sequence[float]) -> bool:
    return all(0 < value < math.inf for value in values)


def changed_conventions(usual: Conventions, changes: Mapping[str, Any]) -> Conventions:
    """The usual conventions of a program with the changes that are not None.

    Raises ConfigError for a name that does not exist, a value of the wrong type or out of range."""
    types = {f.name: f.type for f in fields(Conventions)}
    values: dict[str, Any] = {}
    for name, value in changes.items():
        key = f"conventions.{name}"
        if name not in types:
            raise ConfigError(f"does not exist - choose among {', '.join(types)}", code="unknown-key", key=key)
        if value is not None:
            values[name] = _typed(value, types[name], key)
    return replace(usual, **values)


def _typed(value: Any, kind: Any, key: str) -> Any:
    """The value as the type that a convention is annotated with. Raises ConfigError for a value of another type."""
    if kind is float and _is_number(value):
        return float(value)
    if kind in (bool, int) and type(value) is kind:
        return value
    is_sequence = kind not in (bool, int, float)
    if is_sequence and isinstance(value, (list, tuple)) and value and all(map(_is_number, value)):
        return [float(number) for number in value]
    name = "list of numbers" if is_sequence else kind.__name__
    raise ConfigError(f"{value!r:.60} is of the wrong type - give a {name}", code="wrong-type", key=key)


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
    """A recognised checkpoint: its tensors under our names, their numbers as they were."""

    program: str = ""
    """Whose it is, to be shown."""
    state: dict[str, Tensor]
    """Under the names of our detector; without a head it is a plain backbone."""
    names: dict[str, str]
    """The file's name of each tensor, by our name."""
    conventions: Conventions = field(default_factory=Conventions)
    unused: dict[str, str]
    """Tensors of the file that are left out on purpose, and why."""
    unknown: list[str]
    """Tensors of the file that mean nothing here."""
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
        return f"{BOX_LAYER}.weight" in self.state


Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern for the whole name in the file, and our name: a template or a function of the match."""


def rename(state: Mapping[str, Tensor], rules: Iterable[Rule], unused: Iterable[tuple[str, str]] = ()) -> Foreign:
    """The tensors under our names by the first rule that fits. `unused` pairs a pattern with a reason."""
    renamed = Foreign(state={}, names={}, unused={}, unknown=[])
    for key, value in state.items():
        name = next((_expand(match, target) for rule, target in rules if (match := re.fullmatch(rule, key))), None)
        reason = next((reason for pattern, reason in unused if re.fullmatch(pattern, key)), None)
        if name and name not in renamed.state:
            renamed.state[name], renamed.names[name] = value, key
        elif reason:
            renamed.unused[key] = reason
        else:
            renamed.unknown.append(key)
    return renamed


def _expand(match: re.Match[str], target: str | Callable[[re.Match[str]], str]) -> str:
    return target(match) if callable(target) else match.expand(target)


def numbered(template: str, *, times: int = 1, plus: int = 0) -> Callable[[re.Match[str]], str]:
    """Our name: the groups of a match in the places of the template, the first a number that is multiplied and
    shifted."""
    return lambda match: template.format(times * int(match[1]) + plus, *match.groups()[1:])


def resnet_rules(prefix: str = "") -> list[Rule]:
    """Rules for a ResNet under torchvision's names after a prefix, which is a pattern."""
    return [
        (rf"{prefix}((?:conv|bn)1\..+)", r"backbone.stem.\1"),
        (rf"{prefix}(layer[1-4]\..+)", r"backbone.\1"),
    ]


def tower_rules(source: str, target: str, *, conv: str, norm: str, has_norm: bool) -> list[Rule]:
    """Rules for a tower of numbered layers. `conv` and `norm` are patterns of what stands between the number and
    `weight` or `bias`; ours are in one sequence of convolution, norm where there is one, ReLU."""
    template, step = f"head.{target}.convs.{{}}.{{}}", 3 if has_norm else 2
    return [
        (rf"{source}\.(\d+){part}\.(weight|bias)", numbered(template, times=step, plus=offset))
        for offset, part in enumerate((conv, norm))
    ]


_SHOWN = 8
"""Names in one line."""


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def refusal(file: Path, problem: str, *, code: str, **lists: Sequence[str]) -> CheckpointError:
    """The fault of a file, with the whole of the lists that `some` cuts short as notes (PEP 678)."""
    fault = CheckpointError(f"{file}: {problem}", code=code)
    for title, names in lists.items():
        if len(names) > _SHOWN:
            fault.add_note(f"{title}: {', '.join(names)}")
    return fault


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
        raise refusal(file, f"lacks what is {key} here - give the whole state dict of a model", code="missing-tensor")
    shape = tuple(state[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise refusal(file, f"{key} of shape {list(shape)} fits no RetinaNet - give another file", code="wrong-shape")
    return shape


def backbone_name(state: dict[str, Tensor], file: Path) -> str:
    first = shape_of(state, "backbone.layer1.0.conv2.weight", 4, file)
    blocks = {match[1] for key in state if (match := re.match(r"backbone\.layer3\.(\d+)\.", key))}
    shapes = len(blocks), "backbone.layer1.0.conv3.weight" in state, first[0], first[1]
    if shapes not in _RESNETS:
        shown = f"{len(blocks)} blocks in stage 3 and {first[0]}x{first[1]} channels in the first 3x3 convolution"
        choices = ", ".join(_RESNETS.values())
        raise refusal(file, f"a backbone of {shown} is not known - give one with {choices}", code="unknown-backbone")
    return _RESNETS[shapes]


def backbone_norm(state: dict[str, Tensor]) -> str:
    """GroupNorm has no statistics, and only a norm that was trained counts its batches."""
    keys = [key for key in state if key.startswith("backbone.")]
    if not any(key.endswith(".running_var") for key in keys):
        return "group"
    return "batch" if any(key.endswith(".num_batches_tracked") for key in keys) else "frozen"


def num_anchors(state: dict[str, Tensor], file: Path, conventions: Conventions) -> int:
    """Per cell. Raises ConfigError where the conventions and the box layer contradict each other."""
    (rows,) = shape_of(state, f"{BOX_LAYER}.bias", 1, file)
    scales, ratios = len(conventions.anchor_scales), len(conventions.anchor_ratios)
    if rows != 4 * scales * ratios:
        raise ConfigError(
            f"{file} predicts {rows / 4:g} boxes per cell, where {scales} scales and {ratios} ratios make "
            f"{scales * ratios} - give the scales and ratios that it was trained with",
            code="anchors",
            key="conventions.anchor_scales",
        )
    return scales * ratios


_SAME_NAME = (
    *("norm_eps", "stride_in_1x1", "p7_relu", "mean", "std"),
    *("anchor_sizes", "anchor_scales", "anchor_ratios", "anchors_rounded", "canvas_strides", "anchor_offset"),
)
"""Conventions that are arguments of `retinanet`."""


def _head_norm(state: dict[str, Tensor]) -> str | None:
    if "head.box.convs.1.weight" not in state:
        return None
    return "group_bias" if "head.box.convs.0.bias" in state else "group"


def model_arguments(
    state: dict[str, Tensor], file: Path, conventions: Conventions, *, num_classes: int
) -> dict[str, Any]:
    """Keyword arguments of `retinanet`, read from the shapes of the tensors and from the conventions."""

    def numbers(pattern: str) -> set[str]:
        return {match[1] for key, value in state.items() if (match := re.match(pattern, key)) and value.ndim == 4}

    channels = shape_of(state, "fpn.lateral.0.weight", 4, file)[0]
    inputs, extra = len(numbers(r"fpn\.lateral\.(\d+)\.")), len(numbers(r"fpn\.extra\.(\d+)\."))
    convolutions = numbers(r"head\.box\.convs\.(\d+)\.weight")
    last_level = shape_of(state, f"fpn.lateral.{inputs - 1}.weight", 4, file)[1]
    p6_inputs = shape_of(state, "fpn.extra.0.weight", 4, file)[1] if extra else last_level
    head_channels = shape_of(state, f"{BOX_LAYER}.weight", 4, file)[1]
    same = {name: getattr(conventions, name) for name in _SAME_NAME}
    return {
        "num_classes": num_classes,
        "backbone": backbone_name(state, file),
        "norm": backbone_norm(state),
        "levels": list(range(6 - inputs, 6 + extra)),
        "fpn_channels": channels,
        "p6_from": "c5" if p6_inputs == last_level else "p5",
        "head_convs": len(convolutions),
        "head_channels": None if head_channels == channels else head_channels,
        "head_norm": _head_norm(state) if convolutions else None,
        **{name: list(value) if isinstance(value, Sequence) else value for name, value in same.items()},
    }
