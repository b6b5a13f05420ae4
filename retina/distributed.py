"""Processes of one run: who am I, add up, gather. Every function is a no-op on a single process.

`torchrun` starts the processes and sets RANK, WORLD_SIZE and LOCAL_RANK; nothing else is read from the environment.
"""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA (this process's own GPU under torchrun), else Apple's MPS, else the CPU.

    Raises ValueError for a device this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            name = "cpu"  # no collectives on MPS
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} does not exist - use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available here - use device=cpu or device=auto")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def process_group(device: torch.device, *, timeout_minutes: float = 30) -> Iterator[None]:
    """Joins the processes that torchrun started, by NCCL for CUDA, else gloo; leaves the group however the block ends.

    `timeout_minutes` is long enough for rank 0 to score a large validation set while the others wait."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns its argument."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(obj: T) -> T:
    """Rank 0's object on every rank. Small objects only: it is pickled between the run's own processes."""
    if world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(obj: T) -> list[T]:
    """One entry per rank, on every rank, in rank order."""
    if world_size() == 1:
        return [obj]
    out: list[T] = [obj] * world_size()
    dist.all_gather_object(out, obj)
    return out


def average_buffers(model: nn.Module) -> None:
    """Mean over ranks of floating-point buffers (BatchNorm's running statistics), in one message.

    Each rank sees its own images, so its statistics drift from the others'; evaluation needs one truth."""
    if world_size() == 1:
        return
    buffers = [b for name, b in model.named_buffers() if b.is_floating_point() and name.rpartition(".")[2] in _RUNNING]
    if not buffers:
        return
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    flat /= world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


_RUNNING = frozenset({"running_mean", "running_var"})
