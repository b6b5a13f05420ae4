"""Batches by worker processes: PyTorch's DataLoader, with its traps closed."""

import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from retina.data.collate import collate
from retina.data.sampler import DetectionBatchSampler, EvalSampler
from retina.data.transforms import Sample
from retina.errors import RetinaError
from retina.types import Batch


class BatchLoader(DataLoader[Any]):
    """A DataLoader that raises user-facing errors of its workers as they were: the same class, the same one line.

    DataLoader itself would wrap the message in the worker's traceback. So a worker hands such an error over as data.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        sampler: Sampler[list[tuple[int, int]]],
        *,
        num_workers: int,
        divisor: int,
        pad_value: tuple[int, int, int],
        canvases: Sequence[tuple[int, int]] | None,
        pin_memory: bool,
        persistent: bool,
    ) -> None:
        workers: dict[str, Any] = {}
        if num_workers > 0:
            workers = {"worker_init_fn": _start_worker, "persistent_workers": persistent}
            if sys.platform == "linux":
                # forked workers share the annotations' memory; macOS frameworks do not survive a fork
                workers["multiprocessing_context"] = "fork"
        super().__init__(
            _Caught(dataset),
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
        return map(_raise_fault, super().__iter__())


def train_loader(
    dataset: Dataset[Sample],
    sampler: DetectionBatchSampler,
    *,
    num_workers: int,
    divisor: int,
    pad_value: tuple[int, int, int],
    canvases: Sequence[tuple[int, int]] | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """Micro-batches of one epoch per iteration, in the sampler's order. Workers live on from epoch to epoch.

    Batches depend neither on `num_workers` (0: in this process) nor on the global random state, and leave that alone.
    `divisor`, `pad_value` and `canvases` are those of `collate`.
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
    )


def eval_loader(
    dataset: Dataset[Sample],
    sampler: EvalSampler,
    *,
    num_workers: int,
    divisor: int,
    pad_value: tuple[int, int, int],
    canvases: Sequence[tuple[int, int]] | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """This process's share of all images, each once. Workers end with the iteration, so that they do not hold memory
    while training goes on."""
    return BatchLoader(
        dataset,
        sampler,
        num_workers=num_workers,
        divisor=divisor,
        pad_value=pad_value,
        canvases=canvases,
        pin_memory=pin_memory,
        persistent=False,
    )


class _Caught(Dataset[Sample | RetinaError]):
    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Sample | RetinaError:
        try:
            return self.dataset[key]
        except RetinaError as error:
            return error


def _collate(items: list[Sample | RetinaError], **options: Any) -> Batch | RetinaError:
    fault = next((item for item in items if isinstance(item, RetinaError)), None)
    return fault or collate([item for item in items if isinstance(item, Sample)], **options)


def _raise_fault(batch: Batch | RetinaError) -> Batch:
    if isinstance(batch, RetinaError):
        raise batch
    return batch


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # its pool's threads did not survive the fork; PyTorch limits its own threads by itself
    # Ctrl-C reaches the whole process group: the main process decides what it means, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
