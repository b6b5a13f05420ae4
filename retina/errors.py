"""The one family of errors meant for users: a single line that says where, what and how to mend it."""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_JOINERS = "\u200c\u200d"
"""Formatting characters that words of many scripts, and emoji, are spelt with; they neither move nor hide others."""


def plain(text: str) -> str:
    """`text` as one harmless line: whatever is no letter, mark, number, punctuation, symbol or space is shown escaped.

    Names come from other people's files. Control characters (a terminal's ANSI and OSC sequences, newlines), overrides
    of the writing direction, invisible characters and lone surrogates (undecodable bytes of file names) come out as in
    a Python literal; printable Unicode is kept. Text that is plain already is returned as it is."""
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


class RetinaError(Exception):
    """A fault that a user can mend. `str()` is one line: `<file or key>: <record>: <problem> - <how to fix>`.

    code: a short name of the kind of fault, such as "unknown-key". It stays when the wording changes, so programs and
        tests can rely on it; the command line prints it as `error[unknown-key]: ...`.
    key: the argument or setting at fault; it is printed first. The library names its own argument (`batch_size`), and
        the command line adds the section it belongs to (`train.batch_size`), see `under`."""

    def __init__(self, text: str, *, code: str = "", key: str = "") -> None:
        super().__init__(text)
        self.code, self.key = code, key

    def __str__(self) -> str:
        return plain(": ".join(part for part in (self.key, super().__str__()) if part))


@contextmanager
def under(section: str) -> Iterator[None]:
    """Within the `with` block, faults that name an argument name it as a setting of that section, if it has a name."""
    try:
        yield
    except RetinaError as fault:
        if fault.key and section:
            fault.key = f"{section}.{fault.key}"
        raise


class ConfigError(RetinaError):
    """A setting or argument that does not exist, has the wrong type or contradicts another."""


def check(fine: bool, key: str, value: object, fix: str) -> None:
    """Raises ConfigError for the value of the argument `key` unless it is fine."""
    if not fine:
        raise ConfigError(f"{value!r:.80} is not allowed - {fix}", code="out-of-range", key=key)


def check_choice(value: object, known: Iterable[object], key: str) -> None:
    """Raises ConfigError for a value of the argument `key` that is none of the known ones."""
    if value not in known:
        choices = ", ".join("null" if choice is None else str(choice) for choice in known)
        raise ConfigError(f"{value!r:.80} is not known - choose one of {choices}", code="unknown-value", key=key)


class DataError(RetinaError):
    """A fault in annotations or images."""


class StoppedError(Exception):
    """Work was cut short because the process was asked to stop, by the signal of that number. No fault."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class CheckpointError(RetinaError):
    """A checkpoint or weights file that is missing, damaged or of another model."""
