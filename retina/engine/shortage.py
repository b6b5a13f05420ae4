"""What to do when the memory of a GPU is short: one line that helps, or the same update from fewer images at a time.
Beside the road."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from retina import distributed
from retina.errors import RetinaError
from retina.types import Batch, Targets

T = TypeVar("T")


class Shortage:
    """Makes updates, and answers `torch.OutOfMemoryError`.

    halves: go on with half as many images at a time. The update is the same up to rounding, as with more
        `train.accumulate` (statistics of a BatchNorm that is trained are those of fewer images). One process alone can:
        others would wait for what this one had begun with them."""

    def __init__(self, accumulate: int, *, halves: bool, warn: Callable[[str], None]) -> None:
        self.accumulate, self.warn = accumulate, warn
        self.halves = halves and distributed.world_size() == 1

    def update(self, make: Callable[[list[Batch]], T], micro_batches: Sequence[Batch], step: int) -> T:
        """`make` of as many parts of the micro-batches as memory holds. `make` leaves all as it was where it fails.

        Raises RetinaError where it does not hold one image, or may not halve them."""
        while True:
            parts = list(micro_batches)
            while len(parts) < self.accumulate and max(len(part.images) for part in parts) > 1:
                parts = list(_halved(parts))
            try:
                return make(parts)
            except torch.OutOfMemoryError as fault:
                problem = describe(fault, parts[0], step)
            # the tensors of that attempt are gone only here, with its traceback
            torch.cuda.empty_cache()
            most = max(len(part.images) for part in parts)
            if not self.halves or most == 1:
                less = f"train.accumulate={2 * len(parts)}, " if most > 1 else ""
                fix = f"{less}a smaller data.short_side, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
                raise RetinaError(f"{problem} - give {fix}", code="out-of-memory")
            self.accumulate = 2 * len(parts)
            self.warn(f"{problem}; training goes on with half as many at a time (train.accumulate={self.accumulate})")


def describe(fault: BaseException, batch: Batch, step: int) -> str:
    count, _, height, width = batch.images.shape
    peak, total = 0.0, ""
    if batch.images.is_cuda:
        peak = torch.cuda.max_memory_allocated(batch.images.device) / 1e9
        total = f" of {torch.cuda.get_device_properties(batch.images.device).total_memory / 1e9:.1f}"
    images = f"{count} image{'s' * (count > 1)} of {height}x{width} at once"
    return f"step {step}: the GPU's memory is too small for {images}, with {peak:.1f}{total} GB in use at the peak"


def _halved(batches: Iterable[Batch]) -> Iterable[Batch]:
    for batch in batches:
        middle = (len(batch.images) + 1) // 2
        for part in (slice(0, middle), slice(middle, None)):
            images, sizes, targets, indices, original_sizes = batch
            if len(images[part]):
                fields = Targets(*(field[part] for field in targets))
                yield Batch(images[part], sizes[part], fields, indices[part], original_sizes[part])
