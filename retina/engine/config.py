"""Typed settings. Imports nothing heavy: a wrong key must be reported before torch is loaded or data is opened."""

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from retina.errors import ConfigError

T = TypeVar("T")

Length = int | float | str
"""How long: an integer is optimizer steps, a fraction below 1 is a share of the run, `"3ep"` is three epochs."""

PRECISIONS = ("fp32", "bf16", "fp16")
SAMPLINGS = ("repeat_factor", "class_balanced")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The `train` section: one training run, apart from what is trained on what."""

    length: Length = "12ep"
    batch_size: int = 16
    """Images per optimizer step, over all processes and accumulation."""
    accumulate: int = 1
    """Micro-batches per optimizer step and process: the same update from less memory."""
    lr_batch_size: int = 16
    """The batch size that `optimizer.lr` is meant for; the real rate is scaled by batch_size / lr_batch_size."""
    precision: str = "fp32"
    clip_norm: float | None = 10.0
    """Largest norm of the whole gradient; null does not clip."""
    ema: float | None = None
    """Decay of the exponential moving average of weights; null keeps none."""
    eval_every: Length | None = "1ep"
    save_every: Length = "1ep"
    keep_checkpoints: int = 2
    log_every: int = 20
    """Steps between logged lines."""
    best_metric: str = "AP"
    """The metric whose highest value names the best checkpoint."""
    patience: int | None = None
    """Stop after this many evaluations without a better value; null never does."""
    device: str = "auto"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    """Deterministic algorithms only: the same bits again on the same device, at some cost in speed."""
    seed: int = 0
    pictures: int = 8
    """Images drawn into TensorBoard per kind."""
    max_bad_steps: int = 3
    """Updates in a row that may be skipped because a number in them was not finite; then the run stops."""

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**32, "train.seed", self.seed, "give 0 or more, below 2^32")
        _check(self.pictures >= 0, "train.pictures", self.pictures, "give 0 or more")
        _check(self.precision in PRECISIONS, "train.precision", self.precision, f"choose {', '.join(PRECISIONS)}")
        _check(self.best_metric in METRICS, "train.best_metric", self.best_metric, f"choose {', '.join(METRICS)}")
        for name in ("batch_size", "accumulate", "lr_batch_size", "keep_checkpoints", "log_every", "max_bad_steps"):
            _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "give 1 or more")
        _check(self.clip_norm is None or self.clip_norm > 0, "train.clip_norm", self.clip_norm, "give > 0, or null")
        _check(self.ema is None or 0 <= self.ema < 1, "train.ema", self.ema, "give a decay in [0, 1), or null")
        _check(self.patience is None or self.patience >= 1, "train.patience", self.patience, "give 1 or more, or null")
        for name in ("length", "save_every", "eval_every"):
            value = getattr(self, name)
            if value is not None:
                to_steps(value, steps_per_epoch=100, total=None if name == "length" else 1000, key=f"train.{name}")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Where one split lies; null means the default place under `data.root`."""

    annotations: str | None = None
    images: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The `data` section."""

    name: str
    root: str | None = None
    prepare: dict[str, Any] | None = None
    """A section with `_target_` that is called with `root` and makes the data set where it is not there yet."""
    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    short_side: int = 800
    long_side: int = 1333
    pad_multiple: int | None = None
    """Canvas sides are multiples of this many pixels; null takes the coarsest stride of the model."""
    num_workers: int = 2
    """Loader processes per training process."""
    eval_batch_size: int | None = None
    """Images per forward in evaluation and process; null takes the training micro-batch."""
    group_by_aspect: bool = True
    sampling: str | dict[str, Any] | None = None
    """How often an image is drawn per epoch: null is once, "repeat_factor" repeats images of rare classes (LVIS),
    "class_balanced" draws every class equally often; a section with `_target_` makes a sampler of one's own."""
    repeat_threshold: float = 0.001
    """Of `sampling: repeat_factor`: classes that fewer than this share of the images show are repeated."""
    canvases: list[Any] | None = None
    """[height, width] of the only canvases there may be, for a compiled model; null pads as little as can be."""
    min_size: float = 1.0
    """Objects narrower or lower than this many pixels after augmentation are dropped."""
    min_visibility: float = 0.1
    """Objects that keep less than this share of their area when cropped are dropped."""
    on_error: str = "stop"
    """Faulty records of annotation files: "stop" refuses the file, "skip" leaves them out."""
    max_bad_fraction: float = 0.01
    """Share of images that may turn out unreadable while training or evaluating; they are skipped and reported."""
    max_pixels: int = 100_000_000
    """Larger images are refused before they are decoded."""
    allow_outside: bool = False
    """Whether file names may lead out of the image folder."""

    def __post_init__(self) -> None:
        for name in ("short_side", "long_side"):
            _check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "give pixels")
        _check(self.short_side <= self.long_side, "data.short_side", self.short_side, "give at most data.long_side")
        _check(self.num_workers >= 0, "data.num_workers", self.num_workers, "give 0 or more")
        for name in ("pad_multiple", "eval_batch_size"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"data.{name}", value, "give 1 or more, or null")
        for canvas in self.canvases or []:
            sides = isinstance(canvas, list) and len(canvas) == 2 and all(isinstance(s, int) and s > 0 for s in canvas)
            _check(sides, "data.canvases", canvas, "give a list of [height, width]")
        sampling = f"choose {' or '.join(SAMPLINGS)}, or null"
        known = self.sampling is None or isinstance(self.sampling, dict) or self.sampling in SAMPLINGS
        _check(known, "data.sampling", self.sampling, sampling)
        threshold = self.repeat_threshold
        _check(0 < threshold <= 1, "data.repeat_threshold", threshold, "give a share of the images above 0, at most 1")
        _check(self.min_size > 0, "data.min_size", self.min_size, "give pixels above 0")
        _check(self.on_error in ("stop", "skip"), "data.on_error", self.on_error, "choose stop or skip")
        _check(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, "give pixels")
        for name in ("min_visibility", "max_bad_fraction"):
            _check(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "give a share from 0 to 1")


