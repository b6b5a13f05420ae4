"""What a checkpoint of another program comes down to: tensors under our names, and what its numbers mean."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from retina.errors import CheckpointError
from retina.model.formats.conventions import Conventions


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


_SHOWN = 8
"""Names in one line."""


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def refusal(line: str, lists: Mapping[str, Sequence[str]]) -> CheckpointError:
    """The fault of this line, with the whole of the lists that `some` cuts short as notes (PEP 678)."""
    fault = CheckpointError(line)
    for title, names in lists.items():
        if len(names) > _SHOWN:
            fault.add_note(f"{title}: {', '.join(names)}")
    return fault
