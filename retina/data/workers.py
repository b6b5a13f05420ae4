"""How loader workers start and end: by the main process alone, whatever signals come and whoever is killed."""

import mmap
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkContext

import cv2

_STOPS = (signal.SIGINT, signal.SIGTERM)


class Flag:
    """An event that needs no lock. A worker that is killed while it looks at multiprocessing's takes the lock with it,
    and the main process waits for ever where it asks."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)  # shared with forked processes

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] == 1


class LockFreeFork(ForkContext):
    """Forked processes that tell each other through flags where DataLoader asks for an event."""

    def Event(self) -> Flag:  # type: ignore[override] # DataLoader only sets it and looks  # noqa: N802
        return Flag()


@contextmanager
def workers_started() -> Iterator[None]:
    """Around the start of workers.

    Until `start_worker` has run, a worker would obey signals as this process does, whose handlers it inherits: so they
    are held back meanwhile. And DataLoader's own SIGCHLD handler is taken out again: it would raise the death of a
    worker anywhere in the main process, in the middle of a checkpoint too; `next` finds out by itself, seconds later.
    """
    before = signal.getsignal(signal.SIGCHLD)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # its pool's threads did not survive the fork; PyTorch limits its own threads by itself
    warnings.filterwarnings("ignore", module=r"PIL\.")  # it names no file, and what matters is an error here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey_main_process, args=[os.getppid()], daemon=True).start()  # SIGTERM stays held back
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def _obey_main_process(main: int) -> None:
    """Ends this worker when SIGTERM comes from the main process, whose last means that is, and from nobody else."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)
