"""The training loop: a run made of updates, evaluations and checkpoints."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retina import distributed
from retina.data.coco import Annotations
from retina.data.loader import BatchLoader
from retina.data.sampler import DetectionBatchSampler
from retina.engine.checkpoint import Progress
from retina.engine.checkpointer import Keeper
from retina.engine.config import TrainConfig, to_steps
from retina.engine.logging import RunLogger
from retina.engine.meter import LAG, Lagged, Meter
from retina.engine.optim import ExponentialMovingAverage, Schedule, set_learning_rate
from retina.engine.step import DTYPES, StepResult, parallel, train_step
from retina.errors import RetinaError
from retina.evaluation.evaluate import Evaluation
from retina.evaluation.metrics import DetectionArrays
from retina.losses.detection import DetectionLoss
from retina.losses.diagnose import Diagnosis, prior_is_lost, summarize, with_diagnosis
from retina.model.weights import DetectorCard
from retina.types import Batch, Criterion, to_device
from retina.visualize import batch_pictures, grid


class _Update(NamedTuple):
    """What is needed to say why one was not made."""

    step: int
    lr: float
    indices: list[Tensor]
    result: StepResult


def fit(
    folder: Path,
    config: TrainConfig,
    *,
    model: nn.Module,
    criterion: Criterion,
    optimizer: Optimizer,
    schedule: Schedule,
    loader: BatchLoader,
    sampler: DetectionBatchSampler,
    evaluate: Callable[..., Evaluation | None],
    draw: Callable[[DetectionArrays], np.ndarray],
    card: DetectorCard,
    logger: RunLogger,
    device: torch.device,
    annotations: Annotations,
    allow_data_change: bool = False,
    stopping: Callable[[], int] = lambda: 0,
) -> tuple[Progress, int]:
    """Trains until `config.length`, resuming from the newest valid checkpoint in `folder`.

    evaluate: scores a model on all ranks; called with `stopping`, and None when it was told to stop.
    draw: a picture of some of its detections.
    card: goes into `best.safetensors`, which is written whenever the best metric improves, and at the end of a run
        without evaluations.
    annotations: what is trained on. Resuming on others is refused, unless `allow_data_change`.
    stopping: the number of the signal that asks to stop, or 0. When any rank says so, all finish their step and save.

    Returns where the run stands and the signal that stopped it, 0 if it is finished. Raises ConfigError when the
    settings contradict the data or the checkpoint, RetinaError when data, numbers or the disk fail for good; what was
    learned until then is saved first."""
    per_epoch = sampler.steps_per_epoch
    total = to_steps(config.length, steps_per_epoch=per_epoch, total=None, key="train.length")
    every = {"steps_per_epoch": per_epoch, "total": total}
    save_every = to_steps(config.save_every, key="train.save_every", **every)
    eval_every = to_steps(config.eval_every, key="train.eval_every", **every) if config.eval_every else None

    ema = ExponentialMovingAverage(model, config.ema) if config.ema is not None else None
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    meter = Meter(config.batch_size)
    keeper = Keeper(
        folder,
        keep=config.keep_checkpoints,
        model=model,
        optimizer=optimizer,
        ema=ema,
        scaler=scaler,
        meter=meter,
        card=card,
        logger=logger,
    )
    due = partial(_evaluation_due, every=eval_every, total=total)
    progress = keeper.restore(annotations.fingerprint(), allow_data_change=allow_data_change)
    logger.resume(progress.step, pending_evaluation=due(progress))
    logger.progress(progress.step, total)
    meter.load_state(progress.meter, device)
    if config.compile:
        for one in {model, keeper.best_model}:
            one.compile()
    net = parallel(model, device)
    model.train()
    progress.stopped_early = config.patience is not None and progress.evaluations_without_gain >= config.patience
    saved = (progress.step, progress.evaluated)
    batches = _endless(loader, sampler, progress.step)
    diagnosed, diagnosis = criterion, None
    if isinstance(criterion, DetectionLoss):
        diagnosed, diagnosis = with_diagnosis(criterion, prior=card.model.get("prior", 0.01))
    updates: Lagged[_Update] = Lagged(LAG.get(device.type, 0))
    judge = partial(_judge, config, progress, scaler=scaler, logger=logger, annotations=annotations)
    stop = 0
    ending: BaseException | None = None
    with distributed.losing_touch(lambda: f"step {progress.step}"):
        while True:
            # what follows an update comes first, so that a run stopped between the two makes up for it
            step = progress.step
            if not ending and due(progress):
                try:
                    with meter.paused():
                        stop = _evaluate(config, progress, keeper, evaluate, stopping, draw, logger)
                except (RetinaError, SystemExit) as fault:
                    ending = fault
            last = step == total or progress.stopped_early
            wanted = step % save_every == 0 or ("checkpoint" in keeper.missing and step % config.log_every == 0)
            wanted = wanted and progress.bad_steps == 0  # diverging weights must not push out the last good ones
            if (wanted or last or stop or ending) and saved != (step, progress.evaluated):
                with meter.paused():
                    keeper.save(progress)
                saved = (step, progress.evaluated)
            if last or stop or ending:
                break

            # the random state is a function of seed, step and rank: resume needs nothing stored
            torch.manual_seed(((config.seed * 1_000_003 + step) * 4099 + distributed.rank()) % 2**63)
            try:
                with meter.waiting():
                    micro_batches = [to_device(next(batches), device) for _ in range(config.accumulate)]
            except RetinaError as fault:
                ending = fault
            stop, failed = distributed.agree(stop=stopping(), error=ending is not None)
            if stop or failed:
                ending = ending or (SystemExit(2) if failed else None)
                judge(updates.take(everything=True))
                continue
            lr = set_learning_rate(optimizer, schedule(step, **every))
            logging = (step + 1) % config.log_every == 0 or step + 1 == total
            told = logging or step == 0
            result = train_step(
                net,
                diagnosed if told else criterion,
                micro_batches,
                optimizer=optimizer,
                scaler=scaler,
                dtype=DTYPES[config.precision],
                clip_norm=config.clip_norm,
                watched=ema.floating if ema else (),
            )
            progress.step += 1
            logger.progress(progress.step, total)
            meter.add(result.updated, result.losses, result.positives, result.grad_norm)
            if ema is not None:
                ema.update(step)
            updates.add(result.updated, _Update(progress.step, lr, [one.indices for one in micro_batches], result))
            judge(updates.take(everything=logging or due(progress) or progress.step % save_every == 0))
            if (step == 0 or due(progress)) and config.pictures and logger.active:
                pictures = batch_pictures(micro_batches[0], card.classes, config.pictures)
                logger.picture(progress.step, "train/batch", grid(pictures))
            anatomy = _read_diagnosis(diagnosis, model, logger, first=step == 0) if told and diagnosis else {}
            if logging and (means := meter.read()):
                values: dict[str, Any] = {"epoch": progress.step / per_epoch, "lr": lr, **means, "diagnosis": anatomy}
                logger.scalars(progress.step, "train", values)
                logger.progress(progress.step, total, values)
                for line in loader.faults.values():
                    logger.once(f"skipped: {line}")
    if ending:
        raise ending
    if not stop and eval_every is None:
        keeper.save_best(progress.step, {})
    keeper.check()
    return progress, stop


def _read_diagnosis(diagnosis: Diagnosis, model: nn.Module, logger: RunLogger, *, first: bool) -> dict[str, float]:
    """What the classification loss of this update was made of, over all ranks; of the first one, with a warning if the
    head does not start from its prior. Waits for the device."""
    sums, diagnosis.sums = diagnosis.sums, None
    assert sums is not None
    strides: tuple[int, ...] = model.strides  # type: ignore[assignment]
    told = summarize(distributed.all_reduce_sum(sums).tolist(), [stride.bit_length() - 1 for stride in strides])
    if first and (warning := prior_is_lost(told, diagnosis.prior)):
        logger.info(f"warning: {warning}")
    return told


def _evaluation_due(progress: Progress, *, every: int | None, total: int) -> bool:
    """Whether the weights as they are now should be scored, and have not been."""
    at_one = every is not None and progress.step > 0 and (progress.step % every == 0 or progress.step == total)
    return at_one and progress.evaluated < progress.step


def _evaluate(
    config: TrainConfig,
    progress: Progress,
    keeper: Keeper,
    evaluate: Callable[..., Evaluation | None],
    stopping: Callable[[], int],
    draw: Callable[[DetectionArrays], np.ndarray],
    logger: RunLogger,
) -> int:
    """Scores the model, keeps it if it is the best so far, and decides whether the run has stopped gaining.

    Returns the signal that cut it short, with nothing decided, or 0."""
    started = time.perf_counter()
    evaluation = evaluate(keeper.best_model, stopping=stopping)
    if evaluation is None:
        return distributed.agree(stop=stopping()).stop
    seconds = time.perf_counter() - started
    value = evaluation.metrics[config.best_metric]
    better = value is not None and (progress.best is None or value > progress.best)
    if better:
        progress.best, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
    else:
        progress.evaluations_without_gain += 1
    if better or progress.best is None:
        keeper.save_best(progress.step, {k: v for k, v in evaluation.metrics.items() if k != "per_class"})
    progress.stopped_early = config.patience is not None and progress.evaluations_without_gain >= config.patience
    progress.evaluated = progress.step
    logger.evaluation(progress.step, evaluation.metrics, evaluation.losses, seconds, better=better)
    if config.pictures and logger.active:
        logger.picture(progress.step, "val/detections", draw(evaluation.detections))
    return 0


def _judge(
    config: TrainConfig,
    progress: Progress,
    updates: Iterable[tuple[bool, _Update]],
    *,
    scaler: torch.amp.GradScaler,
    logger: RunLogger,
    annotations: Annotations,
) -> None:
    """Counts the updates in a row that were not made, and warns of each. Raises RetinaError, on rank 0 alone, after too
    many."""
    for updated, update in updates:
        if updated:
            progress.bad_steps = 0
            continue
        if scaler.is_enabled() and scaler.get_scale() >= 1 and update.result.losses.isfinite().all():
            continue  # only the factor was too large for fp16, and is now halved
        progress.bad_steps += 1
        line = _describe_skipped(update, annotations)
        if progress.bad_steps < config.max_bad_steps:
            logger.info(f"warning: {line}")
            continue
        if not distributed.is_main():
            sys.exit(2)
        advice = "lower optimizer.lr, give train.clip_norm, or look at these images"
        raise RetinaError(f"{line} - {progress.bad_steps} in a row (train.max_bad_steps): {advice}")


def _describe_skipped(update: _Update, annotations: Annotations) -> str:
    """One line on an update that was not made: its numbers, and the images of the ranks that spoiled it."""
    step, lr, indices, result = update
    ranks = list(enumerate(distributed.gather_objects((result.own.tolist(), torch.cat(indices).tolist()))))
    guilty = [one for one in ranks if not all(map(math.isfinite, one[1][0]))] or ranks
    images = [f"{annotations.image_ids[i]} ({annotations.file_name(i)})" for _, (_, rows) in guilty for i in rows]
    more = f" and {len(images) - 16} more" if len(images) > 16 else ""
    return (
        f"step {step}: update skipped, for a number in it is not finite: loss class {result.losses[0]:.4g}, box "
        f"{result.losses[1]:.4g}, gradient norm {result.grad_norm:.4g}, lr {lr:.4g}, "
        f"rank {', '.join(str(rank) for rank, _ in guilty)}, image {', '.join(images[:16])}{more}"
    )


def _endless(loader: Iterable[Batch], sampler: DetectionBatchSampler, step: int) -> Iterator[Batch]:
    """Micro-batches from `step` on, epoch after epoch."""
    epoch, begin = divmod(step, sampler.steps_per_epoch)
    sampler.start(epoch, begin)
    while True:
        yield from loader
        epoch += 1
        sampler.set_epoch(epoch)
