"""Which images are seen when: the order of an epoch, and each process's share of it.

An optimizer step consumes one global batch of `total_batch` images. Global batches are settled first, from the seed and
the epoch alone, and only then cut for processes and accumulation, so 1 process x 16 images, 2 x 8 and
2 x 4 x accumulate 2 train on the same images in the same steps.
"""

from collections.abc import Iterator
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int64, Shaped, UInt64
from numpy import ndarray
from torch.utils.data import Sampler

from retina.errors import ConfigError

T = TypeVar("T", covariant=True)

_FURTHER = 2**32
"""The k-th further time that an epoch shows an image has the key epoch + k * _FURTHER: it is augmented anew."""


@runtime_checkable
class Draws(Protocol):
    """Which images an epoch shows, and how often: `retina.data.repeats.Repeats`, or a sampler of one's own."""

    @property
    def num_draws(self) -> int:
        """Images of an epoch, the same in every one."""

    def draw(self, seed: int, epoch: int) -> Int64[ndarray, "num_draws"]:
        """The images of that epoch, by their row in the annotations: a function of seed and epoch alone, because a
        resumed run draws them again."""


class EpochSampler(Sampler[T]):
    """A sampler that can begin at any step of any epoch, for `steps_per_epoch` steps."""

    steps_per_epoch: int

    def set_epoch(self, epoch: int) -> None:
        """The next iteration yields this epoch, from its beginning."""
        self.start(epoch, 0)

    def start(self, epoch: int, step: int) -> None:
        """The next iteration yields this epoch from this step on; what was before is never loaded."""
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(f"step must lie in 0..{self.steps_per_epoch}, got {step}")
        self.epoch, self.step = epoch, step


