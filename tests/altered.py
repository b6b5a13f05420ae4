"""JSON of ours with single values changed: what a fuzz of headers and states is made of."""

import random
from collections.abc import Iterator
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 5, 0.5, -0.5, 1e300, 1e-320, 10**6, 10**12, 2**31, 2**62, 2**63, 10**400),
    *("", "x", "0", "resnet999", "fp64", "group", "../x", "\x1b[31m", [], {}, [[]], [0], [1, 2], ["x"], [None]),
    *([1e400], [0.0, 0.0, 0.0], [2, 10**12], [5, 4, 3], {"_target_": 1}, {"_target_": "os.system"}, {"x": {}}),
    *(float("nan"), float("inf"), -float("inf"), [float("nan")] * 3, "a" * 10_000, list(range(3000))),
]


def paths(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value in nested objects and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def change(values: Any, path: tuple[Any, ...], generator: random.Random) -> None:
    """Another value in that place; or none, or one more."""
    *parents, last = path
    for key in parents:
        if not isinstance(values, dict | list) or (isinstance(values, list) and not isinstance(key, int)):
            return  # the first of two changes has taken it away
        if key not in (values if isinstance(values, dict) else range(len(values))):
            return
        values = values[key]
    if (isinstance(values, list) and last not in range(len(values))) or not isinstance(values, dict | list):
        return
    kind = generator.random()
    if kind < 0.1 and last in (values if isinstance(values, dict) else range(len(values))):
        del values[last]
    elif kind < 0.15 and isinstance(values, list):
        values.append(values[last])
    elif kind < 0.2 and isinstance(values, dict):
        values[f"{last}_"] = generator.choice(VALUES)
    else:
        values[last] = generator.choice(VALUES)
