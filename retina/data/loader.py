"""Batches by worker processes: PyTorch's DataLoader, with its traps closed."""

import math
import mmap
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from retina.data.dataset import DetectionDataset
from retina.data.sampler import DetectionBatchSampler, EvalSampler
from retina.data.transforms import Sample, resize
from retina.errors import ConfigError, DataError, RetinaError
from retina.types import Batch, Targets


class BatchLoader(DataLoader[Any]):
    """A DataLoader that goes on without bad images up to a share of them, and raises user-facing errors as they are.

    With `substitute`, the next readable image (index + 1, + 2, ... mod N) takes a bad one's place, so that batches stay
    full: a pure function of epoch, index and files, whatever the workers and wherever a run was resumed. Without it a
    bad image is left out, and a batch of none is not yielded.

    Workers ignore SIGINT, and SIGTERM but from the main process, for what those mean that one decides; they end by
    themselves some seconds after it is gone.

    Raises, while it is iterated over: DataError for the image that makes more than floor(max_bad_fraction * N) bad, or
    when all are; RetinaError when a worker dies; and any other RetinaError of the data set or the collate.
    """

    faults: dict[int, str]
    """What is wrong with which image, by index, of all batches yielded so far."""

    def __init__(
        self,
        dataset: DetectionDataset,
        sampler: Sampler[list[tuple[int, int]]],
        *,
        num_workers: int,
        divisor: int,
        pad_value: tuple[int, int, int],
        canvases: Sequence[tuple[int, int]] | None,
        pin_memory: bool,
        persistent: bool,
        substitute: bool,
        max_bad_fraction: float,
    ) -> None:
        self.faults = {}
        self.max_bad_fraction = max_bad_fraction
        # 0.29 * 100 is 28.999...; and were all allowed to be bad, epochs of no batches would follow each other for ever
        self.max_bad = min(int(max_bad_fraction * len(dataset) + 1e-9), len(dataset) - 1)
        workers: dict[str, Any] = {}
        if num_workers > 0:
            workers = {"worker_init_fn": start_worker, "persistent_workers": persistent}
            if sys.platform == "linux":
                # forked workers share the annotations' memory; macOS frameworks do not survive a fork
                workers["multiprocessing_context"] = LockFreeFork()
        super().__init__(
            _Guarded(dataset, self.max_bad, substitute),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(_collate, divisor=divisor, pad_value=pad_value, canvases=canvases),
            pin_memory=pin_memory,
            # Every new iterator draws a number. From the global generator, that would shift all that the training draws
            # after it, and a resumed run would part from the one it continues.
            generator=torch.Generator().manual_seed(0),
            **workers,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with workers_started(), self._watched(lambda: self._iterator):
            fetched = super().__iter__()
        return self._checked(fetched)

    def _checked(self, fetched: Any) -> Iterator[Batch]:
        while True:
            with self._watched(lambda: fetched):
                item = next(fetched, None)
                if isinstance(item, RetinaError):  # DataLoader would have wrapped its line in the worker's traceback
                    raise item
                self.faults.update(item.faults if item else {})
                if len(self.faults) > self.max_bad:
                    raise self._too_many_faults()
            if item is None:
                return
            if item.batch is not None:
                yield item.batch

    @contextmanager
    def _watched(self, iterator: Callable[[], Any]) -> Iterator[None]:
        """Ends the workers of DataLoader's iterator when anything is raised, as one line where one of them had died."""
        try:
            yield
        except Exception as error:
            workers: list[BaseProcess] = getattr(iterator(), "_workers", [])
            if workers and not isinstance(error, RetinaError):
                wait([worker.sentinel for worker in workers], timeout=1.0)  # it dies a moment later than its pipes
            dead = [worker for worker in workers if worker.exitcode is not None]
            # Left to the garbage collector, each would be waited for until a time runs out.
            for worker in workers:
                worker.kill()
            self._iterator = None
            if not dead or isinstance(error, RetinaError):
                raise
            code = dead[0].exitcode or 0
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise RetinaError(
                f"data.num_workers={len(workers)}: loader worker process {dead[0].pid} {how}, most often for lack of"
                " memory or of room in /dev/shm - lower data.num_workers or the batch size"
            ) from error

    def _too_many_faults(self) -> DataError:
        first = next(iter(self.faults.values()))
        if self.max_bad_fraction == 0:
            return DataError(first)
        num = len(self.dataset)  # type: ignore[arg-type] # it has a length
        return DataError(
            f"data.max_bad_fraction={self.max_bad_fraction:g}: {len(self.faults)} of {num} images are bad,"
            f" {self.max_bad} would be allowed - mend or remove them, or raise it; the first: {first}"
        )


def train_loader(
    dataset: DetectionDataset,
    sampler: DetectionBatchSampler,
    *,
    num_workers: int,
    divisor: int,
    pad_value: tuple[int, int, int],
    max_bad_fraction: float,
    canvases: Sequence[tuple[int, int]] | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """Micro-batches of one epoch per iteration, in the sampler's order. Workers live on from epoch to epoch.

    Batches depend neither on `num_workers` (0: in this process) nor on the global random state, and leave that alone.
    They are always full: see `BatchLoader`. `divisor`, `pad_value` and `canvases` are those of `collate`.
    """
    return BatchLoader(
        dataset,
        sampler,
        num_workers=num_workers,
        divisor=divisor,
        pad_value=pad_value,
        canvases=canvases,
        pin_memory=pin_memory,
        persistent=True,
        substitute=True,
        max_bad_fraction=max_bad_fraction,
    )


def eval_loader(
    dataset: DetectionDataset,
    sampler: EvalSampler,
    *,
    num_workers: int,
    divisor: int,
    pad_value: tuple[int, int, int],
    max_bad_fraction: float,
    canvases: Sequence[tuple[int, int]] | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """This process's share of all images, each once but for the bad ones, which are left out. Workers end with the
    iteration, so that they do not hold memory while training goes on."""
    return BatchLoader(
        dataset,
        sampler,
        num_workers=num_workers,
        divisor=divisor,
        pad_value=pad_value,
        canvases=canvases,
        pin_memory=pin_memory,
        persistent=False,
        substitute=False,
        max_bad_fraction=max_bad_fraction,
    )


class _Read(NamedTuple):
    """A sample, or None if there is none, and the faults met on the way."""

    sample: Sample | None
    faults: dict[int, str]


class _Fetched(NamedTuple):
    """What a worker hands over for a batch: None where every image was bad."""

    batch: Batch | None
    faults: dict[int, str]


class _Guarded(Dataset[_Read | RetinaError]):
    """The data set, with its faults as data."""

    def __init__(self, dataset: DetectionDataset, max_bad: int, substitute: bool) -> None:
        self.dataset = dataset
        self.max_bad = max_bad
        self.substitute = substitute

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> _Read | RetinaError:
        epoch, index = key
        faults: dict[int, str] = {}
        for offset in range(len(self) if self.substitute else 1):
            candidate = (index + offset) % len(self)
            try:
                return _Read(self.dataset[epoch, candidate], faults)
            except DataError as error:
                faults[candidate] = str(error)
            except RetinaError as error:
                return error
            if len(faults) > self.max_bad:  # the main process will stop: nothing is gained by reading on
                break
        return _Read(None, faults)


def _collate(items: list[_Read | RetinaError], **options: Any) -> _Fetched | RetinaError:
    faults: dict[int, str] = {}
    samples = []
    for item in items:
        if isinstance(item, RetinaError):
            return item
        faults |= item.faults
        if item.sample is not None:
            samples.append(item.sample)
    try:
        in_worker = get_worker_info() is not None
        batch = collate(samples, shared=in_worker, **options) if samples else None
        if batch is not None and in_worker:
            # Left to the thread that sends it, a failure would lose the batch, and the main process wait for ever.
            for tensor in (batch.images, batch.sizes, *batch.targets, batch.indices, batch.original_sizes):
                tensor.share_memory_()
    except RetinaError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        return RetinaError(
            f"data.num_workers: a batch does not fit into (shared) memory ({' '.join(str(error).split())})"
            " - lower data.num_workers or the batch size, or enlarge /dev/shm (docker: --shm-size)"
        )
    return _Fetched(batch, faults)


def collate(
    samples: Sequence[Sample],
    *,
    divisor: int,
    pad_value: tuple[int, int, int],
    canvases: Sequence[tuple[int, int]] | None = None,
    shared: bool = False,
) -> Batch:
    """Put images at the top left of a common canvas filled with `pad_value`, and pad their targets to a common count.

    The canvas is the greatest height by the greatest width, each rounded up to a multiple of `divisor`; with
    `canvases` it is instead the one of least area among them (height, width) that holds every image, the first of equal
    ones. Images are [B 3 H W] in channels_last memory, which is the order in which they are decoded. Each pixel is
    written once, by the resize that `Sample.size` asks for or as a copy, and with `shared` to memory that other
    processes can map. Boxes and labels of padding are zero; without any object M is 0.

    Raises ValueError if there are no samples, ConfigError if no canvas is large enough or one is no multiple of
    `divisor`, RuntimeError if there is too little (shared) memory.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    sizes = [sample.size or sample.image.shape[:2] for sample in samples]
    canvas = _canvas(sizes, divisor, canvases)
    images = _uninitialised((len(samples), *canvas, 3), shared)
    count = max(len(sample.boxes) for sample in samples)
    boxes = np.zeros((len(samples), count, 4), dtype=np.float32)
    labels = np.zeros((len(samples), count), dtype=np.int64)
    valid = np.zeros((len(samples), count), dtype=bool)
    crowd = np.zeros((len(samples), count), dtype=bool)
    padding = np.full((canvas[1], 3), pad_value, dtype=np.uint8)
    for row, (sample, (height, width)) in enumerate(zip(samples, sizes, strict=True)):
        target = images[row].numpy()
        resize(sample.image, (height, width), out=target[:height, :width])
        # by rows: numpy writes one pixel after the other, and would take longer over them than to decode the image
        target[:height, width:] = padding[width:]
        target[height:] = padding
        objects = len(sample.boxes)
        boxes[row, :objects] = sample.boxes
        labels[row, :objects] = sample.labels
        valid[row, :objects] = ~sample.crowd
        crowd[row, :objects] = sample.crowd
    return Batch(
        images=images.permute(0, 3, 1, 2),
        sizes=torch.tensor(sizes, dtype=torch.int64),
        targets=Targets(*map(torch.from_numpy, (boxes, labels, valid, crowd))),
        indices=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        original_sizes=torch.tensor([sample.original_size for sample in samples], dtype=torch.int64),
    )


def _uninitialised(shape: tuple[int, ...], shared: bool) -> UInt8[Tensor, "..."]:
    if not shared:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))  # numpy asks for huge pages, PyTorch does not
    # as PyTorch's own collate does; `share_memory_` would copy what is not yet written
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _canvas(
    sizes: Sequence[tuple[int, ...]], divisor: int, canvases: Sequence[tuple[int, int]] | None
) -> tuple[int, int]:
    height, width = (max(side) for side in zip(*sizes, strict=True))
    if canvases is None:
        return -(-height // divisor) * divisor, -(-width // divisor) * divisor
    shown = ", ".join(f"{h}x{w}" for h, w in canvases)
    if any(side % divisor for canvas in canvases for side in canvas):
        raise ConfigError(f"data.canvases: {shown} (height x width) are not all multiples of {divisor} - round them up")
    fitting = [(h, w) for h, w in canvases if h >= height and w >= width]
    if not fitting:
        raise ConfigError(
            f"data.canvases: none of {shown} (height x width) holds images of {height}x{width}"
            " - add a larger one, or make images smaller"
        )
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])


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
