"""The one place where programs print: harmless lines, on any terminal, to readers who may have gone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from retina.errors import plain

BROKEN_PIPE = 128 + 13
"""Exit code when the reader of stdout has gone, as in `... | head`: that of a program that SIGPIPE ends."""


def say(*lines: str, error: bool = False, goes_on: bool = False) -> None:
    """Prints each text as one line, on stdout or (`error`) stderr, at once.

    goes_on: whatever becomes of the lines, as with a full disk behind `> out.txt`. Otherwise a reader who has gone ends
    the program without a word, and a disk without room raises OSError, unless it is the error that finds no room."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # as under pythonw
        return
    try:
        stream.write("".join(f"{shown(line, stream)}\n" for line in lines))
        stream.flush()
    except BrokenPipeError:
        mute(stream)
        if not goes_on:
            sys.exit(BROKEN_PIPE)
    except OSError:
        if not (goes_on or error):
            raise


def shown(text: str, stream: Any) -> str:
    """`plain` text, with escapes for what the stream's encoding does not have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return plain(text).encode(encoding, "backslashreplace").decode(encoding)


def mute(stream: Any) -> None:
    """What is printed from here on goes nowhere. Otherwise Python would complain while it shuts down."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def quiet_end() -> Iterator[None]:
    """For a whole program, whatever prints in it: text that the terminal cannot encode is escaped, and a reader who has
    gone ends the program without a word. Streams that are closed (`>&-`) lead nowhere, because otherwise the next file
    to be opened would get their number, and what C libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  # for good
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # what tests and notebooks have instead
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
    except BrokenPipeError:
        _end_unread()
    except OSError as fault:
        say(f"error: {fault.filename or 'stdout'}: {fault.strerror} - choose another place for it", error=True)
        sys.exit(2)
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _end_unread()
        except OSError:  # which has been reported
            mute(sys.stdout)


def _end_unread() -> NoReturn:
    mute(sys.stdout)
    sys.exit(BROKEN_PIPE)
