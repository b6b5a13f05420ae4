"""Worker processes of a loader: how they start, which signals they obey, how long they are waited for, and what ends
them. Beside the road."""

import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from jaxtyping import Int64

from retina.errors import RetinaError, StoppedError

_STOPS = (signal.SIGINT, signal.SIGTERM)
_LOOKS = 0.2
"""Seconds between two looks at what may end a wait."""
T = TypeVar("T")


def shared_numbers(count: int) -> Int64[np.ndarray, "count"]:
    """Zeros that forked processes share. A process that is not forked has a copy."""
    return np.frombuffer(mmap.mmap(-1, 8 * count), dtype=np.int64)


class Flag:
    """A one-way event without a lock, shared with forked processes.

    A worker that is killed while it reads multiprocessing's own Event keeps the Event's lock, and the main process
    then waits for ever."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] == 1


def worker_options() -> dict[str, Any]:
    """Arguments of torch's DataLoader that make its workers behave as this module says."""
    options: dict[str, Any] = {"worker_init_fn": start_worker}
    if sys.platform == "linux":  # forked workers share the annotations' memory; macOS frameworks do not survive a fork
        options["multiprocessing_context"] = lock_free_fork()
    return options


def lock_free_fork() -> Any:
    """The multiprocessing context that forks, with a `Flag` where DataLoader asks for an event."""
    context = multiprocessing.get_context("fork")
    return type("LockFreeFork", (type(context),), {"Event": lambda self: Flag()})()


@contextmanager
def workers_started() -> Iterator[None]:
    """Around the start of workers: holds signals back, and removes DataLoader's SIGCHLD handler again.

    A forked worker inherits the handlers of this process and would obey signals as this process does, until
    `start_worker` has run. DataLoader's SIGCHLD handler would raise a worker's death anywhere in the main process, also
    in the middle of a checkpoint; `next` notices the death by itself, seconds later.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_worker(worker: int) -> None:
    """Runs first in each worker, numbered `worker`."""
    cv2.setNumThreads(0)  # the threads of OpenCV's pool do not survive the fork; PyTorch limits its own threads
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's warnings name no file, and what matters raises
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey_main_process, args=[os.getppid()], daemon=True).start()  # SIGTERM stays blocked
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    elif hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def _obey_main_process(main: int) -> None:
    """Ends this worker when the main process sends SIGTERM; SIGTERM of any other process is ignored."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)


def patiently(fetch: Callable[[], T], stopping: Callable[[], int], timeout: float, late: Callable[[], Exception]) -> T:
    """`fetch()`, waited for without being at its mercy: StoppedError once `stopping()` is the number of a signal,
    `late()` after `timeout` seconds. Then `fetch` goes on in its thread until the workers are ended.

    A thread, because not every wait for a worker has an end: a tensor that a stopped process sent is asked from it."""
    outcome: list[T] = []
    fault: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(fetch())
        except BaseException as caught:
            fault.append(caught)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun = time.monotonic()
    while True:
        thread.join(_LOOKS)
        if not thread.is_alive():
            break
        if number := stopping():
            raise StoppedError(number)
        if time.monotonic() - begun > timeout:
            raise late()
    if fault:
        raise fault[0]
    return outcome[0]


def too_late(timeout: float, being_read: Callable[[], list[Path]]) -> RetinaError:
    files = ", ".join(map(str, being_read())) or "no image"
    problem = f"{timeout:g} seconds of waiting; being read: {files}"
    fix = "look whether the disk answers and no process that reads is stopped, or raise it"
    return RetinaError(f"{problem} - {fix}", code="data-timeout", key="timeout")


def end_workers(workers: list[BaseProcess], error: Exception) -> RetinaError | None:
    """Kills the workers after `error` was raised. Returns the fault to raise instead, if a worker had died before.

    Left to the garbage collector, each worker would be waited for until a timeout."""
    if workers and not isinstance(error, RetinaError | StoppedError):
        wait([worker.sentinel for worker in workers], timeout=1.0)  # a worker dies a moment later than its pipes
    dead = [worker for worker in workers if worker.exitcode is not None]
    for worker in workers:
        worker.kill()
    if not dead or isinstance(error, RetinaError | StoppedError):
        return None
    code = dead[0].exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    problem = (
        f"{len(workers)}: loader worker process {dead[0].pid} {how}, most often because memory or /dev/shm is full"
    )
    return RetinaError(f"{problem} - lower num_workers or the batch size", code="dead-worker", key="num_workers")
