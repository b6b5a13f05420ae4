"""Which images are seen when: the order of an epoch, and each process's share of it.

An optimizer step consumes one global batch of `total_batch` images. Global batches are settled first, from the seed and
the epoch alone, and only then cut for processes and accumulation, so 1 process x 16 images, 2 x 8 and
2 x 4 x accumulate 2 train on the same images in the same steps.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64, Shaped, UInt64
from numpy import ndarray
from torch.utils.data import Sampler

from retina.data.annotations import Annotations

# How often each image is shown in an epoch, for rare classes: repeat factors, and classes drawn equally often.
#
# Both say how many times an image is to be seen on average, which need not be whole. The draw of an epoch settles that
# from its seed alone: the images lie end to end on a line, each as long as its number, in a random order, and a comb
# with teeth at distance 1 is laid over it at a random place. An image gets as many draws as teeth hit it: its number
# rounded up or down, right on average, while the total is the same in every epoch. (Systematic sampling: Madow, On the
# Theory of Systematic Sampling, II, Annals of Mathematical Statistics 1949.)
Labels = Sequence[int] | Int[ndarray, "T"]


class Repeats(NamedTuple):
    """How often images are to be drawn per epoch. An image may have several rows: its draws add up."""

    images: Int64[ndarray, "R"]
    times: Float64[ndarray, "R"]
    """Mean draws of each row per epoch, above 0."""
    strata: Int64[ndarray, "R"]
    """Rows of one stratum lie together, so that its draws are the sum of its times, rounded up or down, every epoch."""

    @property
    def num_draws(self) -> int:
        """Images drawn per epoch: the sum of `times`, rounded up. All times are stretched by as little."""
        return math.ceil(math.fsum(self.times) - 1e-6)


def repeat_factors(
    labels: Labels, images: Labels | None = None, *, num_images: int | None = None, threshold: float = 1e-3
) -> Repeats:
    """Images of rare classes repeated: r(i) = max over its classes c of max(1, sqrt(threshold / f(c))).

    f(c) is the share of images that show c. Every image is drawn at least once; those without objects have r = 1.

    Args:
        labels: of all objects, such as `ImageFolder.targets`.
        images: which image each object is in; None for one object per image, as an image classifier has them.
        num_images: with `images`, how many there are, images without objects included.
        threshold: classes in a smaller share of images than this are repeated.

    Raises ValueError for a threshold outside (0, 1], an image outside 0..num_images-1, or no images.
    Source: Gupta et al., LVIS: A Dataset for Large Vocabulary Instance Segmentation, CVPR 2019, appendix B.2 of
    arXiv 1908.03195v2, where the threshold is 0.001.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be a share of images in (0, 1], got {threshold}")
    classes, shown_in, num_images = _pairs(labels, images, num_images)
    share = np.bincount(classes) / num_images
    times = np.ones(num_images)
    np.maximum.at(times, shown_in, np.sqrt(threshold / share[classes]))
    return Repeats(np.arange(num_images), times, np.zeros(num_images, np.int64))


def class_balanced(labels: Labels, images: Labels | None = None, *, num_images: int | None = None) -> Repeats:
    """Every class that has images is drawn equally often, as many images per epoch as there are.

    The images of a class take turns: none is drawn for it again before all have been. Images without objects belong to
    no class and are drawn once each. What else an image shows comes along: in a detection data set, classes are drawn
    equally often, but not seen so.

    Arguments and errors are those of `repeat_factors`.
    Source: class-aware sampling of Shen et al., Relay Backpropagation for Effective Learning of Deep Convolutional
    Neural Networks, ECCV 2016.
    """
    classes, shown_in, num_images = _pairs(labels, images, num_images)
    empty = np.setdiff1d(np.arange(num_images), shown_in)
    counts = np.bincount(classes)
    per_class = (num_images - len(empty)) / max(1, int(np.count_nonzero(counts)))
    return Repeats(
        np.concatenate([shown_in, empty]),
        np.concatenate([per_class / counts[classes], np.ones(len(empty))]),
        np.concatenate([classes, np.full(len(empty), -1)]),
    )


