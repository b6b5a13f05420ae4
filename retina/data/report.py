"""What was found wrong with a data set: every record on file, no more than a screenful on screen."""

import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retina.errors import plain
from retina.files import write_whole

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlist = _REPR.maxdict = 6
_REPR.maxlevel = 3


@dataclass
class DataReport:
    """Faults and warnings of a data set, each one line as in `retina.errors`.

    A fault keeps records from being used as they are; a warning does not.
    """

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was read of each split: places and counts."""

    def lines(self, limit: int = 20) -> list[str]:
        """For a screen: at most `limit` faults, then at most `limit` warnings; no kind crowds out another."""
        return _digest(self.faults, limit) + [f"warning: {line}" for line in _digest(self.warnings, limit)]

    def write(self, file: Path) -> None:
        """All of it as JSON, in one step, with the folder. Raises OSError."""
        content = {
            "healthy": not self.faults,
            "num_faults": len(self.faults),
            "num_warnings": len(self.warnings),
            "splits": self.splits,
            "faults": [plain(line) for line in self.faults],
            "warnings": [plain(line) for line in self.warnings],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps(content, indent=2) + "\n").encode("ascii"))  # names are escaped, odd ones too


def brief(value: object) -> str:
    """A user's value as Python writes it, cut where it is wider or deeper than needed to recognise it."""
    return _REPR.repr(value)


def _digest(lines: Sequence[str], limit: int) -> list[str]:
    """The lines themselves if they are few; else the first of every kind, with how many more there are of it."""
    if len(lines) <= limit:
        return [plain(line) for line in lines]
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(_kind(line), []).append(line)
    share = max(1, limit // len(kinds))
    shown = []
    for same in list(kinds.values())[:limit]:
        shown += [plain(line) for line in same[:share]]
        if len(same) > share:
            shown[-1] += f" (and {len(same) - share:,} more like it)"
    if len(kinds) > limit:
        shown.append(f"and {sum(map(len, list(kinds.values())[limit:])):,} more")
    return shown


def _kind(line: str) -> str:
    """Lines with the same remedy, but for the names and numbers in it, have one cause."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", line.rpartition(" - ")[2])


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    first = ", ".join(name if len(name) <= 80 else brief(name) for name in names[:8])
    return first + (f", ... ({len(names)} in all)" if len(names) > 8 else "") if names else "nothing"
