"""What a run leaves on disk and goes on from: checkpoints and the best weights, and what is done without room."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from retina import distributed
from retina.engine.checkpoint import Progress, load_checkpoint, newest_valid, save_checkpoint
from retina.engine.logging import RunLogger
from retina.engine.meter import Meter
from retina.engine.optim import ExponentialMovingAverage
from retina.errors import CheckpointError, ConfigError
from retina.model.weights import DetectorCard, save_detector

BEST = "best.safetensors"


class Keeper:
    """Reads for all ranks, writes on rank 0, and tells all what could not be written.

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

    def restore(self, annotations: str, *, allow_data_change: bool) -> Progress:
        """Where the newest valid checkpoint stands, after everything has been put as it was; a new start without any.

        annotations: fingerprint of what is trained on now. Raises CheckpointError, and ConfigError for another one than
        in the checkpoint unless `allow_data_change`; on one rank alone."""
        checkpoint = distributed.on_main(self._newest)  # on a network disk, ranks might see different ones
        if checkpoint is None:
            return Progress(annotations=annotations)
        file = Path(checkpoint)
        progress = distributed.on_all(
            lambda: load_checkpoint(file, model=self.model, optimizer=self.optimizer, ema=self.ema)
        )
        if progress.annotations != annotations:
            self._accept_change(file, allow_data_change)
            progress.annotations = annotations
        if progress.scaler:
            self.scaler.load_state_dict(progress.scaler)
        return progress

    def _newest(self) -> str | None:
        folder = self.folder / "checkpoints"
        checkpoint, faults = newest_valid(folder)
        for fault in faults:
            self.logger.info(f"warning: {fault}")
        if checkpoint is None and faults:
            raise CheckpointError(f"{folder}: no checkpoint is whole - restore one, or give overwrite=true")
        return str(checkpoint) if checkpoint else None

    def _accept_change(self, checkpoint: Path, allowed: bool) -> None:
        def refuse() -> None:
            if not allowed:
                raise ConfigError(
                    f"{checkpoint}: was trained on other annotations than data.train now has - restore them, choose "
                    "another name=..., or go on with allow_data_change=true"
                )

        distributed.on_main(refuse)
        self.logger.info("warning: the annotations are not those the run began with (allow_data_change)")

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