def repeats_of(annotations: Annotations, sampling: str | None, *, threshold: float) -> Repeats | None:
    """For `data.sampling`: "repeat_factor", "class_balanced" or None, which is every image once.

    Crowd regions do not count: nothing is learned from them. Raises ValueError as the functions above."""
    if sampling is None:
        return None
    counts = ~annotations.crowd
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    objects = (annotations.labels[counts], images[counts])
    if sampling == "repeat_factor":
        return repeat_factors(*objects, num_images=len(annotations), threshold=threshold)
    if sampling == "class_balanced":
        return class_balanced(*objects, num_images=len(annotations))
    raise ValueError(f"sampling must be repeat_factor, class_balanced or None, got {sampling!r}")


def draw(repeats: Repeats, seed: int, epoch: int) -> Int64[ndarray, "draws"]:
    """The images of an epoch in ascending order, each as often as it is drawn; the same under every numpy version."""
    keys = random_keys(len(repeats.images) + 1, seed, epoch, 1)  # a stream of its own, not that of the shuffling
    order = np.lexsort((keys[1:], repeats.strata))
    ends = np.cumsum(repeats.times[order])
    ends *= repeats.num_draws / ends[-1]
    comb = np.arange(repeats.num_draws) + (int(keys[0]) >> 11) / 2**53
    rows = np.searchsorted(ends[:-1], comb, side="right")  # rounding may put the last end before the last tooth
    return np.sort(repeats.images[order[rows]])


