"""The training loop: one update, and the run made of updates, evaluations and checkpoints."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from retina import distributed
from retina.data.loader import BatchLoader
from retina.data.sampler import DetectionBatchSampler
from retina.engine.checkpoint import Progress, load_checkpoint, newest_valid, save_checkpoint
from retina.engine.config import TrainConfig, to_steps
from retina.engine.ema import ExponentialMovingAverage
from retina.engine.logging import RunLogger
from retina.engine.meter import Meter
from retina.engine.optim import Schedule, scale_and_clip, set_learning_rate
from retina.errors import CheckpointError, ConfigError
from retina.evaluation.evaluate import Criterion, Evaluation
from retina.evaluation.metrics import DetectionArrays
from retina.model.weights import DetectorCard, save_detector
from retina.types import Batch, to_device
from retina.visualize import batch_pictures, grid

BEST = "best.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """Numbers of one update over all ranks and micro-batches, still on the device."""

    losses: Float[Tensor, "2"]
    """Classification and box loss per positive anchor."""
    positives: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    """Norm of the whole gradient before clipping."""


def train_step(
    model: nn.Module,
    criterion: Criterion,
    micro_batches: Sequence[Batch],
    *,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    clip_norm: float | None,
) -> StepResult:
    """One optimizer update.

    Losses are divided by the positive anchors of all micro-batches of all ranks. Their number is known only at the
    end, so gradients of sums are accumulated and scaled once. Without positives the divisor is 1."""
    device = micro_batches[0].images.device
    sums = torch.zeros(3, device=device)
    for i, batch in enumerate(micro_batches):
        waits = isinstance(model, DistributedDataParallel) and i + 1 < len(micro_batches)
        with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = criterion(model(batch.images), batch.targets)
            # a constant divisor keeps fp16 gradients in range; the true one replaces it below
            scaler.scale((losses.classification + losses.box) / len(batch.images)).backward()
        sums += torch.stack(losses).detach()
    distributed.all_reduce_sum(sums)
    positives = sums[2].clamp(min=1)
    scaler.unscale_(optimizer)
    factor = len(micro_batches[0].images) * distributed.world_size() / positives  # DDP takes means over ranks
    norm = scale_and_clip(model.parameters(), factor, clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(sums[:2] / positives, sums[2], norm)


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
    evaluate: Callable[[nn.Module], Evaluation],
    draw: Callable[[DetectionArrays], np.ndarray],
    card: DetectorCard,
    logger: RunLogger,
    device: torch.device,
    fingerprint: str,
) -> Progress:
    """Trains until `config.length`, resuming from the newest valid checkpoint in `folder`.

    evaluate: scores a model on all ranks.
    draw: a picture of some of its detections.
    card: goes into `best.safetensors`, which is written whenever the best metric improves, and at the end of a run
        without evaluations.
    fingerprint: of the training annotations.

    Raises ConfigError when the settings contradict the data or the checkpoint."""
    per_epoch = sampler.steps_per_epoch
    total = to_steps(config.length, steps_per_epoch=per_epoch, total=None, key="train.length")
    every = {"steps_per_epoch": per_epoch, "total": total}
    save_every = to_steps(config.save_every, key="train.save_every", **every)
    eval_every = to_steps(config.eval_every, key="train.eval_every", **every) if config.eval_every else None

    ema = ExponentialMovingAverage(model, config.ema) if config.ema is not None else None
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    progress = _resume(folder, model, optimizer, ema, scaler, logger, fingerprint)
    if config.compile:
        model.compile()
    net = _parallel(model, device)
    model.train()
    progress.stopped_early = config.patience is not None and progress.evaluations_without_gain >= config.patience
    meter = Meter(config.batch_size)
    meter.load_state(progress.meter, device)
    batches = _endless(loader, sampler, progress.step)
    while progress.step < total and not progress.stopped_early:
        step = progress.step
        # the random state is a function of seed, step and rank: resume needs nothing stored
        torch.manual_seed(((config.seed * 1_000_003 + step) * 4099 + distributed.rank()) % 2**63)
        with meter.waiting():
            micro_batches = [to_device(next(batches), device) for _ in range(config.accumulate)]
        lr = set_learning_rate(optimizer, schedule(step, **every))
        result = train_step(
            net,
            criterion,
            micro_batches,
            optimizer=optimizer,
            scaler=scaler,
            dtype=DTYPES[config.precision],
            clip_norm=config.clip_norm,
        )
        distributed.average_buffers(model)
        if ema is not None:
            ema.update(model, step)
        progress.step += 1
        meter.add(result.losses, result.positives, result.grad_norm)

        last = progress.step == total
        evaluates = eval_every and (progress.step % eval_every == 0 or last)
        if (step == 0 or evaluates) and config.pictures and logger.active:
            pictures = batch_pictures(micro_batches[0], card.classes, config.pictures)
            logger.picture(progress.step, "train/batch", grid(pictures))
        if progress.step % config.log_every == 0 or last:
            values = {"epoch": progress.step / per_epoch, "lr": lr, **meter.read()}
            logger.scalars(progress.step, "train", values)
            left = (total - progress.step) * config.batch_size / values["images_per_second"]
            logger.progress(progress.step, total, values, left)
        if evaluates:
            with meter.paused():
                _evaluate(folder, config, progress, ema.model if ema else model, evaluate, draw, card, logger)
        if progress.step % save_every == 0 or last or progress.stopped_early:
            with meter.paused():
                progress.scaler, progress.meter = scaler.state_dict(), meter.state()
                if distributed.is_main():
                    save_checkpoint(
                        folder / "checkpoints",
                        progress,
                        model=model,
                        optimizer=optimizer,
                        ema=ema,
                        keep=config.keep_checkpoints,
                    )
    if not eval_every and distributed.is_main():
        save_detector(folder / BEST, (ema.model if ema else model).state_dict(), replace(card, step=progress.step))
    return progress


def _evaluate(
    folder: Path,
    config: TrainConfig,
    progress: Progress,
    model: nn.Module,
    evaluate: Callable[[nn.Module], Evaluation],
    draw: Callable[[DetectionArrays], np.ndarray],
    card: DetectorCard,
    logger: RunLogger,
) -> None:
    """Scores the model, keeps it if it is the best so far, and decides whether the run has stopped gaining."""
    started = time.perf_counter()
    evaluation = evaluate(model)
    seconds = time.perf_counter() - started
    value = evaluation.metrics[config.best_metric]
    better = value is not None and (progress.best is None or value > progress.best)
    if better:
        progress.best, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
    else:
        progress.evaluations_without_gain += 1
    if (better or progress.best is None) and distributed.is_main():
        numbers = {key: number for key, number in evaluation.metrics.items() if key != "per_class"}
        save_detector(folder / BEST, model.state_dict(), replace(card, step=progress.step, metrics=numbers))
    if config.patience is not None and progress.evaluations_without_gain >= config.patience:
        progress.stopped_early = True
    logger.evaluation(progress.step, evaluation.metrics, evaluation.losses, seconds, better=better)
    if config.pictures and logger.active:
        logger.picture(progress.step, "val/detections", draw(evaluation.detections))


def _resume(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    ema: ExponentialMovingAverage | None,
    scaler: torch.amp.GradScaler,
    logger: RunLogger,
    fingerprint: str,
) -> Progress:
    # rank 0 chooses: with folders on a network disk, ranks might see different checkpoints
    checkpoint, faults = distributed.broadcast_object(
        newest_valid(folder / "checkpoints") if distributed.is_main() else (None, [])
    )
    for fault in faults:
        logger.info(f"warning: {fault}")
    if checkpoint is None and faults:
        raise CheckpointError(f"{folder / 'checkpoints'}: no checkpoint is whole - restore one, or give overwrite=true")
    if checkpoint is None:
        logger.resume(0)
        return Progress(annotations=fingerprint)
    progress = load_checkpoint(checkpoint, model=model, optimizer=optimizer, ema=ema)
    if progress.annotations != fingerprint:
        raise ConfigError(
            f"{checkpoint}: was trained on other annotations than data.train now has - restore them, "
            "or choose another name=..."
        )
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    logger.resume(progress.step)
    return progress


def _parallel(model: nn.Module, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,  # running statistics are averaged after each update instead
        gradient_as_bucket_view=True,
    )


def _endless(loader: Iterable[Batch], sampler: DetectionBatchSampler, step: int) -> Iterator[Batch]:
    """Micro-batches from `step` on, epoch after epoch."""
    epoch, begin = divmod(step, sampler.steps_per_epoch)
    sampler.start(epoch, begin)
    while True:
        yield from loader
        epoch += 1
        sampler.set_epoch(epoch)
