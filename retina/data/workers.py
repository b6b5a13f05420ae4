"""Worker processes of a loader: how they start, which signals they obey, and what ends them. Beside the road."""

import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import cv2

from retina.errors import RetinaError

_STOPS = (signal.SIGINT, signal.SIGTERM)


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


def end_workers(workers: list[BaseProcess], error: Exception) -> RetinaError | None:
    """Kills the workers after `error` was raised. Returns the fault to raise instead, if a worker had died before.

    Left to the garbage collector, each worker would be waited for until a timeout."""
    if workers and not isinstance(error, RetinaError):
        wait([worker.sentinel for worker in workers], timeout=1.0)  # a worker dies a moment later than its pipes
    dead = [worker for worker in workers if worker.exitcode is not None]
    for worker in workers:
        worker.kill()
    if not dead or isinstance(error, RetinaError):
        return None
    code = dead[0].exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    problem = (
        f"{len(workers)}: loader worker process {dead[0].pid} {how}, most often because memory or /dev/shm is full"
    )
    return RetinaError(f"{problem} - lower num_workers or the batch size", code="dead-worker", key="num_workers")
