"""Typed settings. Imports nothing heavy: a wrong key must be reported before torch is loaded or data is opened."""

import difflib
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar

from retina.errors import ConfigError, check, check_choice, under
from retina.schema import check_type, options_of

T = TypeVar("T")

Length = int | float | str
"""How long: an integer is optimizer steps, a fraction below 1 is a share of the run, `"3ep"` is three epochs."""

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
REPLACED = ".replaced"
"""In a run's folder: the earlier run that this one is to take the place of, until it has a checkpoint."""
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The `train` section: one training run, apart from what is trained on what."""

    length: Length = "12ep"  # epochs, or optimizer steps (90000)
    batch_size: int = 16
    """Images per optimizer step, over all processes and accumulation."""
    accumulate: int = 1
    """Micro-batches per optimizer step and process: the same update from less memory. With a loss that weighs boxes by
    centerness or score (the default's), all but the first go through the network twice, once without gradients."""
    lr_batch_size: int = 16
    """The batch size that `optimizer.lr` is meant for; the real rate is scaled by batch_size / lr_batch_size."""
    precision: str | None = None  # fp32 (IEEE), tf32, bf16, fp16; null: bf16 on a GPU that has it, else fp32
    clip_norm: float | None = 10.0
    """Largest norm of the whole gradient; null does not clip."""
    ema: float | None = None
    """Decay of the exponential moving average of weights; null keeps none. E.g. 0.999."""
    eval_every: Length | None = "1ep"
    save_every: Length = "1ep"
    keep_checkpoints: int = 2
    log_every: int = 20
    """Steps between logged lines."""
    best_metric: str = "AP"
    """The metric whose highest value names the best checkpoint."""
    patience: int | None = None
    """Stop after this many evaluations without a better value; null never does."""
    device: str = "auto"  # cuda, mps, cpu
    channels_last: bool = True
    halve_when_full: bool = False
    """When a GPU's memory is short, go on with half as many images at a time; one process only."""
    compile: bool = False
    deterministic: bool = False
    """Deterministic algorithms only: the same bits again on the same device, at some cost in speed."""
    seed: int = 0
    pictures: int = 8
    """Images drawn into TensorBoard per kind."""
    max_bad_steps: int = 3
    """Updates in a row that may be skipped because a number in them was not finite; then the run stops."""
    timeout_minutes: float = 60.0
    """How long a process waits for the others, as for rank 0's checks of the data; more than `data.timeout`."""
    max_unsaved_minutes: float = 60.0
    """How long training goes on while a checkpoint or the best weights cannot be written; then the run stops."""

    def __post_init__(self) -> None:
        check_choice(self.precision, (None, *PRECISIONS), "precision")
        check_choice(self.best_metric, METRICS, "best_metric")
        check_ranges(self, _TRAIN_RANGES)
        for name in ("length", "save_every", "eval_every"):
            if (value := getattr(self, name)) is not None:
                to_steps(value, steps_per_epoch=100, total=None if name == "length" else 1000, key=name)


Ranges = Mapping[str, tuple[Callable[[Any], bool], str]]
"""By field, whether a value is allowed, and what to give instead. None is judged by the type alone."""

COUNT = (lambda value: value >= 1, "give 1 or more")
_COUNTS = ("batch_size", "accumulate", "lr_batch_size", "keep_checkpoints", "log_every", "patience", "max_bad_steps")
_TRAIN_RANGES: Ranges = {
    **dict.fromkeys(_COUNTS, COUNT),
    "seed": (lambda value: 0 <= value < 2**32, "give 0 or more, below 2^32"),
    "pictures": (lambda value: value >= 0, "give 0 or more"),
    "timeout_minutes": (lambda value: value > 0, "give more than 0"),
    "max_unsaved_minutes": (lambda value: value >= 0, "give 0 or more"),
    "clip_norm": (lambda value: value > 0, "give more than 0, or null"),
    "ema": (lambda value: 0 <= value < 1, "give a decay in [0, 1), or null"),
}


def check_ranges(config: Any, ranges: Ranges) -> None:
    """Raises ConfigError for the first value out of its range."""
    for name, (allows, fix) in ranges.items():
        value = getattr(config, name)
        check(value is None or allows(value), name, value, fix)


def to_steps(value: Length, *, steps_per_epoch: int, total: int | None, key: str) -> int:
    """A length in optimizer steps, at least 1. `total` is the run's length, None while that itself is being read.

    Raises ConfigError naming the argument `key`."""
    steps: float = 0
    if isinstance(value, str):
        epochs = re.fullmatch(r"(\d*\.?\d+)ep", value)
        steps = float(epochs[1]) * steps_per_epoch if epochs else 0
    elif isinstance(value, int) or value.is_integer():
        steps = value
    elif total is not None and 0 < value < 1:
        steps = value * total
    if steps <= 0:
        fix = 'give steps (90000), epochs ("12ep")' + ("" if total is None else " or a share of the run (0.5)")
        raise ConfigError(f"{value!r} is not allowed - {fix}", code="out-of-range", key=key)
    return max(1, round(steps))


def from_mapping(cls: type[T], values: Mapping[str, Any], section: str = "") -> T:
    """The settings of a section as a dataclass.

    Raises ConfigError naming the first key that is unknown (with its nearest match), missing or of a wrong type, or
    what the dataclass itself refuses."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{values!r} is no section - give {section}.key=value", code="wrong-type", key=section)
    hints = typing.get_type_hints(cls)
    known = {f.name: f"{section}.{f.name}".lstrip(".") for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            problem = unknown_key(f"{section}.{key}".lstrip("."), known.values())
            raise ConfigError(problem, code="unknown-key")
    arguments: dict[str, Any] = {}
    for f in fields(cls):  # type: ignore[arg-type]
        key = known[f.name]
        if f.name in values:
            arguments[f.name] = _typed(values[f.name], hints[f.name], key)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"missing - give {key}=...", code="missing-setting", key=key)
    with under(section):
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


def _typed(value: Any, hint: Any, key: str) -> Any:
    """The value, a section as its dataclass and an integer as a float where the field asks for that."""
    options = options_of(hint)
    for option in options:
        if is_dataclass(option) and isinstance(value, Mapping):
            return from_mapping(typing.cast(type, option), value, key)
    check_type(value, hint, key)
    return float(value) if float in options and int not in options and isinstance(value, int) else value