def to_steps(value: Length, *, steps_per_epoch: int, total: int | None, key: str) -> int:
    """A length in optimizer steps, at least 1. `total` is the run's length, None while that itself is being read.

    Raises ConfigError naming `key`."""
    fix = 'give steps (90000), epochs ("12ep")' + ("" if total is None else " or a share of the run (0.5)")
    if isinstance(value, str):
        try:
            epochs = float(value.removesuffix("ep")) if value.endswith("ep") else math.nan
        except ValueError:
            epochs = math.nan
        _check(math.isfinite(epochs) and epochs > 0, key, value, fix)
        return max(1, round(epochs * steps_per_epoch))
    if isinstance(value, float) and not value.is_integer():
        _check(total is not None and 0 < value < 1, key, value, fix)
        return max(1, round(value * (total or 0)))
    _check(value >= 1, key, value, fix)
    return int(value)


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Builds a settings dataclass.

    Raises ConfigError naming the first key that is unknown (with its nearest match), missing or of a wrong type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix}: {values!r} is no section - give {prefix}.key=value")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(unknown_key(f"{prefix}.{key}", [f"{prefix}.{name}" for name in names]))
    arguments: dict[str, Any] = {}
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in values:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ConfigError(f"{prefix}.{f.name}: missing - give {prefix}.{f.name}=...")
            continue
        arguments[f.name] = _typed(values[f.name], hints[f.name], f"{prefix}.{f.name}")
    return cls(**arguments)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """One line for a key that does not exist, naming the nearest that does: whole keys first, then last parts."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        last = key.rpartition(".")[2]
        by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
        near = [by_last[m] for m in difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)]
    hint = f"did you mean {near[0]}?" if near else "--cfg job prints the keys there are"
    return f"{key}: no such key - {hint}"


def check_type(value: Any, hint: Any, key: str) -> None:
    """Raises ConfigError for a value that is not of that type. Of types that no YAML file can hold, such as a tensor,
    only what a YAML file holds is refused."""
    if not _fits(value, hint):
        names = ["null" if o is types.NoneType else _name_of(o) for o in _options(hint)]
        raise ConfigError(f"{key}: {value!r} is of the wrong type - give {' or '.join(names)}")


def _fits(value: Any, hint: Any) -> bool:
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if len(options := _options(hint)) > 1:
        return any(_fits(value, option) for option in options)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if origin in (list, tuple, Sequence):
        plain = isinstance(value, list if origin is list else list | tuple)
        return plain and all(_fits(item, arguments[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (bool, str, list, dict, types.NoneType) or is_dataclass(hint):
        return isinstance(value, hint)
    if hint is Path:
        return isinstance(value, str | Path)
    return not isinstance(value, bool | int | float | str | list | dict | None)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _name_of(hint: Any) -> str:
    """`list[float]`, say, without the modules that its parts are from."""
    return re.sub(r"(\w+\.)+", "", str(hint)) if typing.get_args(hint) else hint.__name__


def _typed(value: Any, hint: Any, key: str) -> Any:
    options = _options(hint)
    for option in options:
        if is_dataclass(option) and isinstance(value, Mapping):
            return from_mapping(typing.cast(type, option), value, key)
    check_type(value, hint, key)
    if float in options and int not in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _check(ok: bool, key: str, value: object, fix: str) -> None:
    if not ok:
        raise ConfigError(f"{key}: {value!r} is not allowed - {fix}")
