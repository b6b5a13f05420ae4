"""The first lines of a run: what will be trained on what."""

from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from retina import distributed
from retina.data.coco import Annotations
from retina.data.sampler import DetectionBatchSampler
from retina.engine.config import TrainConfig, to_steps
from retina.engine.optim import Schedule


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
