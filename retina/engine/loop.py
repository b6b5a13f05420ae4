"""The training loop: a run made of updates, evaluations and checkpoints."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from retina import distributed
from retina.data.annotations import Annotations
from retina.data.loader import BatchLoader
from retina.data.sampler import DetectionBatchSampler
from retina.engine.checkpoint import Progress
from retina.engine.checkpointer import Checkpointer, TrainState
from retina.engine.config import TrainConfig, to_steps
from retina.engine.deadline import Deadline
from retina.engine.logging import RunLogger
from retina.engine.meter import LAG, PendingFlags
from retina.engine.optim import set_learning_rate
from retina.engine.shortage import Shortage
from retina.engine.step import StepResult, parallel, train_step
from retina.errors import ConfigError, RetinaError, StoppedError
from retina.evaluation.evaluate import Evaluation
from retina.losses.detection import DetectionLoss
from retina.losses.diagnose import Diagnosis, prior_is_lost, summarize, with_diagnosis
from retina.precision import float32_as
from retina.types import Batch, Criterion, to_device
from retina.visualize import batch_pictures, grid


def fit(
    state: TrainState,
    criterion: Criterion,
    loader: Iterable[Batch],
    *,
    evaluate: Callable[[nn.Module], Evaluation] | None = None,
    checkpointer: Checkpointer | None = None,
    recorder: RunLogger | None = None,
    annotations: Annotations | None = None,
    stopping: Callable[[], int] = lambda: 0,
    deadline: Deadline | None = None,
) -> int:
    """Trains `state.model` until `config.length`, from where the newest valid checkpoint stands.

    evaluate: scores a model on all ranks, or raises StoppedError if `stopping` cut it short.
    checkpointer: without one, nothing is saved.
    annotations: the training data. Messages and pictures name its files and classes.
    stopping: the number of the signal that asks to stop, or 0. If any rank is asked, all finish their step and save.
    deadline: decides the length anew at every checkpoint.

    Returns the signal that stopped the run, 0 if it is finished; `state.progress` says where it stands. Raises
    ConfigError when settings contradict the data or the checkpoint, RetinaError when data, numbers or the disk fail
    for good; what was learned until then is saved first."""
    config, recorder, checkpointer = state.config, recorder or RunLogger(), checkpointer or Checkpointer(None, state)
    plan = _plan(config, loader, evaluates=evaluate is not None)
    progress = checkpointer.restore(annotations.fingerprint() if annotations else "")
    if deadline:
        plan = plan._replace(total=deadline.begin(progress, plan.total), spare=(plan.eval_every or 0) // 2)
        evaluate = deadline.timed(evaluate) if evaluate else None
    plan.refuse_beyond(progress.step)
    recorder.resume(progress.step, pending_evaluation=plan.evaluation_due(progress))
    for module in {state.model, state.weights} if config.compile else ():
        module.compile()
    model = parallel(state.model, state.device).train()
    report = _Report(state, plan, recorder, annotations, loader, criterion)
    if isinstance(loader, BatchLoader):
        loader.stopping = stopping
    batches = _endless(loader, progress.step, plan.steps_per_epoch, config.accumulate)
    stop = 0
    ending: BaseException | None = None
    with distributed.naming_lost_process(lambda: f"step {progress.step}"), float32_as(state.precision):
        while True:
            # what follows an update comes first, so that a run stopped between the two makes up for it
            step = progress.step
            if evaluate and not ending and plan.evaluation_due(progress):
                try:
                    stop = _evaluate(state, evaluate, checkpointer, recorder)
                except (RetinaError, SystemExit) as fault:
                    ending = fault
            progress.stopped_early = progress.evaluations_without_gain >= (config.patience or math.inf)
            ends = step == plan.total or progress.stopped_early or stop or ending
            if ends or plan.save_due(progress, retry="checkpoint" in checkpointer.missing):
                if deadline:
                    plan = report.plan = plan._replace(total=deadline.corrected(progress, plan.eval_every, bool(ends)))
                checkpointer.save()
            elif plan.logs(step):
                checkpointer.write_owed()
            if ends:
                break
            # the random state is a function of seed, step and rank: resume needs nothing stored
            torch.manual_seed(((config.seed * 1_000_003 + step) * 4099 + distributed.rank()) % 2**63)
            try:
                with state.meter.waiting():
                    micro_batches = [to_device(next(batches), state.device) for _ in range(config.accumulate)]
            except StoppedError as stopped:  # while the loader waited for its workers
                stop = stopped.signal
            except RetinaError as fault:
                ending = fault
            stop, failed = distributed.agree(stop=stop or stopping(), error=ending is not None)
            if stop or failed:
                ending = ending or (SystemExit(2) if failed else None)
                report.skipped_updates(everything=True)
                continue
            _make_update(state, plan, model, report, micro_batches)
    if ending:
        raise ending
    if not stop and plan.eval_every is None:
        checkpointer.save_best({})
    checkpointer.check(finished=not stop)
    return stop


def _make_update(
    state: TrainState, plan: "_Plan", model: nn.Module, report: "_Report", micro_batches: list[Batch]
) -> None:
    step, config = state.progress.step, state.config
    factor = state.schedule(step, total=plan.total, steps_per_epoch=plan.steps_per_epoch)
    lr = set_learning_rate(state.optimizer, factor)
    make = partial(
        train_step,
        model,
        report.criterion(step),
        optimizer=state.optimizer,
        scaler=state.scaler,
        dtype=state.dtype,
        clip_norm=config.clip_norm,
        averages=state.ema.floating if state.ema else (),
    )
    result = report.shortage.update(make, micro_batches, step + 1)
    state.progress.step += 1
    state.learned = True
    if state.ema is not None:
        state.ema.update(step)
    report.update(lr, micro_batches, result)


class _Plan(NamedTuple):
    """How long the run is, and when what is due, in optimizer steps."""

    config: TrainConfig
    steps_per_epoch: int
    total: int
    save_every: int
    eval_every: int | None
    spare: int = 0  # steps before the end in which only the end is evaluated

    def refuse_beyond(self, step: int) -> None:
        """Raises ConfigError for a checkpoint from which this run could never end."""
        if step > self.total:
            problem = f"{self.total} steps in all, but the checkpoint stands at step {step}"
            raise ConfigError(f"{problem} - train longer, or begin another run", code="beyond-the-end", key="length")

    def logs(self, step: int) -> bool:
        """Whether the update that leads to `step` is logged."""
        return step % self.config.log_every == 0 or step == self.total

    def evaluation_due(self, progress: Progress) -> bool:
        """Whether the weights should be scored at this step, and have not been."""
        step, every = progress.step, self.eval_every
        due = every is not None and (step == self.total or (step % every == 0 and step <= self.total - self.spare))
        return due and progress.evaluated < step

    def save_due(self, progress: Progress, *, retry: bool) -> bool:
        """Whether a checkpoint should be saved at this step. `retry`: the last one could not be written.

        Not while updates are skipped: diverging weights must not push out the last good ones."""
        due = progress.step % self.save_every == 0 or (retry and progress.step % self.config.log_every == 0)
        return due and progress.bad_steps == 0


def _plan(config: TrainConfig, loader: Any, *, evaluates: bool) -> _Plan:
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, DetectionBatchSampler):
        per_epoch = sampler.steps_per_epoch
    else:
        per_epoch = max(1, len(loader) // config.accumulate)
    total = to_steps(config.length, steps_per_epoch=per_epoch, total=None, key="length")
    every = partial(to_steps, steps_per_epoch=per_epoch, total=total)
    eval_every = every(config.eval_every, key="eval_every") if config.eval_every is not None and evaluates else None
    return _Plan(config, per_epoch, total, every(config.save_every, key="save_every"), eval_every)


def _endless(loader: Any, step: int, steps_per_epoch: int, accumulate: int) -> Iterator[Batch]:
    """Micro-batches from `step` on, epoch after epoch.

    Our sampler begins anywhere in an epoch. Of another loader, what was seen of the epoch is loaded again, and an
    incomplete last step is left out."""
    first_epoch, begin = divmod(step, steps_per_epoch)
    batch_sampler, sampler = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    for epoch in count(first_epoch):
        if isinstance(batch_sampler, DetectionBatchSampler):
            batch_sampler.start(epoch, begin)
            yield from loader
        else:
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            yield from islice(loader, begin * accumulate, steps_per_epoch * accumulate)
        begin = 0


def _evaluate(
    state: TrainState,
    evaluate: Callable[[nn.Module], Evaluation],
    checkpointer: Checkpointer,
    recorder: RunLogger,
) -> int:
    """Scores the weights, and saves them if they are the best so far.

    Returns the signal that cut it short, with nothing decided, or 0."""
    progress, started = state.progress, time.perf_counter()
    with state.meter.paused():
        try:
            evaluation = evaluate(state.weights)
        except StoppedError as stopped:
            return stopped.signal
        seconds = time.perf_counter() - started
        value = evaluation.metrics[state.config.best_metric]
        better = value is not None and (progress.best is None or value > progress.best)
        if better:
            progress.best, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
        else:
            progress.evaluations_without_gain += 1
        if better or progress.best is None:
            checkpointer.save_best({k: v for k, v in evaluation.metrics.items() if k != "per_class"})
        progress.evaluated = progress.step
        recorder.evaluation(progress.step, evaluation.metrics, evaluation.losses, seconds, better=better)
    return 0


class _Update(NamedTuple):
    """What a message about an update that was skipped needs."""

    step: int
    lr: float
    indices: Tensor
    result: StepResult


class _Report:
    """Tells the recorder about updates: means, pictures, what the loss is made of, and updates that were skipped."""

    def __init__(
        self,
        state: TrainState,
        plan: _Plan,
        recorder: RunLogger,
        annotations: Annotations | None,
        loader: Any,
        criterion: Criterion,
    ) -> None:
        self.state, self.plan, self.recorder, self.annotations, self.loader = state, plan, recorder, annotations, loader
        recorder.progress(state.progress.step, plan.total)
        halves, accumulate = state.config.halve_when_full, state.config.accumulate
        self.shortage = Shortage(accumulate, halves=halves, warn=recorder.warn)
        self._pending: PendingFlags[_Update] = PendingFlags(LAG.get(state.device.type, 0))
        self._criterion = criterion
        self._diagnosis: Diagnosis | None = None
        self._prior = getattr(state.model, "arguments", {}).get("prior")

    def criterion(self, step: int) -> Criterion:
        """The criterion for the update with this 0-based number; where it is logged, one that is diagnosed."""
        criterion, self._diagnosis = self._criterion, None
        if isinstance(criterion, DetectionLoss):
            criterion = criterion.at(step / self.plan.total)
            if self._prior is not None and (step == 0 or self.plan.logs(step + 1)):
                criterion, self._diagnosis = with_diagnosis(criterion, prior=self._prior)
        return criterion

    def update(self, lr: float, micro_batches: list[Batch], result: StepResult) -> None:
        """Takes in the update that has just been made."""
        step, config, recorder = self.state.progress.step, self.state.config, self.recorder
        num_images = distributed.world_size() * sum(len(batch.images) for batch in micro_batches)
        recorder.progress(step, self.plan.total)
        self.state.meter.add(result, num_images)
        indices = torch.cat([batch.indices for batch in micro_batches])
        self._pending.add(result.updated, _Update(step, lr, indices, result))
        logs, evaluation_due = self.plan.logs(step), self.plan.evaluation_due(self.state.progress)
        self.skipped_updates(everything=logs or evaluation_due or step % self.plan.save_every == 0)
        if (step == 1 or evaluation_due) and config.pictures and recorder.active and self.annotations:
            pictures = batch_pictures(micro_batches[0], self.annotations.classes, config.pictures)
            recorder.picture(step, "train/batch", grid(pictures))
        diagnosis = self._read_diagnosis(self._diagnosis, first=step == 1) if self._diagnosis else {}
        if logs and (means := self.state.meter.read()):
            values: dict[str, Any] = {"epoch": step / self.plan.steps_per_epoch, "lr": lr} | means
            recorder.scalars(step, "train", values | {"diagnosis": diagnosis})
            recorder.progress(step, self.plan.total, values)
            for fault in getattr(self.loader, "faults", {}).values():
                recorder.once(f"skipped: {fault}")

    def _read_diagnosis(self, diagnosis: Diagnosis, *, first: bool) -> dict[str, float]:
        """What the classification loss of this update was made of, over all ranks; nothing of an update that was not
        diagnosed. Of the first one, also a warning if the head does not start from its prior. Waits for the device."""
        sums, diagnosis.sums = diagnosis.sums, None
        if sums is None:
            return {}
        levels = [int(stride).bit_length() - 1 for stride in self.state.model.strides]  # type: ignore[union-attr]
        shares = summarize(distributed.all_reduce_sum(sums).tolist(), levels)
        if first and (warning := prior_is_lost(shares, diagnosis.prior)):
            self.recorder.warn(warning)
        return shares

    def skipped_updates(self, *, everything: bool = False) -> None:
        """Counts the updates in a row that were skipped, and warns of each. Raises RetinaError, on rank 0 alone, after
        too many."""
        scaler, progress, most = self.state.scaler, self.state.progress, self.state.config.max_bad_steps
        for updated, update in self._pending.take(everything=everything):
            if updated:
                progress.bad_steps = 0
                continue
            if scaler.is_enabled() and scaler.get_scale() >= 1 and update.result.losses.isfinite().all():
                continue  # only the scale was too large for fp16, and is now halved
            progress.bad_steps += 1
            line = _describe_skipped(update, self.annotations)
            if progress.bad_steps < most:
                self.recorder.warn(line)
                continue
            if not distributed.is_main():
                sys.exit(2)
            fix = "lower the learning rate, give clip_norm, or look at these images"
            raise RetinaError(f"{line} - {progress.bad_steps} in a row (max_bad_steps): {fix}", code="diverged")


def _describe_skipped(update: _Update, annotations: Annotations | None) -> str:
    """One line on a skipped update: its numbers, and the images of the ranks whose loss was not finite."""
    step, lr, indices, result = update
    ranks = list(enumerate(distributed.gather_objects((result.rank_sums.tolist(), indices.tolist()))))
    guilty = [(rank, rows) for rank, (sums, rows) in ranks if not all(map(math.isfinite, sums))]
    guilty = guilty or [(rank, rows) for rank, (_, rows) in ranks]
    rows = [row for _, rows_of_rank in guilty for row in rows_of_rank]
    images = [
        f"{annotations.image_ids[row]} ({annotations.file_name(row)})" if annotations else f"number {row}"
        for row in rows[:16]
    ]
    more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
    return (
        f"step {step}: update skipped because a number in it is not finite: loss class {result.losses[0]:.4g}, box "
        f"{result.losses[1]:.4g}, gradient norm {result.grad_norm:.4g}, lr {lr:.4g}, "
        f"rank {', '.join(str(rank) for rank, _ in guilty)}, image {', '.join(images)}{more}"
    )