def random_keys(num: int, *seed: int) -> UInt64[ndarray, "num"]:
    """Random numbers to sort by. Numpy promises the raw stream of a bit generator forever, but not what
    `Generator.permutation` makes of it (NEP 19)."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(num)


def _pairs(
    labels: Labels, images: Labels | None, num_images: int | None
) -> tuple[Int64[ndarray, "P"], Int64[ndarray, "P"], int]:
    """Every (class, image that shows it) once, sorted, and the number of images."""
    labels = np.asarray(labels, np.int64)
    if images is None:
        images, num_images = np.arange(len(labels)), len(labels)
    images = np.asarray(images, np.int64)
    if num_images is None:
        raise ValueError("num_images must be given with images: some may be without objects")
    if num_images < 1:
        raise ValueError("there are no images to draw from")
    if len(images) and not 0 <= images.min() <= images.max() < num_images:
        raise ValueError(f"images must lie in 0..{num_images - 1}, got {images.min()} to {images.max()}")
    if len(labels) and labels.min() < 0:
        raise ValueError(f"labels must be 0 or more, got {labels.min()}")
    classes, shown_in = np.divmod(np.unique(labels * num_images + images), num_images)
    return classes, shown_in, num_images


_FURTHER = 2**32
"""The k-th further time that an epoch shows an image has the key epoch + k * _FURTHER: it is augmented anew."""


class DetectionBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields micro-batches of this process for one epoch as lists of (epoch, index): `accumulate` lists per step.

    Args:
        sizes: (height, width) of every image; with `group_by_aspect`, landscape, portrait and square images meet in one
            global batch only where leftovers of an epoch force them to, for less padding.
        total_batch: images of an optimizer step, over all processes and micro-batches.
        rank, world_size: which process this is, of how many.
        accumulate: micro-batches per optimizer step.
        seed: of the order.
        shuffle: otherwise images come in the order of `sizes` (within each orientation).
        repeats: how often each image is drawn (`retina.data.sampler`), for rare classes; None is every image once. An
            image that comes again in an epoch has another number in the place of `epoch`, so that the data set, which
            augments by key, does not show the same picture again.

    The last global batch of an epoch is filled up with the epoch's first images, so that every epoch has the same
    number of steps and shows everything that was drawn.

    Raises ValueError if there are no images or `total_batch` cannot be cut evenly.
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
        repeats: Repeats | None = None,
    ) -> None:
        if len(sizes) == 0:
            raise ValueError("there are no images to draw batches from")
        if repeats is not None and repeats.images.max() >= len(sizes):
            raise ValueError(f"repeats are of image {repeats.images.max()}, but there are {len(sizes)} images")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if min(total_batch, accumulate) < 1:
            raise ValueError(f"total_batch and accumulate must be positive, got {total_batch} and {accumulate}")
        parts = world_size * accumulate
        if total_batch % parts:
            below = total_batch // parts * parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            raise ValueError(
                f"a total batch of {total_batch} images cannot be cut evenly for {world_size} processes x"
                f" {accumulate} micro-batches: the nearest that can is {nearest}"
            )
        self.total_batch = total_batch
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.seed, self.shuffle = seed, shuffle
        self._repeats = repeats
        self.images_per_epoch = len(sizes) if repeats is None else repeats.num_draws
        self._orientations = np.sign(sizes[:, 1] - sizes[:, 0]) if group_by_aspect else np.zeros(len(sizes), np.int64)
        self.start(0, 0)

    @property
    def micro_batch(self) -> int:
        """Images of one micro-batch of this process."""
        return self.total_batch // (self.world_size * self.accumulate)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return -(-self.images_per_epoch // self.total_batch)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration yields this epoch, from its beginning."""
        self.start(epoch, 0)

    def start(self, epoch: int, step: int) -> None:
        """The next iteration yields this epoch from this step on; what was before is never loaded."""
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(f"step must lie in 0..{self.steps_per_epoch}, got {step}")
        self.epoch, self.step = epoch, step

    def global_batches(self, epoch: int) -> Int64[ndarray, "steps total_batch"]:
        """The images of every optimizer step of an epoch; it does not depend on processes or accumulation."""
        num = len(self._orientations)
        images = np.arange(num) if self._repeats is None else draw(self._repeats, self.seed, epoch)
        order = _shuffled(images, self.seed, epoch) if self.shuffle else images
        arranged = _group(order, self._orientations, self.total_batch)
        return np.resize(arranged, (self.steps_per_epoch, self.total_batch))  # repeats from the start to fill up

    def __len__(self) -> int:
        """Micro-batches that the next iteration yields."""
        return (self.steps_per_epoch - self.step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        images = self.global_batches(epoch)
        epochs = np.full_like(images, epoch)
        if self._repeats is not None:
            epochs += _times_before(images) * _FURTHER
        keys = np.stack([epochs, images], axis=-1)[self.step :]
        share = keys.reshape(len(keys) * self.accumulate, self.world_size, self.micro_batch, 2)[:, self.rank]
        return ([(key, index) for key, index in part.tolist()] for part in share)


class RepeatSampler(Sampler[int]):
    """Yields the indices of an epoch for torch's DataLoader, each image as often as it is drawn, in random order.

        images = ImageFolder(root, transform)
        sampler = RepeatSampler(class_balanced(images.targets))
        loader = DataLoader(images, batch_size=64, sampler=sampler)

    Of several processes each takes every `world_size`-th index, from `rank` on, of the order filled up from its start
    to equal shares: with batches that much smaller, the same images meet in the same steps. The order is a function of
    seed and epoch: call `set_epoch` before every epoch.
    """

    def __init__(self, repeats: Repeats, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        self.repeats, self.seed = repeats, seed
        self.rank, self.world_size = rank, world_size
        self.share = -(-repeats.num_draws // world_size)
        self.start(0, 0)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration yields this epoch, from its beginning."""
        self.start(epoch, 0)

    def start(self, epoch: int, taken: int) -> None:
        """The next iteration yields this epoch without the first `taken` indices of this process."""
        if not 0 <= taken <= self.share:
            raise ValueError(f"taken must lie in 0..{self.share}, got {taken}")
        self.epoch, self.taken = epoch, taken

    def __len__(self) -> int:
        """Indices that the next iteration yields."""
        return self.share - self.taken

    def __iter__(self) -> Iterator[int]:
        order = _shuffled(draw(self.repeats, self.seed, self.epoch), self.seed, self.epoch)
        share = np.resize(order, (self.share, self.world_size))[self.taken :, self.rank]
        return iter(share.tolist())


class EvalSampler(Sampler[list[tuple[int, int]]]):
    """Yields this process's share of all images as lists of (0, index), each image once over all processes.

    Images are sorted by aspect ratio, so that a batch needs little padding, and dealt out in turn: shares differ by one
    image at most and the last batch may be small; nothing is repeated to make them even. A process may get none.
    """

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
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
    return np.arange(rank, num, world_size)


def _shuffled(images: Int64[ndarray, "N"], seed: int, epoch: int) -> Int64[ndarray, "N"]:
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

    Each group fills a batch of its own as the order goes by, and a batch is placed when it becomes full: the order of
    batches is as random as that of images.
    """
    streams = [np.flatnonzero(groups[order] == group) for group in np.unique(groups)]
    whole = [len(stream) // total_batch * total_batch for stream in streams]
    full = np.concatenate([s[:n].reshape(-1, total_batch) for s, n in zip(streams, whole, strict=True)])
    full = full[np.argsort(full[:, -1])]
    left = [s[n:] for s, n in zip(streams, whole, strict=True)]
    return order[np.concatenate([full.ravel(), *left])]
