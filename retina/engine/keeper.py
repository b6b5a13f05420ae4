"""What a run leaves on disk: checkpoints and the best weights, and what is done when there is no room for them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from retina import distributed
from retina.engine.checkpoint import Progress, save_checkpoint
from retina.engine.ema import ExponentialMovingAverage
from retina.engine.logging import RunLogger
from retina.engine.meter import Meter
from retina.errors import CheckpointError
from retina.model.weights import DetectorCard, save_detector

BEST = "best.safetensors"


class Keeper:
    """Writes for rank 0, and tells all ranks what could not be written.

    A full disk stops nobody: what was there before stays, a warning says so, and the next time is tried again. What is
    missing at the end is an error."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        model: nn.Module,
        optimizer: Optimizer,
        ema: ExponentialMovingAverage | None,
        scaler: torch.amp.GradScaler,
        meter: Meter,
        card: DetectorCard,
        logger: RunLogger,
    ) -> None:
        self.folder, self.keep, self.card, self.logger = folder, keep, card, logger
        self.model, self.optimizer, self.ema, self.scaler, self.meter = model, optimizer, ema, scaler, meter
        self.best_model = ema.model if ema else model
        self.missing: dict[str, str] = {}
        """What could not be written when it was last tried, and why; the same on all ranks."""

    def save(self, progress: Progress) -> None:
        """A checkpoint. Raises CheckpointError, on rank 0 alone, for weights that are not finite."""
        progress.scaler, progress.meter = self.scaler.state_dict(), self.meter.state()
        self._write(
            "checkpoint",
            lambda: save_checkpoint(
                self.folder / "checkpoints",
                progress,
                model=self.model,
                optimizer=self.optimizer,
                ema=self.ema,
                keep=self.keep,
            ),
        )

    def save_best(self, step: int, metrics: dict[str, float | None]) -> None:
        """The weights to use. Raises CheckpointError, on rank 0 alone, if they are not finite."""
        card = replace(self.card, step=step, metrics=metrics)
        self._write(BEST, lambda: save_detector(self.folder / BEST, self.best_model.state_dict(), card))

    def check(self) -> None:
        """Raises CheckpointError, on rank 0 alone, if the last attempt to write something failed."""

        def complain() -> None:
            for what, reason in self.missing.items():
                raise CheckpointError(f"{self.folder}: the last {what} could not be written ({reason}) - make room")

        distributed.on_main(complain)

    def _write(self, what: str, write: Callable[[], object]) -> None:
        def attempt() -> str:
            try:
                write()
            except OSError as fault:
                return fault.strerror or str(fault)
            return ""

        reason = distributed.on_main(attempt)
        if reason:
            self.missing[what] = reason
            self.logger.info(f"warning: {self.folder}: {what} could not be written ({reason}) - make room; going on")
        else:
            self.missing.pop(what, None)
