"""From sections with a `_target_` to objects, after all their arguments have been checked at once. Only what
ALLOWED_TARGETS names is made, and only from the settings of the command itself, never from a run's files."""

import difflib
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from retina.engine.config import check_type, unknown_key
from retina.errors import ConfigError

ALLOWED_TARGETS = {
    "augment": ("albumentations.", "retina.data.transforms."),
    "data": ("retina.data.shapes.",),
    "loss": ("retina.losses.", "retina.ops.assigners."),
    "optimizer": ("torch.optim.",),
    "postprocess": ("retina.detections.",),
    "schedule": ("retina.engine.optim.",),
    "trackers": ("retina.engine.trackers.",),
}
"""Where the classes (and, of `retina`, functions) that each section names must be defined. Add your own module here,
such as "mypackage.losses.", to use what it defines."""

T = TypeVar("T")


def build(section: Any, key: str, **extra: Any) -> Any:
    """The object that a section's `_target_` describes, or with `_partial_: true` a callable that makes it.

    Nested sections are built first, also those in lists. `extra` arguments win. Raises ConfigError for a target outside
    what ALLOWED_TARGETS has for the first part of `key` and, all at once, for arguments it does not take or lacks."""
    if not isinstance(section, Mapping) or not isinstance(section.get("_target_"), str):
        raise ConfigError(f"{key}: {section!r:.80} makes nothing - give {key}._target_=, the dotted name of a class")
    values = dict(section)
    factory = _find(values.pop("_target_"), f"{key}._target_")
    partial = values.pop("_partial_", False)
    check_arguments(factory, values | extra, key, partial=partial)
    arguments = {name: _build_nested(value, f"{key}.{name}") for name, value in values.items()} | extra
    if not partial:
        return call(factory, key, **arguments)
    _check_types(factory, arguments, key)
    return functools.partial(factory, **arguments)


TRACKERS = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio"}


def build_trackers(chosen: Any) -> list[Any]:
    """The objects behind `trackers`: a list of names, or of sections with `_target_`. Raises ConfigError."""
    if not isinstance(chosen, list):
        raise ConfigError(f"trackers: {chosen!r:.80} is no list - give [], [tensorboard] or others", code="wrong-type")
    for name in chosen:
        if isinstance(name, str) and name not in TRACKERS:
            raise ConfigError(unknown_key(f"trackers.{name}", [f"trackers.{known}" for known in TRACKERS]))
    sections = [{"_target_": f"retina.engine.trackers.{TRACKERS[c]}"} if isinstance(c, str) else c for c in chosen]
    return [build(section, f"trackers.{i}") for i, section in enumerate(sections)]


def call(factory: Callable[..., T], key: str, **arguments: Any) -> T:
    """`factory(**arguments)`, with whatever it has to say against the values as one line that names the section."""
    check_arguments(factory, arguments, key)
    _check_types(factory, arguments, key)
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as fault:  # pydantic's ValidationError is a ValueError of several lines
        reason = " ".join(line.strip() for line in str(fault).splitlines() if "errors.pydantic" not in line)
        raise ConfigError(f"{key}: {reason} - correct these values") from None


def check_arguments(factory: Callable[..., Any], arguments: Iterable[str], key: str, *, partial: bool = False) -> None:
    """Raises ConfigError listing all arguments that `factory` does not take and, unless `partial`, those it lacks."""
    parameters = inspect.signature(factory).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    faults = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        faults += [unknown_key(f"{key}.{a}", [f"{key}.{n}" for n in named]) for a in arguments if a not in named]
    if not partial:
        lacking = [name for name, p in named.items() if p.default is p.empty and name not in arguments]
        faults += [f"{key}.{name}: missing - give {key}.{name}=..." for name in lacking]
    if faults:
        raise ConfigError("; ".join(faults))


def _check_types(factory: Callable[..., Any], arguments: Mapping[str, Any], key: str) -> None:
    """Raises ConfigError for the first argument that is not what a factory of this library says it takes. Others check
    their arguments themselves, or are annotated loosely."""
    if not factory.__module__.startswith("retina."):
        return
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    for name, value in arguments.items():
        check_type(value, hints.get(name, Any), f"{key}.{name}")


def _build_nested(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return [_build_nested(item, f"{key}.{i}") for i, item in enumerate(value)]
    return build(value, key) if isinstance(value, Mapping) and "_target_" in value else value


def _find(target: str, key: str) -> Callable[..., Any]:
    """The class or function of that name. Importing a module runs it, so the name is checked first; the object is
    checked as well, for a module also holds what it imported."""
    allowed = ALLOWED_TARGETS[key.partition(".")[0]]
    refusal = ConfigError(f"{key}: {target} is not allowed - choose something under {', '.join(allowed)}")
    module, _, name = target.rpartition(".")
    if not target.startswith(allowed) or not all(part.isidentifier() for part in target.split(".")):
        raise refusal
    try:
        owner = importlib.import_module(module)
        found = getattr(owner, name)
    except (ImportError, AttributeError):
        near = difflib.get_close_matches(name, dir(owner), n=1) if "owner" in locals() else []
        fix = f"did you mean {module}.{near[0]}?" if near else "check its spelling"
        raise ConfigError(f"{key}: {target} does not exist - {fix}") from None
    if not _is_own(found, allowed):
        raise refusal
    return found


def _is_own(found: Any, allowed: tuple[str, ...]) -> bool:
    """Whether `found` is a public class, or function of this library, that a module under `allowed` itself defines
    under the name it bears: no method, partial, lambda, nested or borrowed object, and nothing that lies about its
    home."""
    if not inspect.isclass(found) and not inspect.isfunction(found):
        return False
    home, name = f"{found.__module__}.", found.__qualname__
    if not home.startswith(allowed) or name.startswith("_"):
        return False
    if inspect.isfunction(found) and home.startswith(("albumentations.", "torch.")):  # reads files, say
        return False
    if inspect.isclass(found) and issubclass(found, type):  # makes classes, not objects
        return False
    return getattr(sys.modules.get(home[:-1]), name, None) is found
