"""The first and the last lines of a run: what will be trained, on what, and how; what came of it."""

from pathlib import Path

import numpy as np
import torch

from retina import distributed
from retina.data.annotations import Annotations
from retina.data.sampler import DetectionBatchSampler
from retina.engine.checkpointer import TrainState
from retina.engine.config import METRICS, to_steps
from retina.errors import CheckpointError
from retina.evaluation.metrics import DetectionArrays, Scoring, coco_metrics
from retina.evaluation.operating_points import describe
from retina.model.weights import read_card


def describe_run(
    folder: Path, state: TrainState, train: Annotations, val: Annotations, sampler: DetectionBatchSampler
) -> list[str]:
    """One line each for folder, device, data, classes, model, batch and learning rate."""
    config, world = state.config, distributed.world_size()
    counts = sorted(zip(train.class_counts().tolist(), train.classes, strict=True), reverse=True)
    shown = ", ".join(f"{name} {count}" for count, name in counts[:20])
    more = f", and {len(counts) - 20} more" if len(counts) > 20 else ""
    sizes = [(p.numel() / 1e6, p.requires_grad) for p in state.model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    parts = f"{world} process{'es' if world > 1 else ''} x {config.accumulate} x {sampler.micro_batch}"
    epoch = f"{sampler.steps_per_epoch} steps per epoch"
    if sampler.images_per_epoch != len(train):
        epoch += f" of {sampler.images_per_epoch} images"
    scale = config.batch_size / config.lr_batch_size
    lr = state.optimizer.param_groups[0]["initial_lr"]
    return [
        f"run      {folder}",
        f"device   {describe_device(state.device)}, {config.precision}" + (f", {world} processes" if world > 1 else ""),
        f"data     {len(train)} images with {train.num_objects} objects; to evaluate {len(val)} with {val.num_objects}",
        f"classes  {len(train.classes)}: {shown}{more}",
        f"model    {total:.1f} M parameters, {trained:.1f} M trained",
        f"batch    {config.batch_size} images ({parts}), {epoch}, {num_steps(state, sampler)} in all",
        f"lr       {lr:.3g} ({lr / scale:.3g} for {config.lr_batch_size} images x {scale:g})",
    ]


def too_low_rate(state: TrainState, sampler: DetectionBatchSampler) -> str:
    """A warning if the schedule never reaches the learning rate, as with a warm-up longer than the run; else empty."""
    steps = num_steps(state, sampler)
    some = range(0, steps, max(1, steps // 1000))
    peak = max(state.schedule(step, total=steps, steps_per_epoch=sampler.steps_per_epoch) for step in some)
    fix = f"give a schedule.warmup (or milestones) that fit {steps} steps, or a longer train.length"
    return f"the learning rate never gets beyond {peak:.0%} of that - {fix}" if peak < 0.99 else ""


def num_steps(state: TrainState, sampler: DetectionBatchSampler) -> int:
    return to_steps(state.config.length, steps_per_epoch=sampler.steps_per_epoch, total=None, key="length")


def undefined_metric(metric: str, val: Annotations, scoring: Scoring) -> str:
    """A warning if the metric that is to choose the best weights has no value on this data; else empty."""
    nothing = DetectionArrays(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    values = coco_metrics(val, nothing, scoring)
    if values[metric] is not None:
        return ""
    defined = next((name for name in METRICS if values.get(name) is not None), None)
    fix = f"give {defined}" if defined else "annotate some, or give train.eval_every=null"
    problem = (
        f"train.best_metric={metric} has no value: {val.file} has no objects that it counts, so no weights are best"
    )
    return f"{problem} and best.safetensors will hold the last - {fix}"


def describe_end(folder: Path, state: TrainState, stopped: int) -> list[str]:
    """What came of the run, and what to do next."""
    progress, metric, without = state.progress, state.config.best_metric, state.progress.evaluations_without_gain
    if stopped:
        return [f"told to stop: saved at step {progress.step}, the same command goes on from there"]
    lines, longer = [], "train.length"
    if progress.stopped_early:
        longer = "train.patience"
        lines.append(f"stopped early: {metric} has not risen in {without} evaluations (train.patience)")
    if progress.evaluated and progress.best is None:
        lines.append(f"warning: {metric} never had a value, so best.safetensors holds the last weights")
    # a run with a budget has no length that could be raised
    goes_on = "" if progress.total else f"the same command with a larger {longer} goes on from here; "
    since = f" and no better in {without} evaluations since" if without else ""
    best = "" if progress.best is None else f", best {metric} {progress.best:.3f} at step {progress.best_step}{since}"
    return [
        *lines,
        *describe_operating_point(folder / "best.safetensors"),
        f"finished at step {progress.step}{best}: {folder / 'best.safetensors'}",
        f"longer: {goes_on}name=NEW init_from={folder} begins anew",
        f"next: python tools/eval.py checkpoint={folder}   |   curves: {folder / 'curves.png'}",
    ]


def describe_operating_point(weights: Path) -> list[str]:
    """What the weights say of the score thresholds they are to be used at."""
    try:
        card = read_card(weights) if distributed.is_main() else None
    except CheckpointError:  # bare or missing weights: others tell
        return []
    return describe(card.operating_point, card.classes) if card and card.operating_point else []


def describe_device(device: torch.device) -> str:
    """`cuda:0 (NVIDIA H100)`, `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
