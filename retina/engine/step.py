"""One update of the weights, on one process or many."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from retina import distributed
from retina.engine.optim import norm_and_divisor, step_where
from retina.types import Batch, Criterion, Losses


class StepResult(NamedTuple):
    """Numbers of one update over all ranks and micro-batches, still on the device."""

    losses: Float[Tensor, "2"]
    """Classification and box loss, each over its divisor (`Losses`)."""
    positives: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    """Norm of the whole gradient before clipping."""
    rank_sums: Float[Tensor, "3"]
    """Sums of this rank alone: classification loss, box loss, both as if to be divided by the positives; positives."""
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
    end, so gradients of sums are accumulated and scaled once. Where the box loss has a divisor of its own, the ratio of
    both must be known before the first gradient: the other micro-batches then go through the network twice, the first
    time without gradients. Divisors are at least 1. BatchNorm's running
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
    box_factor: Tensor | None = None

    def compute(network: nn.Module, batch: Batch) -> Losses:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return criterion(network(batch.images, batch.sizes), batch.targets)

    for i, batch in enumerate(micro_batches):
        waits = isinstance(model, DistributedDataParallel) and i + 1 < len(micro_batches)
        with _undone(optimizer, statistics, before), model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            losses = compute(model, batch)
            if i == 0 and losses.box_normalizer is not None:
                network = model.module if isinstance(model, DistributedDataParallel) else model
                with _without_trace(network, device):
                    others = [compute(network, other) for other in micro_batches[1:]]
                box_factor = _box_factor([losses, *others])
            box = losses.box if box_factor is None else losses.box * box_factor
            scaler.scale((losses.classification + box) / scale).backward()
        sums += torch.stack([losses.classification, box, losses.num_positives]).detach()
        sums += 0 * batch.targets.boxes.sum()  # 0 * inf is NaN: all ranks will know
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


@contextmanager
def _undone(optimizer: Optimizer, statistics: Sequence[Tensor], before: Tensor) -> Iterator[None]:
    """Where memory does not suffice within the block, nothing has happened: another attempt may take less."""
    try:
        yield
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        distributed.write_into(statistics, before)
        raise


@contextmanager
def _without_trace(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block nothing has gradients, and the network changes neither random numbers nor running statistics:
    not even to put them back, because a gradient that is still to come has saved them."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


@torch.no_grad()
def _box_factor(losses: Sequence[Losses]) -> Float[Tensor, ""]:
    """The divisor of the classification loss over that of the box loss, of these micro-batches of all ranks."""
    pairs = [torch.stack([one.num_positives, one.box_normalizer]) for one in losses]  # type: ignore[list-item]
    # NaN on one rank must not make the losses of the others NaN: they tell whose images are at fault
    positives, box_normalizer = distributed.all_reduce_sum(torch.stack(pairs).sum(dim=0)).nan_to_num().clamp(min=1)
    return positives / box_normalizer


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
