"""What a run reports: the screen, `log.txt`, `metrics.jsonl` and its trackers, written by rank 0 only.

None of it stops a run. Where there is no room a warning says so once, and the records that could not be written are
kept until they can be."""

import errno
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from retina import distributed
from retina.errors import plain
from retina.files import Appender, advice, read_plain, write_whole
from retina.schema import parse_json
from retina.tracking.curves import draw_curves
from retina.tracking.screen import Counted, Pace, Screen
from retina.tracking.trackers import Tracker, flatten
from retina.types import Batch


class RunLogger:
    """Every method does nothing where `active` is False, so callers need not ask which rank they are. Without a folder
    nothing is written; warnings go to Python's own logging.

    settings: those of the whole command, for the trackers that show them.
    advice: what would make the run shorter, printed with its length after the first ten steps."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        active: bool = True,
        trackers: Sequence[Tracker] = (),
        settings: Mapping[str, Any] | None = None,
        advice: str = "",
    ) -> None:
        self.active = active and folder is not None
        self._written = folder is not None
        if folder is None or not active:
            return
        self._folder, self._settings = folder, settings or {}
        self._log, self._metrics = Appender(folder / "log.txt"), Appender(folder / "metrics.jsonl")
        self._step, self._advice = 0, advice
        self._unstarted, self._trackers = list(trackers), list[Tracker]()
        self._screen, self._pace = Screen(), Pace()
        self._failed = set[str]()
        self._said = set[str]()

    def info(self, text: str) -> None:
        """A line on the screen and in `log.txt`."""
        if self.active:
            self._screen.print(plain(text))
            self._write_log(plain(text))

    def warn(self, text: str) -> None:
        """`info` of a warning."""
        if not self._written and distributed.is_main():
            logging.getLogger("retina").warning(plain(text))
        self.info(f"warning: {text}")

    def once(self, text: str) -> None:
        """`info`, unless this line has been written before."""
        if self.active and text not in self._said:
            self._said.add(text)
            self.info(text)

    def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One record of `metrics.jsonl`, and the same numbers under `kind/` in the trackers. Steps never go back."""
        if not self.active:
            return
        record = json.dumps({"step": step, "kind": kind, **_finite(values)}, allow_nan=False) + "\n"
        self._attempt(str(self._metrics.file), lambda: self._metrics.write(record.encode()))
        leaves = flatten(values, "/", f"{kind}/").items()
        numbers = {plain(n): float(v) for n, v in leaves if isinstance(v, int | float) and not isinstance(v, bool)}
        self._track(lambda tracker: tracker.scalars(step, numbers))

    def picture(self, step: int, name: str, image: NDArray[Any]) -> None:
        """`image` is uint8 [H W 3]."""
        if self.active:
            self._track(lambda tracker: tracker.pictures(step, {name: image}))

    def progress(self, step: int, total: int, values: Mapping[str, float] | None = None) -> None:
        """Moves the bar of a terminal to `step` of `total`. Called before the first step and after every one.

        values: the means since the last ones; they make a line of `log.txt`, and of a screen without a bar."""
        if not self.active:
            return
        eta, short = self._pace.left(step, total), None
        if self._pace.steps == 10 and step < total:
            self.once(
                f"after 10 steps: {eta} to the end, evaluations not counted{self._advice and ' - '}{self._advice}"
            )
        if values is not None:
            short = f"loss {values['loss']:.3f}  {values['images_per_second']:.1f} images/s"
            line = (
                f"step {step}/{total}  epoch {values['epoch']:.2f}  loss {values['loss']:.3f} "
                f"(class {values['loss_classification']:.3f}, box {values['loss_box']:.3f})  "
                f"{values['images_per_second']:.1f} images/s  waiting for data {values['data_wait']:.0%}  "
                f"lr {values['lr']:.2g}  ETA {eta}"
            )
            self._write_log(line)
            if self._screen.terminal is None:
                self._screen.print(line)
        self._screen.bar("step", step, total, eta, short)

    def evaluating(self, batches: Iterable[Batch], total: int) -> Iterable[Batch]:
        """`batches` as they are, with a bar that counts their images, of `total` over all ranks, on a terminal."""
        return Counted(batches, total, self._screen) if self.active and self._screen.terminal else batches

    def evaluation(
        self, step: int, metrics: Mapping[str, Any], losses: Mapping[str, float], seconds: float, *, better: bool
    ) -> None:
        """One line on the screen, all numbers in the records."""
        self.scalars(step, "val", {**metrics, **losses, "seconds": seconds})
        recalls = [name for name in metrics if re.fullmatch(r"AR\d+", name)]  # AR1, AR10, and AR100 or what is set
        values = [(name, metrics[name]) for name in ("AP", "AP50", "AP75", *recalls[-1:])]
        text = "  ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in values)
        loss = f"  loss {losses['loss']:.3f}" if losses else ""
        self.info(f"evaluation at step {step}: {text}{loss}  ({seconds:.0f} s){'  best so far' if better else ''}")

    def resume(self, step: int, pending_evaluation: bool = False) -> None:
        """Continues after `step`: later records, and half a one, left by a run that was cut off, are dropped.

        pending_evaluation: the evaluation of that very step is done again, so its record goes too. Raises OSError."""
        if not self.active:
            return
        self._step = step
        file = self._metrics.file
        whole = read_plain(file) if file.is_file() else b""
        lines = whole.splitlines(keepends=True)
        rest = b"".join(line for line in lines if _stays(line, step, pending_evaluation))
        if rest != whole:
            write_whole(file, rest)
        if step:
            self.info(f"resumed at step {step}")

    def curves(self) -> None:
        """Draws `curves.png` from all records so far."""
        if self.active:
            self._attempt("curves.png", partial(draw_curves, self._folder))

    def close(self) -> None:
        """Tries once more to write the records that found no room, and says what is lost for good."""
        if not self.active:
            return
        for tracker in self._trackers:
            self._attempt(type(tracker).__name__, tracker.end, last=True)
        self._trackers = []
        for appender in (self._metrics, self._log):
            self._attempt(str(appender.file), appender.close, last=True)
        self._screen.close()

    def _track(self, record: Callable[[Tracker], None]) -> None:
        """Trackers start at their first record, because `resume` decides where they go on from."""
        while self._unstarted:
            tracker = self._unstarted.pop(0)
            if self._attempt(type(tracker).__name__, partial(tracker.start, self._folder, self._settings, self._step)):
                self._trackers.append(tracker)
        for tracker in self._trackers:
            self._attempt(type(tracker).__name__, partial(record, tracker))

    def _attempt(self, name: str, write: Callable[[], None], *, last: bool = False) -> bool:
        """Whether `write` worked. One warning for each name and one for a full disk; `last` says what is lost."""
        try:
            write()
            return True
        except Exception as fault:
            full = isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = "full" if full else name
            if kind not in self._failed or last:
                self._failed.add(kind)
                reason = getattr(fault, "strerror", None) or f"{type(fault).__name__}: {fault}"
                goes_on = (
                    "" if last else f" - {f'{advice(fault)}: ' if isinstance(fault, OSError) else ''}training goes on"
                )
                self._screen.print(line := plain(f"warning: {name}: {reason}{goes_on}"))
                if not full:
                    self._write_log(line)
            return False

    def _write_log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        self._attempt(str(self._log.file), lambda: self._log.write(line.encode()))


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stays(line: bytes, step: int, pending_evaluation: bool) -> bool:
    try:
        record = parse_json(line)
        again = record["step"] == step and record["kind"] == "val" and pending_evaluation
        return line.endswith(b"\n") and record["step"] <= step and not again
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # cut off
