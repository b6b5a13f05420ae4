"""The recipe for a data set, a device and a budget: one function from facts to choices, each with its reason.

Beside the road.

The rules rest on docs/ladder.md (generalized focal loss, AdamW, GroupNorm in the head), configs/experiment/bccd.yaml
and shapes.yaml (short runs from scratch on a CPU), and what is usual for COCO with pretrained weights (12 epochs at 800
pixels). What the user gives is never chosen, and other choices follow from the value given.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from retina.errors import ConfigError

SMALL = 32.0
"""Pixels that the smallest objects (the 5th percentile of sqrt(area)) should have: four cells of P3."""
LEAST = 12.0
"""Pixels below which the smallest objects are lost on P3; a short budget makes images no smaller than that."""
FEW = 2000
"""Images below which pretrained weights decide, and are changed at a higher rate than on COCO."""
MANY = 30
"""Epochs from which images are scaled over a wide range, because they would be learned by heart."""
STEP = 32
"""Sides of images are multiples of it: the stride of P5."""
PASSES = {True: 6, False: 20}
"""Epochs below which a budget makes images smaller instead, with pretrained weights and without."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    image_sizes: Int64[np.ndarray, "N 2"]
    """(height, width) of the training images."""
    objects: Float64[np.ndarray, "T 2"]
    """Width and height of the objects in pixels of their images."""
    image_of: Int64[np.ndarray, "T"]
    """Which image each object is in."""
    shares: Float64[np.ndarray, "K"]
    """Share of the images that show each class."""
    pretrained: bool
    device: str = "cpu"
    """cpu, cuda, mps."""
    bf16: bool = False
    """Whether the device computes in bfloat16 by itself."""
    cores: int = 1
    """Processor cores for each process."""
    processes: int = 1
    mean_std: tuple[list[float], list[float]] | None = None
    """Per channel, of the training images; None where ImageNet's are right."""
    channels: int = 3
    seconds: float | None = None
    """What is left of the budget."""
    pixels_per_second: float | None = None
    """Of training, measured; None before it is."""

    @property
    def few(self) -> bool:
        """Whether a large network would have too few images to learn from."""
        return len(self.image_sizes) < FEW


class Choice(NamedTuple):
    key: str
    value: Any
    reason: str


def is_given(key: str, typed: frozenset[str]) -> bool:
    """Whether the command names this setting, the section that it is in, or a part of it."""
    return any(word == key or word.startswith(f"{key}.") or key.startswith(f"{word}.") for word in typed)


