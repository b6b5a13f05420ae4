"""What a run says: the screen, `log.txt`, `metrics.jsonl` and TensorBoard, written by rank 0 only."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLogger:
    """Every method does nothing where `active` is False, so callers need not ask which rank they are."""

    def __init__(self, folder: Path, *, active: bool) -> None:
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this rank needs it

        self._step = 0
        self._new_board = lambda: SummaryWriter(str(folder / "tensorboard"), purge_step=self._step + 1)
        self._console = Console(highlight=False, soft_wrap=True)
        self._metrics_file = folder / "metrics.jsonl"
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        self._metrics = self._metrics_file.open("a", encoding="utf-8")
        self._open_board: SummaryWriter | None = None
        self._progress: Progress | None = None

    def info(self, text: str) -> None:
        """A line on the screen and in `log.txt`."""
        if not self.active:
            return
        self._console.print(text, markup=False)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._log.flush()

    def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One record of `metrics.jsonl`, and the same numbers in TensorBoard under `kind/`. Steps never go back."""
        if not self.active:
            return
        self._metrics.write(json.dumps({"step": step, "kind": kind, **_finite(values)}) + "\n")
        self._metrics.flush()
        for name, value in _flatten(values, f"{kind}/"):
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: NDArray[Any]) -> None:
        """`image` is uint8 [H W 3]."""
        if self.active:
            self._board.add_image(name, image, step, dataformats="HWC")

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

    def resume(self, step: int) -> None:
        """Continues after `step`: records of later steps, left by a run that was cut off, are dropped."""
        if not self.active:
            return
        self._metrics.close()
        _drop_records_after(self._metrics_file, step)
        self._metrics = self._metrics_file.open("a", encoding="utf-8")
        self._step = step
        if step:
            self.info(f"resumed at step {step}")

    @property
    def _board(self) -> "SummaryWriter":
        """Opened at the first use, for it purges what lies after the step that the run goes on from."""
        if self._open_board is None:
            self._open_board = self._new_board()
        return self._open_board

    def close(self) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
        if self._open_board is not None:
            self._open_board.close()
        self._metrics.close()
        self._log.close()


def _flatten(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat.append((f"{prefix}{key}", float(value)))
    return flat


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity and no NaN: null instead."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _drop_records_after(file: Path, step: int) -> None:
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a crash
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(file)
