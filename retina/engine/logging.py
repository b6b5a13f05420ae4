"""What a run says: the screen, `log.txt`, `metrics.jsonl` and its trackers, written by rank 0 only.

None of it stops a run. Where there is no room a warning says so once, and the records that could not be written are
kept until they can be."""

import errno
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from retina import distributed
from retina.data.coco import Annotations
from retina.data.sampler import DetectionBatchSampler
from retina.engine.config import TrainConfig, to_steps
from retina.engine.optim import Schedule
from retina.errors import plain
from retina.files import Appender, write_whole
from retina.tracking.curves import draw_curves
from retina.tracking.trackers import Tracker
from retina.types import Batch

if TYPE_CHECKING:
    from retina.tracking.terminal import Terminal


class RunLogger:
    """Every method does nothing where `active` is False, so callers need not ask which rank they are.

    settings: those of the whole command, for the trackers that show them."""

    def __init__(
        self, folder: Path, *, active: bool, trackers: Sequence[Tracker] = (), settings: Mapping[str, Any] | None = None
    ) -> None:
        self.active = active
        if not active:
            return
        self._folder, self._settings = folder, settings or {}
        self._log = Appender(folder / "log.txt")
        self._metrics = Appender(folder / "metrics.jsonl")
        self._step = 0
        self._unstarted, self._trackers = list(trackers), list[Tracker]()
        self._terminal = _terminal()
        self._pace = Pace()
        self._warned: set[str] = set()
        self._said: set[str] = set()

    def info(self, text: str) -> None:
        """A line on the screen and in `log.txt`."""
        if self.active:
            self._print(plain(text))
            self._write_log(plain(text))

    def once(self, text: str) -> None:
        """`info`, unless it has been said before."""
        if self.active and text not in self._said:
            self._said.add(text)
            self.info(text)

    def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One record of `metrics.jsonl`, and the same numbers under `kind/` in the trackers. Steps never go back."""
        if not self.active:
            return
        record = json.dumps({"step": step, "kind": kind, **_finite(values)}, allow_nan=False) + "\n"
        self._attempt(str(self._metrics.file), lambda: self._metrics.write(record.encode()))
        numbers = {plain(name): value for name, value in _flatten(values, f"{kind}/")}
        self._track(lambda tracker: tracker.scalars(step, numbers))

    def picture(self, step: int, name: str, image: NDArray[Any]) -> None:
        """`image` is uint8 [H W 3]."""
        if self.active:
            self._track(lambda tracker: tracker.pictures(step, {name: image}))

    def progress(self, step: int, total: int, values: Mapping[str, float] | None = None) -> None:
        """Moves the bar of a terminal to `step` of `total`. Called before the first step and after every one.

        values: the means since they were last given; they make a line of `log.txt`, and of a screen without a bar."""
        if not self.active:
            return
        eta = self._pace.left(step, total)
        if values is not None:
            line = (
                f"step {step}/{total}  epoch {values['epoch']:.2f}  loss {values['loss']:.3f} "
                f"(class {values['loss_classification']:.3f}, box {values['loss_box']:.3f})  "
                f"{values['images_per_second']:.1f} images/s  waiting for data {values['data_wait']:.0%}  "
                f"lr {values['lr']:.2g}  ETA {eta}"
            )
            self._write_log(line)
            if self._terminal is None:
                self._print(line)
        if self._terminal is not None:
            short = f"loss {values['loss']:.3f}  {values['images_per_second']:.1f} images/s" if values else None
            with suppress(OSError):
                self._terminal.show("step", step, total, eta, short)

    def evaluating(self, batches: Iterable[Batch], total: int) -> Iterable[Batch]:
        """`batches` as they are, with a bar that counts their images, of `total` over all ranks, on a terminal."""
        return _Counted(batches, total, self._terminal) if self.active and self._terminal else batches

    def evaluation(
        self, step: int, metrics: Mapping[str, Any], losses: Mapping[str, float], seconds: float, *, better: bool
    ) -> None:
        """One line on the screen, all numbers in the records."""
        self.scalars(step, "val", {**metrics, **losses, "seconds": seconds})
        shown = "  ".join(f"{key} {_shown(metrics[key])}" for key in ("AP", "AP50", "AP75", "AR100"))
        loss = f"  loss {losses['loss']:.3f}" if losses else ""
        self.info(f"evaluation at step {step}: {shown}{loss}  ({seconds:.0f} s){'  best so far' if better else ''}")

    def resume(self, step: int, pending_evaluation: bool = False) -> None:
        """Continues after `step`: later records, and half a one, left by a run that was cut off, are dropped.

        pending_evaluation: the evaluation of that very step is done again, so its record goes too. Raises OSError."""
        if not self.active:
            return
        _drop_records(self._metrics.file, step, pending_evaluation)
        self._step = step
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
        if self._terminal is not None:
            self._terminal.close()
        for tracker in self._trackers:
            self._attempt(type(tracker).__name__, tracker.end, last=True)
        self._trackers = []
        for appender in (self._metrics, self._log):
            self._attempt(str(appender.file), appender.close, last=True)
        try:
            sys.stdout.flush()
        except OSError:
            _mute()

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
            if kind not in self._warned or last:
                self._warned.add(kind)
                reason = getattr(fault, "strerror", None) or f"{type(fault).__name__}: {fault}"
                goes_on = "" if last else f" - {'make room: ' if full else ''}training goes on"
                self._print(line := plain(f"warning: {name}: {reason}{goes_on}"))
                if not full:
                    self._write_log(line)
            return False

    def _write_log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        self._attempt(str(self._log.file), lambda: self._log.write(line.encode()))

    def _print(self, text: str) -> None:
        try:
            if self._terminal is not None:
                self._terminal.print(text)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # such as behind `| head`: nobody reads any more
            _mute()
        except OSError:  # such as a full disk behind `> out.txt`: Python keeps the line, and tries again with the next
            pass


def _terminal() -> "Terminal | None":
    """None where lines are all that the screen takes; then rich need not be imported."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return None
    from retina.tracking.terminal import Terminal

    return Terminal()


