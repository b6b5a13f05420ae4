"""What is read from files of strangers: JSON without its traps, and values of the types that are asked for. Imports
nothing heavy."""

import json
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from retina.errors import ConfigError

LARGEST = 2**63
"""Integers from here on fit no tensor."""
MOST_PIXELS, MOST_PADDING = 1 << 13, 1 << 10
"""Of a side that images are resized to, and that sides of canvases are multiples of."""
GOALS = {
    "f1": "the highest F1",
    "precision": "the highest recall with a precision of at least `target`",
    "recall": "the highest precision with a recall of at least `target`",
    "false_alarms": "the highest recall with at most `target` false alarms of each class per image",
    "count": "the smallest mean error of the number of objects of a class in an image",
}
"""What the thresholds of an operating point may be chosen for."""


def parse_json(text: str | bytes) -> Any:
    """`json.loads` by the letter of RFC 8259: NaN, Infinity and the same key twice in one object are ValueErrors.

    Raises ValueError, and RecursionError for what is nested too deeply."""
    return json.loads(text, parse_constant=_no_number, object_pairs_hook=unique_keys)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of a reader that refuses the same key twice in one object: a ValueError names it."""
    values = dict(pairs)
    if len(values) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r:.80} is there twice")
    return values


def check_type(value: Any, hint: Any, key: str) -> None:
    """Raises ConfigError for a value that is not of that type. Of types that no YAML file can hold, such as a tensor,
    only what a YAML file holds is refused."""
    if not _fits(value, hint):
        names = ["null" if option is types.NoneType else _name_of(option) for option in options_of(hint)]
        state = "has too many digits" if type(value) is int and abs(value) >= LARGEST else "is of the wrong type"
        problem = f"{value!r:.80} {state} - give {' or '.join(names)}"
        raise ConfigError(problem, code="wrong-type", key=key)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (dict, Mapping):
        of_key, of_value = arguments
        return isinstance(value, Mapping) and all(_fits(k, of_key) and _fits(v, of_value) for k, v in value.items())
    if origin in (list, tuple, Sequence):
        plain = isinstance(value, list if origin is list else list | tuple)
        return plain and all(_fits(item, arguments[0]) for item in value)
    if hint in (int, float):
        if isinstance(value, int):
            return not isinstance(value, bool) and -LARGEST <= value < LARGEST
        return isinstance(value, hint)
    if hint in (bool, str, list, dict, types.NoneType) or is_dataclass(hint):
        return isinstance(value, hint)
    if hint is Path:
        return isinstance(value, str | Path)
    return hint is Any or not isinstance(value, bool | int | float | str | list | dict | None)


def options_of(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _name_of(hint: Any) -> str:
    """`list[float]`, say, without the modules that its parts are from."""
    return re.sub(r"(\w+\.)+", "", str(hint)) if typing.get_args(hint) else hint.__name__
