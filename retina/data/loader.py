"""Batches by worker processes: PyTorch's DataLoader, with its traps closed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from retina.data.collate import collate
from retina.data.dataset import DetectionDataset
from retina.data.sampler import DetectionBatchSampler, EvalSampler
from retina.data.transforms import Sample
from retina.data.workers import LockFreeFork, start_worker, workers_started
from retina.errors import DataError, RetinaError
from retina.types import Batch


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