class _Counted:
    def __init__(self, batches: Iterable[Batch], total: int, terminal: "Terminal") -> None:
        self.batches, self.total, self.terminal = batches, total, terminal

    def __iter__(self) -> Iterator[Batch]:
        done, pace = 0, Pace()
        try:
            self.terminal.show("evaluating", 0, self.total, pace.left(0, self.total))
            for batch in self.batches:
                yield batch
                done = min(done + len(batch.images) * distributed.world_size(), self.total)
                self.terminal.show("evaluating", done, self.total, pace.left(done, self.total))
        finally:
            self.terminal.hide("evaluating")


class Pace:
    """How long the rest takes at the pace of the last 1000 steps."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=1000)

    def left(self, done: int, total: int) -> str:
        """As `2:03` or `1:02:03`, from the second call on. Steps never go back."""
        self._marks.append((done, time.monotonic()))
        (begin, started), (_, now) = self._marks[0], self._marks[-1]
        if done == begin:
            return "-:--"
        seconds = round((now - started) / (done - begin) * (total - done))
        minutes, hours = seconds // 60 % 60, seconds // 3600
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def _mute() -> None:
    """What is printed from here on goes nowhere. Otherwise Python would complain while it shuts down."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flatten(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat.append((f"{prefix}{key}", float(value)))
    return flat


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _drop_records(file: Path, step: int, pending_evaluation: bool) -> None:
    if not file.is_file():
        return
    whole = file.read_bytes()
    kept = b"".join(line for line in whole.splitlines(keepends=True) if _stays(line, step, pending_evaluation))
    if kept != whole:
        write_whole(file, kept)


def _stays(line: bytes, step: int, pending_evaluation: bool) -> bool:
    try:
        record = json.loads(line)
        again = record["step"] == step and record["kind"] == "val" and pending_evaluation
        return line.endswith(b"\n") and record["step"] <= step and not again
    except (ValueError, KeyError, TypeError):
        return False  # cut off


def describe_run(
    folder: Path,
    config: TrainConfig,
    device: torch.device,
    train: Annotations,
    val: Annotations,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    sampler: DetectionBatchSampler,
) -> list[str]:
    """One line each for folder, device, data, classes, model, batch and schedule, and what is wrong with the last."""
    counts = sorted(zip(train.class_counts().tolist(), train.classes, strict=True), reverse=True)
    shown = ", ".join(f"{name} {count}" for count, name in counts[:20])
    more = f", and {len(counts) - 20} more" if len(counts) > 20 else ""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    world = distributed.world_size()
    parts = f"{world} process{'es' if world > 1 else ''} x {config.accumulate} x {sampler.micro_batch}"
    steps = to_steps(config.length, steps_per_epoch=sampler.steps_per_epoch, total=None, key="train.length")
    scale = config.batch_size / config.lr_batch_size
    lr = optimizer.param_groups[0]["initial_lr"]
    epoch = f"{sampler.steps_per_epoch} steps per epoch"
    if sampler.images_per_epoch != len(train):
        epoch += f" of {sampler.images_per_epoch} images"
    some = range(0, steps, max(1, steps // 1000))
    peak = max(schedule(step, total=steps, steps_per_epoch=sampler.steps_per_epoch) for step in some)
    warnings = []
    if peak < 0.99:
        warnings.append(
            f"warning: the learning rate never gets beyond {peak:.0%} of that - give a schedule.warmup (or "
            f"milestones) that fit {steps} steps, or a longer train.length"
        )
    return [
        f"run      {folder}",
        f"device   {describe_device(device)}, {config.precision}" + (f", {world} processes" if world > 1 else ""),
        f"data     {len(train)} images with {train.num_objects} objects; to evaluate {len(val)} with {val.num_objects}",
        f"classes  {len(train.classes)}: {shown}{more}",
        f"model    {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained",
        f"batch    {config.batch_size} images ({parts}), {epoch}, {steps} in all",
        f"lr       {lr:.3g} ({lr / scale:.3g} for {config.lr_batch_size} images x {scale:g})",
        *warnings,
    ]


def describe_device(device: torch.device) -> str:
    """`cuda:0 (NVIDIA H100)`, `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
