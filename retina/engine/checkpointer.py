"""What a run leaves on disk and goes on from: checkpoints and the best weights, also when the disk is full."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from retina import distributed
from retina.engine.checkpoint import BEST, Progress, load_checkpoint, newest_valid, save_checkpoint
from retina.engine.config import REPLACED, TrainConfig
from retina.engine.logging import RunLogger
from retina.engine.meter import Meter
from retina.engine.optim import ExponentialMovingAverage, Schedule, as_schedule, constant
from retina.errors import CheckpointError, ConfigError
from retina.files import Place, advice, write_whole
from retina.model.weights import DetectorCard, detector_bytes, serialize
from retina.precision import chosen_precision
from retina.types import DTYPES


class TrainState:
    """A training run in memory: what is trained, how, and how far it is.

    model: any module that returns `Predictions`; already on its device, because the moving average copies it.
    schedule: the factor on the optimizer's learning rates, a function of the step (and, if it takes them by these
        names, of `total` and `steps_per_epoch`)."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: TrainConfig | None = None,
        schedule: Schedule | Callable[[int], float] = constant,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, as_schedule(schedule)
        self.device = next(model.parameters()).device
        config = config or TrainConfig()
        self.precision = chosen_precision(config.precision, self.device)
        self.config, self.dtype = replace(config, precision=self.precision), DTYPES[self.precision]
        decay = self.config.ema
        self.ema = None if decay is None else ExponentialMovingAverage(model, decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")
        self.meter = Meter()
        self.progress = Progress()
        self.learned = False
        """Whether this process has made an update."""

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the progress, by the names of `save_checkpoint`."""
        return {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}

    @property
    def weights(self) -> nn.Module:
        """The model to evaluate and to use: the moving average if there is one."""
        return self.ema.model if self.ema else self.model


class Checkpointer:
    """Reads for all ranks, writes on rank 0, and tells all ranks what could not be written.

    A full disk does not stop the run for `max_unsaved_minutes`: the files from before stay, a warning says so, and the
    next save tries again. Best weights that are owed are kept in memory and in the checkpoints, so they survive the
    process. What is missing at the end is an error.

    folder: of the run; None saves nothing.
    card: goes into the header of `best.safetensors`; without one, that file is bare weights.
    allow_data_change: resume although the training annotations are no longer those of the checkpoint."""

    def __init__(
        self,
        folder: Path | None,
        state: TrainState,
        *,
        card: DetectorCard | None = None,
        recorder: RunLogger | None = None,
        allow_data_change: bool = False,
    ) -> None:
        self.folder, self.state, self.card, self.allow_data_change = folder, state, card, allow_data_change
        self.recorder = recorder or RunLogger()
        self.missing: dict[str, str] = {}
        """What could not be written when it was last tried, why, and how to mend it; the same on all ranks."""
        self._failing_since: dict[str, float] = {}
        self._best: bytes | None = None
        """On rank 0: the best weights until they are on the disk."""
        self._saved: tuple[int, int] | None = None
        self._place = Place(folder) if folder else None

    def restore(self, annotations: str = "") -> Progress:
        """Puts everything as the newest valid checkpoint has it; without a checkpoint, as it is. Returns the progress.

        annotations: fingerprint of the training annotations. Raises CheckpointError, and ConfigError for another
        fingerprint than in the checkpoint unless `allow_data_change`; on one rank alone."""
        state = self.state
        newest = distributed.on_main(self._newest)  # on a network disk, ranks might see different ones
        if newest is not None:
            state.progress = distributed.on_all(lambda: load_checkpoint(Path(newest), **state.parts))
            if state.progress.annotations != annotations:
                distributed.on_main(lambda: self._accept_change(newest))
        progress = state.progress
        progress.annotations = annotations
        if state.scaler.is_enabled() and progress.scaler:
            if missing := state.scaler.state_dict().keys() - progress.scaler.keys():
                problem = f"{newest}: its scaler lacks {', '.join(sorted(missing))} - restore it from a copy"
                raise CheckpointError(problem, code="damaged-checkpoint")
            state.scaler.load_state_dict(progress.scaler)
        state.meter.load_state(progress.meter, state.device)
        self._saved = (progress.step, progress.evaluated)
        if newest is not None and distributed.on_main(lambda: self._read_owed(Path(newest) / BEST)):
            self._write_best()
        return progress

    def _read_owed(self, file: Path) -> bool:
        self._best = file.read_bytes() if file.is_file() else None
        return self._best is not None

    def _newest(self) -> str | None:
        if self.folder is None:
            return None
        folder = self.folder / "checkpoints"
        checkpoint, faults = newest_valid(folder)
        for fault in faults:
            self.recorder.warn(fault)
        if checkpoint is None and faults:
            fix = "restore one from a copy, or begin again in another folder"
            raise CheckpointError(f"{folder}: no checkpoint is whole - {fix}", code="damaged-checkpoint")
        return str(checkpoint) if checkpoint else None

    def _accept_change(self, checkpoint: str) -> None:
        if not self.allow_data_change:
            fix = "restore them, begin another run, or go on with allow_data_change=true"
            problem = f"{checkpoint}: was trained on other annotations than those there are now"
            raise ConfigError(f"{problem} - {fix}", code="data-change")
        self.recorder.warn("the annotations are not those the run began with (allow_data_change)")

    def save(self) -> None:
        """A checkpoint, unless this very state is saved already, and what is owed. Raises CheckpointError, on rank 0
        alone, for weights that are not finite, and when nothing could be saved for too long."""
        state, progress = self.state, self.state.progress
        self.write_owed()
        now = (progress.step, progress.evaluated)
        if self.folder is None or self._saved == now:
            return
        progress.scaler, progress.meter = state.scaler.state_dict(), state.meter.state()
        options = {**state.parts, "keep": state.config.keep_checkpoints, "best": self._best}
        folder = self.folder

        def write() -> None:
            save_checkpoint(folder / "checkpoints", progress, **options)
            shutil.rmtree(folder / REPLACED, ignore_errors=True)

        with state.meter.paused():
            if self._write("checkpoint", write):
                self._saved = now

    def save_best(self, metrics: dict[str, float | None]) -> None:
        """The weights to use. Raises CheckpointError, on rank 0 alone, if they are not finite, and when nothing could
        be saved for too long."""
        if self.folder is None:
            return
        file, weights, card = self.folder / BEST, self.state.weights.state_dict(), self.card

        def prepare() -> None:
            described = replace(card, step=self.state.progress.step, metrics=metrics) if card else None
            self._best = detector_bytes(file, weights, described) if described else serialize(weights)

        distributed.on_main(prepare)
        self._write_best()

    def write_owed(self) -> None:
        """Tries again to write best weights that are not on the disk yet. Raises CheckpointError, on rank 0 alone, when
        they could not be written for too long."""
        if BEST in self.missing:
            self._write_best()

    def _write_best(self) -> None:
        def write() -> None:
            assert self.folder is not None
            assert self._best is not None
            write_whole(self.folder / BEST, self._best)
            self._best = None

        self._write(BEST, write)

    def check(self, *, finished: bool) -> None:
        """Raises CheckpointError, on rank 0 alone, if the last attempt to write something failed, or if the run is
        finished without its best weights."""

        def complain() -> None:
            for what, reason in self.missing.items():
                raise CheckpointError(f"{self.folder}: {what} could not be written {reason}", code="not-written")
            if finished and self.folder is not None and not (file := self.folder / BEST).is_file():
                fix = "restore it from a copy, or use the last checkpoint"
                raise CheckpointError(f"{file}: is missing, although the run is at its end - {fix}", code="no-best")

        distributed.on_main(complain)

    def _write(self, what: str, write: Callable[[], object]) -> bool:
        """Whether it worked."""

        def attempt() -> str:
            try:
                if self._place:
                    self._place.check()
                write()
            except OSError as fault:
                return self._explain(what, fault)
            self._failing_since.pop(what, None)
            return ""

        if not (reason := distributed.on_main(attempt)):
            self.missing.pop(what, None)
            return True
        if self.missing.get(what) != reason:
            self.recorder.warn(f"{self.folder}: {what} could not be written {reason}; training goes on")
        self.missing[what] = reason
        return False

    def _explain(self, what: str, fault: OSError) -> str:
        """Raises CheckpointError when this has failed for too long."""
        reason, most = f"({fault.strerror or fault}) - {advice(fault)}", self.state.config.max_unsaved_minutes
        began = self._failing_since.setdefault(what, time.monotonic())
        if time.monotonic() - began < most * 60:
            return reason
        problem = f"{what} could not be written for {most:g} minutes (max_unsaved_minutes)"
        raise CheckpointError(f"{self.folder}: {problem} {reason}", code="nothing-saved")
