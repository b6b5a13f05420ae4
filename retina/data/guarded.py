"""Samples that may turn out bad, read in a worker process or in this one. Beside the road."""

from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset, get_worker_info

from retina.data.dataset import CocoDetection
from retina.data.workers import shared_numbers
from retina.errors import DataError, RetinaError


class Read(NamedTuple):
    """A sample or batch, or None if every image of it was bad, and the faults of its images by index."""

    content: Any
    faults: dict[int, str]


class GuardedDataset(Dataset[Read | RetinaError]):
    """The data set, with its faults as data."""

    def __init__(self, dataset: CocoDetection, max_bad: int, num_workers: int, *, substitute: bool) -> None:
        self.dataset, self.max_bad, self.substitute = dataset, max_bad, substitute
        self.reading = shared_numbers(max(1, num_workers))
        """The image that each worker is at, counted from 1, or 0."""

    def __len__(self) -> int:
        return len(self.dataset)

    def being_read(self) -> list[Path]:
        """The images that workers are at now."""
        return [self.dataset.annotations.path(number - 1) for number in self.reading.tolist() if number]

    def __getitem__(self, key: tuple[int, int]) -> Read | RetinaError:
        epoch, index = key
        worker = get_worker_info()
        row = worker.id if worker else 0
        faults: dict[int, str] = {}
        for offset in range(len(self) if self.substitute else 1):
            candidate = (index + offset) % len(self)
            self.reading[row] = candidate + 1
            try:
                return Read(self.dataset[epoch, candidate], faults)
            except DataError as error:
                faults[candidate] = str(error)
            except RetinaError as error:
                return error
            finally:
                self.reading[row] = 0
            if len(faults) > self.max_bad:  # the main process will stop: nothing is gained by reading on
                break
        return Read(None, faults)