class DetectionBatchSampler(EpochSampler[list[tuple[int, int]]]):
    """Yields micro-batches of this process for one epoch as lists of (epoch, index): `accumulate` lists per step.

    Args:
        sizes: (height, width) of every image; with `group_by_aspect`, landscape, portrait and square images meet in one
            global batch only where leftovers of an epoch force them to, for less padding.
        total_batch: images of an optimizer step, over all processes and micro-batches.
        rank, world_size: which process this is, of how many.
        accumulate: micro-batches per optimizer step.
        shuffle: otherwise images come in the order of `sizes` or `repeats` (within each orientation).
        repeats: which images an epoch draws, and how often; None is every image once. An image that comes again in an
            epoch has another number in the place of `epoch`, by which the data set augments it in another way.

    The last global batch of an epoch is filled up with the epoch's first images. Raises ValueError if there are no
    images or `total_batch` cannot be cut evenly, ConfigError if `repeats` draws other images, or not as many as it
    says.
    """

    def __init__(
        self,
        sizes: Shaped[ndarray, "N 2"],
        *,
        total_batch: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        group_by_aspect: bool = True,
        repeats: Draws | None = None,
    ) -> None:
        if len(sizes) == 0:
            raise ValueError("there are no images to draw batches from")
        check_rank(rank, world_size)
        if min(total_batch, accumulate) < 1:
            raise ValueError(f"total_batch and accumulate must be positive, got {total_batch} and {accumulate}")
        parts = world_size * accumulate
        if total_batch % parts:
            below = total_batch // parts * parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            fix = (
                f"cut evenly for {world_size} processes x {accumulate} micro-batches: the nearest that can is {nearest}"
            )
            raise ValueError(f"a total batch of {total_batch} images cannot be {fix}")
        self.total_batch, self.micro_batch = total_batch, total_batch // parts
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.seed, self.shuffle, self._repeats = seed, shuffle, repeats
        self.images_per_epoch = len(sizes) if repeats is None else repeats.num_draws
        self.steps_per_epoch = -(-self.images_per_epoch // total_batch)
        self._orientations = np.sign(sizes[:, 1] - sizes[:, 0]) if group_by_aspect else np.zeros(len(sizes), np.int64)
        self._drawn(0)
        self.start(0, 0)

    def global_batches(self, epoch: int) -> Int64[ndarray, "steps total_batch"]:
        """The images of every optimizer step of an epoch; it does not depend on processes or accumulation."""
        images = self._drawn(epoch)
        order = shuffled(images, self.seed, epoch) if self.shuffle else images
        batches = _group(order, self._orientations, self.total_batch)
        return np.resize(batches, (self.steps_per_epoch, self.total_batch))  # repeats from the start to fill up

    def _drawn(self, epoch: int) -> Int64[ndarray, "images_per_epoch"]:
        num = len(self._orientations)
        if self._repeats is None:
            return np.arange(num)
        images = np.asarray(self._repeats.draw(self.seed, epoch), np.int64)
        if images.shape != (self.images_per_epoch,) or images.min() < 0 or images.max() >= num:
            problem = f"got shape {images.shape} up to image {images.max(initial=-1)}"
            fix = f"a sampler must draw {self.images_per_epoch} of images 0..{num - 1} in every epoch"
            raise ConfigError(f"{problem} - {fix}", code="sampling", key="sampling")
        return images

    def __len__(self) -> int:
        """Micro-batches that the next iteration yields."""
        return (self.steps_per_epoch - self.step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        images = self.global_batches(self.epoch)
        epochs = np.full_like(images, self.epoch)
        if self._repeats is not None:
            epochs += _times_before(images) * _FURTHER
        keys = np.stack([epochs, images], axis=-1)[self.step :]
        share = keys.reshape(len(keys) * self.accumulate, self.world_size, self.micro_batch, 2)[:, self.rank]
        return ([(key, index) for key, index in part.tolist()] for part in share)


class EvalSampler(Sampler[list[tuple[int, int]]]):
    """Yields this process's share of all images as lists of (0, index), each image once over all processes.

    Images are sorted by aspect ratio, so that a batch needs little padding, and dealt out in turn. Shares differ by one
    image at most, the last batch may be small, and a process may get none: nothing is repeated to make them even."""

    def __init__(self, sizes: Shaped[ndarray, "N 2"], *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        by_aspect = np.argsort(sizes[:, 1] / sizes[:, 0], kind="stable")
        self.indices = by_aspect[eval_shard(len(sizes), rank, world_size)]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = [(0, index) for index in self.indices.tolist()]
        return (keys[first : first + self.batch_size] for first in range(0, len(keys), self.batch_size))


def eval_shard(num: int, rank: int, world_size: int) -> Int64[ndarray, "share"]:
    """Every `world_size`-th of `num` positions, from `rank` on: over all ranks each position once, none repeated."""
    check_rank(rank, world_size)
    return np.arange(rank, num, world_size)


def check_rank(rank: int, world_size: int) -> None:
    """Raises ValueError."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")


def random_keys(num: int, *seed: int) -> UInt64[ndarray, "num"]:
    """Random numbers to sort by. Numpy promises the raw stream of a bit generator forever, but not what
    `Generator.permutation` makes of it (NEP 19)."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(num)


def shuffled(images: Int64[ndarray, "N"], seed: int, epoch: int) -> Int64[ndarray, "N"]:
    """In random order. Equal keys (odds below 1e-5 for ten million images) keep theirs."""
    return images[np.argsort(random_keys(len(images), seed, epoch), kind="stable")]


def _times_before(images: Int64[ndarray, "*shape"]) -> Int64[ndarray, "*shape"]:
    """How often each image has come before in the epoch."""
    order = np.argsort(images, axis=None, kind="stable")
    _, first, inverse = np.unique(images.ravel()[order], return_index=True, return_inverse=True)
    times = np.empty_like(order)
    times[order] = np.arange(len(order)) - first[inverse]
    return times.reshape(images.shape)


def _group(order: Int64[ndarray, "D"], groups: Shaped[ndarray, "N"], total_batch: int) -> Int64[ndarray, "D"]:
    """Rearrange so that consecutive runs of `total_batch` are of one group, leftovers of all groups at the end.

    A batch is placed when it becomes full, so the order of batches is as random as that of images."""
    streams = [np.flatnonzero(groups[order] == group) for group in np.unique(groups)]
    whole = [len(stream) // total_batch * total_batch for stream in streams]
    full = np.concatenate([s[:n].reshape(-1, total_batch) for s, n in zip(streams, whole, strict=True)])
    full = full[np.argsort(full[:, -1])]
    leftovers = [s[n:] for s, n in zip(streams, whole, strict=True)]
    return order[np.concatenate([full.ravel(), *leftovers])]
