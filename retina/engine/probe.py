"""What a step costs here, before the first one is made: memory by arithmetic, time by trying. Beside the road."""

import copy
import ctypes
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retina import distributed
from retina.engine.config import TrainConfig
from retina.engine.optim import build_optimizer
from retina.engine.step import parallel, train_step
from retina.precision import chosen_precision
from retina.types import DTYPES, Batch, Criterion, to_device

WARM, LEAST, MOST = 2, 2, 10
"""Steps of a probe that do not count, because the device only gets going; and how many do."""

PART = 256
"""Pixels of a side of the part of a canvas that a rough measurement takes."""


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take: the GPU's; of a CPU its share among the processes of this machine, of
    what the system or its container has left. None where that is not known."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type != "cpu":
        return None
    shared = [free for free in (_machine_bytes(), group_bytes()) if free is not None]
    limits = [min(shared) // max(1, distributed.launched_number("LOCAL_WORLD_SIZE"))] if shared else []
    with suppress(ImportError, OSError, ValueError):  # what `ulimit -v` allows this process
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits += [most - used] if most != resource.RLIM_INFINITY else []
    return max(0, min(limits)) if limits else None


def _machine_bytes() -> int | None:
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return None


def group_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the control groups of this process leave it, of a container, a batch system or `systemd-run`; None without.

    Each limit on the way to the root counts. Pages of files count as free, because the kernel takes those first."""
    frees: list[int] = []
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if controllers == "":
            top, limit, usage, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, usage, prefix = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (place for place in (group, *group.parents) if place.is_relative_to(top)):
            with suppress(OSError, ValueError):  # not there: a container sees its own group as the root
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                pages = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
                frees.append(most - used + pages)
    return min(frees, default=None)


def keep_memory() -> None:
    """Lets this process keep what tensors of a CPU free, for the next ones, where the C library is glibc.

    It returns blocks above 32 MB to the system at once, whatever its thresholds, and each page of the next block is
    then faulted in again: 7 to 10 % of a training step. The process is not larger at its peak."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # noqa: N806  # malloc.h
    with suppress(OSError, AttributeError, TypeError):  # other systems have no such function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def step_bytes(model: Any, images: tuple[int, int, int], *, objects: int, precision: str) -> int:
    """Memory that an update with AdamW and a moving average takes beside the weights.

    images: count, height, width.
    `model` lies on the meta device: it is only counted what autograd would keep. In bfloat16 about 0.6 of that is kept
    (norms and losses stay float32). Head outputs are counted six times, as losses hold them; matching compares all
    anchors with `objects` per image. A fifth is added, because memory is never used to the last byte."""
    count, height, width = images
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no other gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        image = torch.empty(count, model.mean.numel(), height, width, dtype=torch.uint8, device="meta")
        predictions = model(image, torch.empty(count, 2, dtype=torch.int64, device="meta"))
    activations = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    outputs = [*predictions.logits, *(predictions.bins or predictions.deltas)]
    anchors = sum(level.shape[1] for level in predictions.logits)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    losses = 6 * sum(4 * output.numel() for output in outputs) + 8 * count * anchors * objects
    scale = 1.0 if precision in ("fp32", "tf32") else 0.6
    return int(1.2 * (scale * activations + losses + 4 * weights))


def seconds_per_step(
    model: nn.Module,
    criterion: Criterion,
    loader: Iterable[Batch],
    config: TrainConfig,
    make_optimizer: Callable[..., Optimizer],
    *,
    patience: float = 20.0,
) -> float:
    """Mean time of a step with its batches, the same on all ranks. It takes about `patience` seconds at most, but for
    slow steps. The model stays as it is: a copy is trained."""
    device = next(model.parameters()).device
    dtype = DTYPES[chosen_precision(config.precision, device)]
    twin = copy.deepcopy(model)
    optimizer, trained = build_optimizer(make_optimizer, twin), parallel(twin, device).train()
    batches = _without_end(loader)

    def seconds(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            micro_batches = [to_device(batch, device) for batch in islice(batches, config.accumulate)]
            options: dict[str, Any] = {"dtype": dtype, "clip_norm": config.clip_norm}
            train_step(trained, criterion, micro_batches, optimizer=optimizer, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return float(distributed.broadcast_object(time.perf_counter() - started))

    warm = seconds(WARM)
    steps = min(MOST, max(LEAST, int((patience - warm) / warm * WARM)))
    return seconds(steps) / steps


def seconds_per_pixel(model: Any, canvas: tuple[int, int], dtype: torch.dtype) -> float:
    """Of training on a CPU, roughly: a copy of the network goes forward and back once with a part of a canvas."""
    twin = copy.deepcopy(model).train()
    height, width = (min(side, PART) for side in canvas)
    image, sizes = (
        torch.full((1, model.mean.numel(), height, width), 128, dtype=torch.uint8),
        torch.tensor([[height, width]]),
    )

    def seconds() -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            predictions = twin(image, sizes)
        torch.stack([level.float().mean() for level in (*predictions.logits, *predictions.deltas)]).sum().backward()
        return time.perf_counter() - started

    return min(seconds() for _ in range(2)) / (height * width)


def _without_end(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from loader
