"""Which images an epoch shows, and how often, for rare classes: repeat factors, and classes drawn equally often.

Beside the road: without any of this, an epoch shows every image once. Both say how many times an image is to be seen on
average, which need not be whole; `Repeats.draw` makes whole numbers of that, from seed and epoch alone. The images lie
end to end on a line, each as long as its number, in a random order, and a comb with teeth at distance 1 is laid over it
at a random place. An image gets as many draws as teeth hit it: its number rounded up or down, right on average, while
the total is the same in every epoch. (Systematic sampling: Madow, On the Theory of Systematic Sampling, II, Annals of
Mathematical Statistics 1949.)
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64
from numpy import ndarray

from retina.data.annotations import Annotations
from retina.data.sampler import EpochSampler, check_rank, random_keys, shuffled
from retina.errors import check_choice

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

    def draw(self, seed: int, epoch: int) -> Int64[ndarray, "num_draws"]:
        """The images of an epoch in ascending order, each as often as it is drawn, whatever the version of numpy."""
        keys = random_keys(len(self.images) + 1, seed, epoch, 1)  # a stream of its own, not that of the shuffling
        order = np.lexsort((keys[1:], self.strata))
        ends = np.cumsum(self.times[order])
        ends *= self.num_draws / ends[-1]
        comb = np.arange(self.num_draws) + (int(keys[0]) >> 11) / 2**53
        rows = np.searchsorted(ends[:-1], comb, side="right")  # rounding may put the last end before the last tooth
        return np.sort(self.images[order[rows]])


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


def repeats_of(annotations: Annotations, sampling: object, *, threshold: float) -> Repeats | None:
    """For `data.sampling`: "repeat_factor", "class_balanced" or None, which is every image once.

    Crowd regions do not count: nothing is learned from them. Raises ConfigError for another word, ValueError as the
    functions above."""
    check_choice(sampling, (None, "repeat_factor", "class_balanced"), "sampling")
    if sampling is None:
        return None
    counts = ~annotations.crowd
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))[counts]
    if sampling == "repeat_factor":
        return repeat_factors(annotations.labels[counts], images, num_images=len(annotations), threshold=threshold)
    return class_balanced(annotations.labels[counts], images, num_images=len(annotations))


class RepeatSampler(EpochSampler[int]):
    """Yields the indices of an epoch for torch's DataLoader, each image as often as it is drawn, in random order.

        images = ImageFolder(root, transform)
        sampler = RepeatSampler(class_balanced(images.targets))
        loader = DataLoader(images, batch_size=64, sampler=sampler)

    Of several processes each takes every `world_size`-th index, from `rank` on, of the order filled up from its start
    to equal shares: with batches that much smaller, the same images meet in the same steps. The order is a function of
    seed and epoch: call `set_epoch` before every epoch.
    """

    def __init__(self, repeats: Repeats, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        check_rank(rank, world_size)
        self.repeats, self.seed = repeats, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = -(-repeats.num_draws // world_size)
        self.start(0, 0)

    def __len__(self) -> int:
        """Indices that the next iteration yields."""
        return self.steps_per_epoch - self.step

    def __iter__(self) -> Iterator[int]:
        order = shuffled(self.repeats.draw(self.seed, self.epoch), self.seed, self.epoch)
        return iter(np.resize(order, (self.steps_per_epoch, self.world_size))[self.step :, self.rank].tolist())


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
