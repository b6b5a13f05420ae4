"""A terminal with lines of text and, below them, bars of what is going on."""

import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column


class Terminal:
    """Draws when there is something new, at most ten times a second, and needs no thread beside the training.

    Every method raises OSError where the terminal is gone."""

    INTERVAL = 0.1

    def __init__(self) -> None:
        rest = Column(no_wrap=True, overflow="crop", ratio=1)
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TextColumn("ETA {task.fields[eta]}"),
            TextColumn("{task.fields[text]}", table_column=rest),
        )
        self._console = _Console(highlight=False, soft_wrap=True)
        self._progress = Progress(*columns, console=self._console, transient=True, expand=True, auto_refresh=False)
        self._drawn = 0.0
        self._bars: dict[str, TaskID] = {}

    def print(self, text: str) -> None:
        """A line of text above the bars."""
        self._console.print(text, markup=False)

    def show(self, name: str, done: int, total: int, eta: str, text: str | None = None) -> None:
        """Moves the bar of that name, or makes one. `text` stays until there is another."""
        if appears := name not in self._bars:
            self._progress.start()
            self._bars[name] = self._progress.add_task(name, total=total, eta=eta, text="")
        fields: dict[str, Any] = {"eta": eta} if text is None else {"eta": eta, "text": text}
        self._progress.update(self._bars[name], completed=done, **fields)
        if appears or done == total or time.monotonic() - self._drawn >= self.INTERVAL:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def hide(self, name: str) -> None:
        self._progress.remove_task(self._bars.pop(name))

    def close(self) -> None:
        self._progress.stop()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more. Rich would end the program; here it only falls silent."""
        with suppress(SystemExit):
            super().on_broken_pipe()
