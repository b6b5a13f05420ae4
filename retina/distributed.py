"""Processes of one run: who am I, add up, gather. Every function is a no-op on a single process.

`torchrun` starts the processes and sets RANK, WORLD_SIZE and LOCAL_RANK; nothing else is read from the environment.
"""

import ctypes
import datetime
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load, save
from torch import Tensor, nn

from retina.errors import RetinaError
from retina.printing import say

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def launched_world_size() -> int:
    """How many processes torchrun says that it starts; 1 without torchrun.

    Raises RetinaError for a WORLD_SIZE that is no such number, or that stands alone in the environment."""
    size = launched_number("WORLD_SIZE", 1)
    if size == 1:
        return size
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise _not_launched("WORLD_SIZE", f"without {', '.join(missing)}")
    if size < 1 or launched_number("RANK") >= size:
        raise _not_launched("WORLD_SIZE", "is no number of processes with this RANK")
    return size


def launched_number(name: str, default: int = 0) -> int:
    """The value of a variable that torchrun sets. Raises RetinaError for what is no number."""
    value = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", value):
        raise _not_launched(name, "is no number")
    return int(value)


def _not_launched(name: str, problem: str) -> RetinaError:
    fix = f"unset {name}, or start the processes with torchrun"
    return RetinaError(f"{os.environ[name]!r:.80} {problem} - {fix}", code="world-size", key=name)


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA (this process's own GPU under torchrun), else Apple's MPS, else the CPU.

    Raises ValueError for a device this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and launched_world_size() > 1:
            name = "cpu"  # no collectives on MPS
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r} does not exist - use auto, cpu, cuda, cuda:N or mps")
    if name not in ("cpu", "cuda") and launched_world_size() > 1:
        raise ValueError(f"device {name!r} cannot be shared by several processes - use cuda, one for each")
    device = torch.device("cuda", launched_number("LOCAL_RANK")) if name == "cuda" else torch.device(name)
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device {name!r} is not available here - use device=cpu or device=auto")
    return device


@contextmanager
def process_group(device: torch.device, *, timeout_minutes: float = 60) -> Iterator[None]:
    """Joins the processes that torchrun started, by gloo and, for CUDA tensors, NCCL; leaves them however it ends.

    `timeout_minutes` bounds how long a process waits for the others. A process whose torchrun is gone is told to stop,
    and one that loses touch with the others raises RetinaError."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launched_world_size() == 1:
        yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    # what ranks tell each other lies on the CPU and goes by gloo: it must not wait for the work queued on a GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        with naming_lost_process(lambda: "start or end of the run"):
            with _waiting_for_others():
                dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
            yield
    finally:
        # after a fault NCCL would wait for work that the others never finish; the process ends anyway
        if dist.is_initialized() and (backend == "gloo" or sys.exception() is None):
            dist.destroy_process_group()


@contextmanager
def _waiting_for_others(patience: float = 3.0) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM end the process at once: it waits in C++ code, where Python's handlers do not
    run. After `patience` seconds, a line on stderr says whom it waits for."""
    here, world = launched_number("RANK"), launched_world_size()
    others = "rank " + ", ".join(str(other) for other in range(world) if other != here)
    others = others if world <= 9 else f"{world - 1} other ranks"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    line = f"rank {here}: waiting for {others} at {place} (WORLD_SIZE={world})"
    timer = threading.Timer(patience, partial(say, line, error=True, goes_on=True))
    timer.daemon = True
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def naming_lost_process(where: Callable[[], str]) -> Iterator[None]:
    """Raises RetinaError, naming rank and `where()`, when a collective fails because another process is gone."""
    try:
        yield
    except RuntimeError as fault:
        if not (isinstance(fault, dist.DistError) or re.search(r"gloo|nccl|TCPStore|rendezvous", str(fault), re.I)):
            raise
        reason = " ".join(str(fault).split())[:120]
        who = f"rank {os.environ.get('RANK', 0)}: {where()}"
        if re.search(r"time[d -]*out", reason, re.I):
            problem = f"{who}: another process has not answered in time ({reason})"
            fix = "give the same command again; where it is at work still, as on slow disks, raise timeout_minutes"
            raise RetinaError(f"{problem} - {fix}", code="late-process") from fault
        problem = f"{who}: another process is gone ({reason}) - give the same command again"
        raise RetinaError(problem, code="lost-process") from fault


