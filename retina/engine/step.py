"""One update of the weights, on one process or many."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from retina import distributed
from retina.engine.optim import norm_and_divisor, step_where
from retina.types import Batch, Criterion


class StepResult(NamedTuple):
    """Numbers of one update over all ranks and micro-batches, still on the device."""

    losses: Float[Tensor, "2"]
    """Classification and box loss per positive anchor."""
    positives: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    """Norm of the whole gradient before clipping."""
    rank_sums: Float[Tensor, "3"]
    """Sums of this rank alone: classification loss, box loss, positives."""
    updated: Bool[Tensor, ""]
    """False if a number was not finite: then weights, optimizer and running statistics are as before."""


def train_step(
    model: nn.Module,
    criterion: Criterion,
    micro_batches: Sequence[Batch],
    *,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    dtype: torch.dtype = torch.float32,
    clip_norm: float | None = None,
    averages: Sequence[Tensor] = (),
) -> StepResult:
    """One optimizer update, or none on any rank if a loss, a gradient, a target box or one of the `averages` (those of
    the weights, say) is NaN or infinite on some rank.

    Losses are divided by the positive anchors of all micro-batches of all ranks. Their number is known only at the
    end, so gradients of sums are accumulated and scaled once. Without positives the divisor is 1. BatchNorm's running
    statistics are averaged over ranks. With a fused optimizer nothing waits for the device, from the second update on.

    Args:
        model: several processes need what `parallel` returns.
        micro_batches: this rank's, on the device of the model.
        scaler: keeps fp16 gradients in range; only `dtype=torch.float16` needs one.
        clip_norm: largest norm of the whole gradient; None does not clip."""
    device = micro_batches[0].images.device
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    statistics = distributed.running_statistics(model)
    before = distributed.flatten(statistics)
    sums = torch.zeros(3, device=device)
    # keeps fp16 gradients in range until the true divisor is known; others need none, and by 1 nothing is scaled
    scale = len(micro_batches[0].images) if scaler.is_enabled() else 1
    for i, batch in enumerate(micro_batches):
        waits = isinstance(model, DistributedDataParallel) and i + 1 < len(micro_batches)
        with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = criterion(model(batch.images, batch.sizes), batch.targets)
            scaler.scale((losses.classification + losses.box) / scale).backward()
        sums += torch.stack(losses).detach() + 0 * batch.targets.boxes.sum()  # 0 * inf is NaN: all ranks will know
    rank_sums = sums.clone()
    if averages:
        sums += 0 * torch.nn.utils.get_total_norm(averages)
    distributed.all_reduce_sum(sums)
    positives = sums[2].clamp(min=1)
    scaler.unscale_(optimizer)
    # DDP takes means over ranks
    norm, divisor = norm_and_divisor(model.parameters(), positives / (scale * distributed.world_size()), clip_norm)
    updated = (sums.sum() + norm).isfinite()
    step_where(optimizer, updated, divisor)
    if statistics:
        distributed.average_into(statistics, torch.where(updated, distributed.flatten(statistics), before))
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(sums[:2] / positives, sums[2], norm, rank_sums, updated)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it trains together with those of the other processes; itself where there are none."""
    if distributed.world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.15
    buffers: dict[str, Any] = {name: False}  # running statistics are averaged after each update instead
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **buffers,
    )
