"""From sections with a `_target_` to objects, after all their arguments have been checked at once. Only what
ALLOWED_TARGETS or `plugins` names is made, and only from the settings of the command itself, never from a run's files.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from retina.engine.config import unknown_key
from retina.errors import ConfigError, check_choice, under
from retina.plugins import find, prefixes
from retina.schema import check_type

ALLOWED_TARGETS = {
    "augment": (
        "albumentations.",
        "retina.data.transforms.",
        "retina.data.augmentations.",
        "torchvision.transforms.v2.",
    ),
    "data": ("retina.data.shapes.",),
    "loss": ("retina.losses.", "retina.ops.assigners.", "retina.ops.adaptive_assigners."),
    "optimizer": ("torch.optim.",),
    "postprocess": ("retina.detections.",),
    "schedule": ("retina.engine.optim.",),
    "trackers": ("retina.tracking.trackers.",),
}
"""Where the classes (and, of `retina`, functions) that each section names must be defined. The packages in `plugins`
are allowed in every section."""

T = TypeVar("T")


def build(section: Any, key: str, *, plugins: Sequence[str] = (), **extra: Any) -> Any:
    """The object that a section's `_target_` describes, or with `_partial_: true` a callable that makes it.

    Nested sections are built first, also those in lists. `extra` arguments win. Raises ConfigError for a target outside
    what ALLOWED_TARGETS has for the first part of `key` and outside the packages in `plugins`, and, all at once, for
    arguments it does not take or lacks."""
    if not isinstance(section, Mapping) or not isinstance(section.get("_target_"), str):
        problem = f"{section!r:.80} makes nothing - give {key}._target_=, the dotted name of a class"
        raise ConfigError(problem, code="no-target", key=key)
    values = dict(section)
    allowed = (*ALLOWED_TARGETS[key.partition(".")[0]], *prefixes(plugins))
    factory = find(values.pop("_target_"), allowed, key=f"{key}._target_")
    partial = values.pop("_partial_", False)
    _refuse_no_transform(factory, key)
    check_arguments(factory, values | extra, key, partial=partial)
    arguments = {name: _build_nested(value, f"{key}.{name}", plugins) for name, value in values.items()} | extra
    if not partial:
        return call(factory, key, **arguments)
    _check_types(factory, arguments, key)
    return functools.partial(factory, **arguments)


def _refuse_no_transform(factory: Callable[..., Any], key: str) -> None:
    """Our own modules of transforms define more than these, and to ask for its arguments would be wrong advice."""
    if key.startswith("augment.") and factory.__module__.startswith("retina."):
        from retina.data.transforms import Transform

        if not (inspect.isclass(factory) and issubclass(factory, Transform) and factory is not Transform):
            problem = f"{factory.__name__} is no transform - give one, such as retina.data.transforms.HorizontalFlip"
            raise ConfigError(problem, code="no-transform", key=f"{key}._target_")


TRACKERS = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio"}


def build_trackers(chosen: Any, plugins: Sequence[str] = ()) -> list[Any]:
    """The objects behind `trackers`: a list of names, or of sections with `_target_`. Raises ConfigError."""
    if not isinstance(chosen, list):
        problem = f"{chosen!r:.80} is no list - give [], [tensorboard] or others"
        raise ConfigError(problem, code="wrong-type", key="trackers")
    for name in chosen:
        if isinstance(name, str):
            check_choice(name, TRACKERS, "trackers")
    sections = [{"_target_": f"retina.tracking.trackers.{TRACKERS[c]}"} if isinstance(c, str) else c for c in chosen]
    return [build(section, f"trackers.{i}", plugins=plugins) for i, section in enumerate(sections)]


def call(factory: Callable[..., T], key: str, **arguments: Any) -> T:
    """`factory(**arguments)`, with whatever it has to say against the values as one line that names the section."""
    check_arguments(factory, arguments, key)
    _check_types(factory, arguments, key)
    try:
        with under(key):
            return factory(**arguments)
    except (TypeError, ValueError) as fault:  # pydantic's ValidationError is a ValueError of several lines
        reason = " ".join(line.strip() for line in str(fault).splitlines() if "errors.pydantic" not in line)
        raise ConfigError(f"{reason} - correct these values", code="wrong-value", key=key) from None


def check_arguments(factory: Callable[..., Any], arguments: Iterable[str], key: str, *, partial: bool = False) -> None:
    """Raises ConfigError listing all arguments that `factory` does not take and, unless `partial`, those it lacks."""
    parameters = inspect.signature(factory).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = [f"{key}.{name}" for name in named]
    unknown = [f"{key}.{name}" for name in arguments if name not in named]
    lacking = [f"{key}.{n}" for n, p in named.items() if p.default is p.empty and n not in arguments and not partial]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        unknown = []
    faults = [unknown_key(name, known) for name in unknown]
    faults += [f"{name}: missing - give {name}=..." for name in lacking]
    if faults:
        raise ConfigError("; ".join(faults), code="unknown-key" if unknown else "missing-setting")


def _check_types(factory: Callable[..., Any], arguments: Mapping[str, Any], key: str) -> None:
    """Raises ConfigError for the first argument that is not what a factory of this library says it takes. Others check
    their arguments themselves, or are annotated loosely."""
    for name, value in arguments.items():
        if type(value) is int:
            check_type(value, int, f"{key}.{name}")  # no number of a setting has hundreds of digits
    if not factory.__module__.startswith("retina."):
        return
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    for name, value in arguments.items():
        check_type(value, hints.get(name, Any), f"{key}.{name}")


def _build_nested(value: Any, key: str, plugins: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_build_nested(item, f"{key}.{i}", plugins) for i, item in enumerate(value)]
    return build(value, key, plugins=plugins) if isinstance(value, Mapping) and "_target_" in value else value