def value_of(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return value


def with_values(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the settings with other values under dotted keys."""
    changed = dict(settings)
    for key, value in values.items():
        first, _, rest = key.partition(".")
        changed[first] = with_values(changed[first], {rest: value}) if rest else value
    return changed


class _Choices(list[Choice]):
    def __init__(self, settings: Mapping[str, Any], typed: frozenset[str]) -> None:
        super().__init__()
        self.settings, self.typed = settings, typed

    def add(self, key: str, value: Any, reason: str) -> Any:
        """What the run will have: the value, or what the command gives instead."""
        if is_given(key, self.typed):
            return value_of(self.settings, key)
        self.append(Choice(key, value, reason))
        return value


def plan(facts: Facts, settings: Mapping[str, Any], typed: frozenset[str]) -> list[Choice]:
    """The settings to change, in the order of a table. `typed` are the keys that the command gives."""
    pixels = plan_pixels(facts, settings, typed)
    if settings.get("init_from"):
        typed |= {"model"}  # it is made for the weights
    choices = _Choices(settings, typed)
    short, long = _size(facts, choices)
    _model(facts, choices, _sides_after(facts, short, long))
    choices += pixels
    epochs, batch = _length(facts, choices)
    _update(facts, choices, batch, epochs)
    _augmentation(facts, choices, (short, long), epochs)
    return list(choices)


def _size(facts: Facts, choices: _Choices) -> tuple[int, int]:
    short, ratio, small = _shape(facts)
    most = 800 if facts.device == "cuda" else 512
    ideal = SMALL / small * short
    lower, upper = min(256.0, short), min(float(most), 2 * short)
    side = min(max(ideal, lower), upper)
    reason = f"the smallest 5 % of objects then have {small * side / short:.0f} pixels"
    if ideal > upper:
        reason += f", of {SMALL:.0f} wanted: " + ("twice the images' size" if upper < most else f"{most} at most here")
    if facts.seconds and facts.pixels_per_second:
        passes = facts.seconds * facts.pixels_per_second / (side * side * ratio * len(facts.image_sizes))
        least = max(LEAST / small * short, min(160.0, short))
        if passes < (wanted_passes := PASSES[facts.pretrained]) and least < side:
            side = max(side * (passes / wanted_passes) ** 0.5, least)
            reason = f"smaller than good: the budget has {passes:.0f} epochs at the full size"
    short_side = choices.add("data.short_side", max(STEP, round(side / STEP) * STEP), reason)
    longest = max(short_side, round(short_side * ratio / STEP) * STEP)
    long_side = choices.add("data.long_side", longest, f"images are up to {ratio:.2f} times as long as wide")
    return short_side, long_side


def _shape(facts: Facts) -> tuple[float, float, float]:
    """Median short side, ratio of long to short, and sqrt(area) of the smallest objects on images of that side."""
    shorts, longs = facts.image_sizes.min(axis=1), facts.image_sizes.max(axis=1)
    short = float(np.median(shorts))
    ratio = min(2.0, float(np.percentile(longs / shorts, 95)))
    sizes = np.sqrt(facts.objects.prod(axis=1)) * short / shorts[facts.image_of]
    return short, ratio, max(1.0, float(np.percentile(sizes, 5)))


def _sides_after(facts: Facts, short: int, long: int) -> Float64[np.ndarray, "T 2"]:
    """Width and height of the objects after the resize."""
    scale = np.minimum(short / facts.image_sizes.min(axis=1), long / facts.image_sizes.max(axis=1))
    return facts.objects * scale[facts.image_of, None]


def _model(facts: Facts, choices: _Choices, objects: Float64[np.ndarray, "T 2"]) -> None:
    quarter = float(np.percentile(np.sqrt(objects.prod(axis=1)), 25))
    largest = float(np.percentile(objects.max(axis=1), 98))
    first = 2 if quarter < 16 else 3
    last = next((level for level in (5, 6) if 8 * 2**level * 1.5 >= largest), 7)
    low = "a quarter of the objects is below 16 pixels" if first == 2 else f"a quarter is below {quarter:.0f} pixels"
    choices.add("model.levels", list(range(first, last + 1)), f"{low}, the largest have {largest:.0f}")
    scales, ratios = (value_of(choices.settings, f"model.anchor_{part}") for part in ("scales", "ratios"))
    if len(scales) * len(ratios) == 1:
        square = "one for each cell: ATSS takes the nearest cells, and their boxes are told by distances, not by shapes"
        choices.add("model.anchor_ratios", ratios, square)
    else:
        choices.add("model.anchor_ratios", ratios, "of the model section; tools/lab.py anchors fits them to the boxes")
    light = facts.device == "cpu"
    small_set = not facts.pretrained and facts.few
    half = light and not facts.pretrained
    why = "a CPU" if light else "few images, and no pretrained weights" if small_set else "a GPU"
    if not re.search(r"[./]", str(value_of(choices.settings, "model.weights") or "")):  # a file is of its backbone
        name = "resnet18_half" if half else "resnet18" if light or small_set else "resnet50"
        choices.add("model.backbone", name, f"{why}, from scratch: more epochs in the same time" if half else why)
    if light:
        choices.add("model.fpn_channels", 64 if half else 128, f"{why}: as wide as the backbone's finest level")
        choices.add("model.head_convs", 2, f"{why}: half of the head's work")


def plan_pixels(facts: Facts, settings: Mapping[str, Any], typed: frozenset[str]) -> list[Choice]:
    """What the model is to know of the images' values."""
    choices = _Choices(settings, typed)
    if facts.mean_std:
        reason = "since no pretrained weights want ImageNet's" if facts.channels == 3 else "which are not RGB"
        for key, values in zip(("mean", "std"), facts.mean_std, strict=True):
            choices.add(f"model.{key}", values, f"of these images, {reason}")
    return list(choices)


def _length(facts: Facts, choices: _Choices) -> tuple[float, int]:
    """Epochs and batch size. A budget decides the length later, when the speed is known."""
    images = len(facts.image_sizes)
    batch = 8 if images < 1000 or facts.device == "cpu" else 16
    batch = -(-batch // facts.processes) * facts.processes
    batch = choices.add("train.batch_size", batch, f"{images} images: small batches make more updates of an epoch")
    if facts.seconds:
        if not facts.pixels_per_second:
            return float(PASSES[facts.pretrained]), batch
        long, short = (value_of(with_chosen(choices), f"data.{side}_side") for side in ("long", "short"))
        return facts.seconds * facts.pixels_per_second / (long * short * images), batch
    target, least, most = (10_000, 12, 60) if facts.pretrained else (16_000, 36, 100)
    epochs = min(most, max(least, -(-target // images)))
    start = "pretrained weights" if facts.pretrained else "from scratch"
    length = choices.add("train.length", f"{epochs}ep", f"{start}, {images * epochs} images in all")
    in_epochs = re.fullmatch(r"(\d*\.?\d+)ep", str(length))
    return float(in_epochs[1]) if in_epochs else float(length) * batch / images, batch


def with_chosen(choices: _Choices) -> dict[str, Any]:
    return with_values(choices.settings, {choice.key: choice.value for choice in choices})


def _update(facts: Facts, choices: _Choices, batch: int, epochs: float) -> None:
    bf16 = "the device computes in it" if facts.bf16 else "the device has no bfloat16 of its own"
    choices.add("train.precision", "bf16" if facts.bf16 else "fp32", bf16)
    if facts.device == "cuda" and facts.processes == 1:
        reason = "the same update from fewer images at a time, should memory be short"
        choices.add("train.halve_when_full", True, reason)
    optimizer = value_of(choices.settings, "optimizer")
    if optimizer["_target_"] == "torch.optim.AdamW":
        deep = "50" in str(value_of(with_chosen(choices), "model.backbone"))
        # AdamW's rate goes with the root of the batch (Malladi et al., arXiv 2205.10287)
        base, at = (4e-4 if facts.few else 1e-4, 16) if facts.pretrained else (5e-4 if deep else 1e-3, 8)
        rate = min(2e-3, base * (batch / at) ** 0.5)
        meant = choices.add("train.lr_batch_size", batch, "the rate is meant for it")
        start = "from pretrained weights" if facts.pretrained else "from scratch"
        choices.add("optimizer.lr", float(f"{rate * meant / batch:.2g}"), f"{start}, AdamW, {meant} images per step")
    cosine = {"_target_": "retina.engine.optim.Cosine", "warmup": 0.05, "warmup_factor": 0.001, "final_factor": 0.0}
    choices.add("schedule", cosine, "down to zero at the end; the warm-up is a twentieth of the run")
    steps = max(1.0, epochs * len(facts.image_sizes) / batch)
    decay = round(1 - 1 / min(5000.0, max(10.0, steps / 5)), 5)
    choices.add("train.ema", decay, f"the mean weights of about the last {1 / (1 - decay):.0f} steps")
    few = facts.seconds is not None or epochs > 20
    choices.add("train.eval_every", 0.2 if few else "1ep", "enough to choose the best, without taking its time")
    choices.add("train.save_every", 0.05 if few else "1ep", "so much can be lost if the machine fails")
    workers = 0 if facts.cores <= 4 else facts.cores // 4 if facts.device == "cpu" else min(8, facts.cores - 1)
    choices.add("data.num_workers", workers, f"{facts.cores} cores for each process")


def _augmentation(facts: Facts, choices: _Choices, size: tuple[int, int], epochs: float) -> None:
    short, long = size
    upright = float((facts.image_sizes[:, 0] > facts.image_sizes[:, 1]).mean())
    transforms = "retina.data.transforms"
    section: dict[str, Any] = {"flip": {"_target_": f"{transforms}.HorizontalFlip", "p": 0.5}}
    reason = "flips"
    resize: dict[str, Any] = {"_target_": f"{transforms}.ResizeShortSide", "short_side": short, "long_side": long}
    if epochs >= 15:
        colors = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}
        if is_rgb := facts.channels == 3:
            section["color"] = {"_target_": f"{transforms}.ColorJitter", **colors, "p": 0.8}
        reason = f"each image is seen {epochs:.0f} times: flips, {'colours, ' if is_rgb else ''}scales"
        height, width = (long, short) if upright > 0.5 else (short, long)
        resize = {"_target_": f"{transforms}.LargeScaleJitter", "height": height, "width": width}
        resize["scale"] = [0.5, 1.5] if epochs >= MANY else [0.8, 1.25]
    choices.add("augment", section | {"resize": resize}, reason)
    shares = facts.shares[facts.shares > 0]
    threshold = min(0.1, 0.5 / max(1, len(shares)))
    if len(shares) > 1 and shares.min() < threshold:
        reason = f"the rarest class is in {shares.min():.1%} of the images"
        choices.add("data.sampling", "repeat_factor", reason)
        choices.add("data.repeat_threshold", round(threshold, 4), "classes in fewer images are shown more often")


def steps_in(seconds: float, *, step: float, evaluation: float, evaluations: int) -> int:
    """How many steps of so many seconds a budget holds, as a multiple of `evaluations` so that the last of these falls
    on the end. A fiftieth is kept back for checkpoints.

    Raises ConfigError for a budget that holds less than ten."""
    steps = int((0.98 * seconds - evaluations * evaluation) / step)
    steps -= steps % evaluations
    if steps < 10:
        problem = f"{max(0.0, seconds):.0f} s are left, and a step takes {step:.2g} s - give more, or smaller images"
        raise ConfigError(problem, code="out-of-range", key="budget")
    return steps


def to_seconds(value: int | float | str | None) -> int | float | None:
    """A budget: seconds, or such as `90s`, `30min`, `2h`, `1h30min`. Raises ConfigError."""
    seconds = value
    if isinstance(value, str):
        parts = re.fullmatch(r"(?:(\d*\.?\d+)h)?(?:(\d*\.?\d+)min)?(?:(\d*\.?\d+)s)?", value)
        amounts = [float(part or 0) for part in parts.groups()] if parts else [0.0]
        seconds = sum(amount * unit for amount, unit in zip(amounts, (3600, 60, 1), strict=False))
    if seconds is not None and (isinstance(seconds, bool | str) or not seconds > 0):
        raise ConfigError(f"{value!r} is no time - give 90s, 30min or 2h", code="out-of-range", key="budget")
    return seconds


def clock(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