def _end_with_launcher() -> None:
    """Has the kernel send SIGTERM (on Linux) when torchrun dies: killed outright, it would leave its processes behind,
    waiting for each other and holding the run's lock. Raises RetinaError when it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=20).close()
        except OSError as fault:
            problem = f"rank {os.environ['RANK']}: start: torchrun is gone ({fault.strerror or fault}) - start it again"
            raise RetinaError(problem, code="lost-launcher") from None


def on_main(task: Callable[[], T]) -> T:
    """What `task` returns on rank 0, on every rank. When it raises, the others exit with code 2 and leave the word to
    it. Small results only, as with `broadcast_object`."""
    return broadcast_object(on_all(lambda: [task()] if is_main() else []))[0]


def on_all(task: Callable[[], T]) -> T:
    """Runs `task` on every rank. When it raises on any, that rank raises (the lowest, if several) and the others exit
    with code 2 and leave the word to it."""
    fault: Exception | None = None
    try:
        value = task()
    except Exception as caught:
        fault = caught
    failed = gather_objects(fault is not None)
    if fault is not None and not any(failed[: rank()]):
        raise fault
    if any(failed):
        sys.exit(2)
    return value


class Verdict(NamedTuple):
    """What any rank had to say; the same on all ranks."""

    stop: int
    """The signal that asks to stop (SIGTERM before SIGINT), 0 for none."""
    error: bool


def agree(*, stop: int = 0, error: bool = False) -> Verdict:
    """Makes known to all ranks, by one all-reduce of three numbers, whether any was told to `stop` or met a fault.

    Every rank must call it. `stop` is SIGINT, SIGTERM or 0."""
    counts = torch.tensor([stop == signal.SIGTERM, stop == signal.SIGINT, error], dtype=torch.int64)
    terminated, interrupted, faults = all_reduce_sum(counts).tolist()
    return Verdict(int(signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0), faults > 0)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns its argument."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(obj: T) -> T:
    """Rank 0's value on every rank. Small values that JSON knows only: nothing is pickled, so nothing that comes over
    the network is ever run. Between processes tuples become lists, and keys of dictionaries text."""
    return gather_objects(obj if is_main() else None)[0] if world_size() > 1 else obj  # type: ignore[return-value]


def gather_objects(obj: T) -> list[T]:
    """One value per rank, on every rank, in rank order; as with `broadcast_object`."""
    if world_size() == 1:
        return [obj]
    return [json.loads(part) for part in _gather_bytes(json.dumps(obj).encode())]


def gather_arrays(arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """The arrays of each rank, in rank order, on rank 0; nothing on the others."""
    if world_size() == 1:
        return [list(arrays)]
    data = save({str(i): np.ascontiguousarray(array) for i, array in enumerate(arrays)})
    parts = _gather_bytes(data, everywhere=False)
    ranks = [load(part) for part in parts]
    return [[named[str(i)] for i in range(len(arrays))] for named in ranks]


def _gather_bytes(data: bytes, *, everywhere: bool = True) -> list[bytes]:
    """On rank 0 alone unless `everywhere`."""
    size = torch.tensor([len(data)])
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in sizes] if everywhere or is_main() else []
    if everywhere:
        dist.all_gather(parts, padded)
    else:
        dist.gather(padded, parts or None)
    return [part[: int(length)].numpy().tobytes() for part, length in zip(parts, sizes, strict=bool(parts))]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances of every BatchNorm that learns them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Copies of all tensors behind each other, [N]."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else torch.empty(0)


def average_into(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Writes the mean over ranks of `flat`, as `flatten` makes it, into the tensors: one message for all.

    For BatchNorm's running statistics: each rank sees its own images, so its statistics drift from the others';
    evaluation needs one truth. Changes `flat`."""
    if world_size() > 1:
        dist.all_reduce(flat)
        flat /= world_size()
    write_into(tensors, flat)


@torch.no_grad()
def write_into(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Writes back what `flatten` made of the tensors."""
    parts = flat.split([t.numel() for t in tensors])
    if tensors:
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
