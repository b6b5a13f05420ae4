"""What a run prints: lines of text and, on a terminal, bars below them. Nothing that goes wrong with it is raised."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from retina import distributed
from retina.printing import mute, say, shown
from retina.types import Batch

if TYPE_CHECKING:
    from retina.tracking.terminal import Terminal


class Screen:
    def __init__(self) -> None:
        self.terminal: "Terminal | None" = None
        """None where lines are all that the screen takes; then rich is not imported."""
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from retina.tracking import terminal

            self.terminal = terminal.Terminal()

    def print(self, text: str) -> None:
        """A full disk behind `> out.txt` is no fault: Python keeps the line, and tries again with the next."""
        if self.terminal is None:
            say(text, goes_on=True)
            return
        with suppress(OSError):
            self.terminal.print(shown(text, sys.stdout))

    def bar(self, name: str, done: int, total: int, eta: str, text: str | None = None) -> None:
        """Moves the bar of that name, or makes one. `text` stays until there is another."""
        if self.terminal is not None:
            with suppress(OSError):
                self.terminal.show(name, done, total, eta, text)

    def close(self) -> None:
        if self.terminal is not None:
            with suppress(OSError):
                self.terminal.close()
        try:
            sys.stdout.flush()
        except OSError:
            mute(sys.stdout)


class Counted:
    """Batches as they are, with a bar that counts their images, of `total` over all ranks, whenever they are read."""

    def __init__(self, batches: Iterable[Batch], total: int, screen: Screen) -> None:
        self.batches, self.total, self.screen = batches, total, screen

    def __iter__(self) -> Iterator[Batch]:
        done, pace = 0, Pace()
        try:
            self.screen.bar("evaluating", 0, self.total, pace.left(0, self.total))
            for batch in self.batches:
                yield batch
                done = min(done + len(batch.images) * distributed.world_size(), self.total)
                self.screen.bar("evaluating", done, self.total, pace.left(done, self.total))
        finally:
            if self.screen.terminal is not None:
                self.screen.terminal.hide("evaluating")


class Pace:
    """How long the rest takes at the pace of the last 1000 steps."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=1000)

    @property
    def steps(self) -> int:
        """That it knows the pace of."""
        return self._marks[-1][0] - self._marks[0][0]

    def left(self, done: int, total: int) -> str:
        """As `2:03` or `1:02:03`, from the second call on. Steps never go back."""
        self._marks.append((done, time.monotonic()))
        (begin, started), (_, now) = self._marks[0], self._marks[-1]
        if done == begin:
            return "-:--"
        seconds = round((now - started) / (done - begin) * (total - done))
        minutes, hours = seconds // 60 % 60, seconds // 3600
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
