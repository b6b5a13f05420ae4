"""What a run says: the screen, `log.txt`, `metrics.jsonl` and TensorBoard, written by rank 0 only.

None of it is worth a run: where there is no room, a warning says so once, training goes on, and what could not be
written is kept until it can be."""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer

from retina import distributed
from retina.data.coco import Annotations
from retina.data.sampler import DetectionBatchSampler
from retina.engine.config import TrainConfig, to_steps
from retina.engine.optim import Schedule
from retina.errors import plain
from retina.files import Appender, write_whole

if TYPE_CHECKING:
    from retina.engine.tensorboard import Board


class RunLogger:
    """Every method does nothing where `active` is False, so callers need not ask which rank they are."""

    def __init__(self, folder: Path, *, active: bool) -> None:
        self.active = active
        if not active:
            return
        from retina.engine.tensorboard import Board  # slow to import, and only this rank needs it

        self._console = _Screen(highlight=False, soft_wrap=True)
        self._log = Appender(folder / "log.txt")
        self._metrics = Appender(folder / "metrics.jsonl")
        self._step = 0
        self._new_board = lambda: Board(folder / "tensorboard", self._step)
        self._open_board: Board | None = None
        self._progress: Progress | None = None
        self._warned = False
        self._said: set[str] = set()

    def info(self, text: str) -> None:
        """A line on the screen and in `log.txt`."""
        if not self.active:
            return
        text = plain(text)
        self._print(text)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        self._attempt(self._log.file, lambda: self._log.write(line.encode()))

    def once(self, text: str) -> None:
        """`info`, unless it has been said before."""
        if self.active and text not in self._said:
            self._said.add(text)
            self.info(text)

    def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One record of `metrics.jsonl`, and the same numbers in TensorBoard under `kind/`. Steps never go back."""
        if not self.active:
            return
        record = json.dumps({"step": step, "kind": kind, **_finite(values)}, allow_nan=False) + "\n"
        self._attempt(self._metrics.file, lambda: self._metrics.write(record.encode()))
        for name, value in _flatten(values, f"{kind}/"):
            self._attempt(self._board.file.file, partial(self._board.scalar, step, plain(name), value))

    def picture(self, step: int, name: str, image: NDArray[Any]) -> None:
        """`image` is uint8 [H W 3]."""
        if self.active:
            self._attempt(self._board.file.file, lambda: self._board.picture(step, name, image))

    def progress(self, step: int, total: int, values: Mapping[str, float], seconds_left: float) -> None:
        """Moves the bar to `step` of `total`; on a screen that is no terminal, prints a line instead."""
        if not self.active:
            return
        text = (
            f"loss {values['loss']:.3f} (class {values['loss_classification']:.3f}, box {values['loss_box']:.3f})  "
            f"{values['images_per_second']:.1f} images/s  waiting for data {values['data_wait']:.0%}"
        )
        if not self._console.is_terminal:
            eta = f"ETA {int(seconds_left // 60)}:{int(seconds_left % 60):02d}"
            self.info(f"step {step}/{total}  epoch {values['epoch']:.2f}  {text}  lr {values['lr']:.2g}  {eta}")
            return
        if self._progress is None:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}  ETA"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._progress = Progress(*columns, console=self._console, transient=True, speed_estimate_period=300)
            self._progress.add_task("", total=total, completed=step)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, description=text)

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

    def close(self) -> None:
        """Tries once more to write what has found no room, and says what is lost for good."""
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
        for appender in (self._metrics, *([self._open_board.file] if self._open_board else []), self._log):
            self._attempt(appender.file, appender.flush)
            if appender.waiting:
                self._print(plain(f"warning: {appender.file}: the last {len(appender.waiting)} records are lost"))
            self._attempt(appender.file, appender.close)

    @property
    def _board(self) -> "Board":
        """Opened at the first use, for it hides what lies after the step that the run goes on from."""
        if self._open_board is None:
            self._open_board = self._new_board()
        return self._open_board

    def _attempt(self, file: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as fault:
            if not self._warned:
                self._warned = True
                self._print(
                    plain(f"warning: {file}: {fault.strerror} - make room: training goes on, and it is written then")
                )

    def _print(self, text: str) -> None:
        with suppress(OSError):  # a screen that is gone or a full disk behind it
            self._console.print(text, markup=False)


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more. Rich would end the program; here it only falls silent."""
        with suppress(SystemExit):
            super().on_broken_pipe()


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
