"""The one family of errors meant for users: a single line that says where, what and how to mend it."""

import unicodedata

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
    """A fault a user can mend. `str()` is one line: `<file>: <record>: <problem> - <how to fix>`."""

    def __str__(self) -> str:
        return plain(super().__str__())


class ConfigError(RetinaError):
    """A setting that does not exist, has the wrong type or contradicts another."""


class DataError(RetinaError):
    """A fault in annotations or images."""


class CheckpointError(RetinaError):
    """A checkpoint or weights file that is missing, damaged or of another model."""
