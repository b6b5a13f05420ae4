"""Batches of annotated images: PyTorch's DataLoader, with its traps closed."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info

from retina import distributed
from retina.data.annotations import Annotations
from retina.data.dataset import CocoDetection
from retina.data.guarded import GuardedDataset, Read
from retina.data.images import MAX_PIXELS
from retina.data.sampler import DetectionBatchSampler, EvalSampler
from retina.data.tile_dataset import dataset_of
from retina.data.tiled import Crops
from retina.data.transforms import Pipeline, Sample, default_pipeline, eval_pipeline, resize
from retina.data.workers import end_workers, patiently, too_late, worker_options, workers_started
from retina.errors import ConfigError, DataError, RetinaError, under
from retina.types import Batch, Targets

T = TypeVar("T")


@dataclass(frozen=True)
class Canvas:
    """The common size of a batch's images, and the colour around them.

    Raises ConfigError if a canvas is no multiple of `pad_multiple`."""

    pad_multiple: int = 128
    """Height and width are multiples of it; 128 is the largest stride of a RetinaNet with levels P3 to P7."""
    pad_value: tuple[int, ...] = (124, 116, 104)
    """Of the padding, per channel; the default is ImageNet's mean in RGB."""
    canvases: Sequence[tuple[int, int]] | None = None
    """(height, width) of the only canvases there may be, for a compiled model. None: as small as the images allow."""

    def __post_init__(self) -> None:
        if any(side % self.pad_multiple for canvas in self.canvases or () for side in canvas):
            raise self._fault(f"are not all multiples of {self.pad_multiple} - round them up")

    def fit(self, sizes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """(height, width) of the smallest canvas that holds images of these sizes, the first of equal ones."""
        height, width = (max(side) for side in zip(*sizes, strict=True))
        if self.canvases is None:
            multiple = self.pad_multiple
            return -(-height // multiple) * multiple, -(-width // multiple) * multiple
        large_enough = [(h, w) for h, w in self.canvases if h >= height and w >= width]
        if not large_enough:
            raise self._fault(f"hold no images of {height}x{width} - add a larger one, or make images smaller")
        return min(large_enough, key=lambda canvas: canvas[0] * canvas[1])

    def _fault(self, problem: str) -> ConfigError:
        canvases = ", ".join(f"{height}x{width}" for height, width in self.canvases or ())
        return ConfigError(f"{canvases} (height x width) {problem}", code="canvas", key="canvases")


@dataclass(frozen=True)
class LoaderConfig:
    """How images are read."""

    num_workers: int = 0
    """Worker processes; 0 reads in this process. Batches do not depend on it."""
    pin_memory: bool = False
    max_pixels: int = MAX_PIXELS
    """Larger images are refused before they are decoded."""
    max_bad_fraction: float = 0.0
    """Share of images that may turn out unreadable."""
    timeout: float = 600.0
    """Seconds that worker processes may take over a batch."""


class BatchLoader(DataLoader[Any]):
    """A DataLoader that tolerates bad images up to a share of them, and raises user-facing errors as they are.

    In training the next readable image (index + 1, + 2, ... mod N) replaces a bad one, so that batches stay full and
    depend on epoch, index and files alone. In evaluation a bad image is left out, and a batch without images is not
    yielded. Training keeps the workers from epoch to epoch; those of evaluation end with the iteration, so that they
    hold no memory while training goes on. What ends workers is in `retina.data.workers`.

    Raises while it is iterated over: DataError for the image that makes more than floor(max_bad_fraction * N) bad, or
    when all are; RetinaError when a worker dies, or has no batch after `config.timeout` seconds; StoppedError when
    `stopping` asks; and any other RetinaError of the data set or the collate.
    """

    faults: dict[int, str]
    """What is wrong with which image, by index, of all batches yielded so far."""
    section = ""
    """The section of the settings that faults name, where arguments are settings ("data")."""
    stopping: Callable[[], int] = staticmethod(lambda: 0)
    """The number of the signal that asks to stop, or 0; asked while worker processes are waited for."""

    def __init__(
        self,
        dataset: CocoDetection,
        sampler: Sampler[list[tuple[int, int]]],
        canvas: Canvas,
        config: LoaderConfig,
        *,
        training: bool,
    ) -> None:
        self.faults = {}
        self.config, self.num_images = config, len(dataset)
        self.annotations = dataset.annotations
        # 0.29 * 100 is 28.999...; and if all images could be bad, there would be endless epochs without a batch
        self.max_bad = min(int(config.max_bad_fraction * len(dataset) + 1e-9), len(dataset) - 1)
        self._guarded = GuardedDataset(dataset, self.max_bad, config.num_workers, substitute=training)
        workers = {"persistent_workers": training} | worker_options() if config.num_workers > 0 else {}
        super().__init__(
            self._guarded,
            batch_sampler=sampler,
            num_workers=config.num_workers,
            collate_fn=partial(_collate, canvas=canvas),
            pin_memory=config.pin_memory,
            # Every new iterator draws a number. From the global generator, that would shift all that the training draws
            # after it, and a resumed run would part from the one it continues.
            generator=torch.Generator().manual_seed(0),
            **workers,
        )

    def set_epoch(self, epoch: int) -> None:
        """The next iteration yields this epoch: another order, other augmentations. For training."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        begin = super().__iter__
        with self._watched(lambda: self._iterator):
            if self._iterator is not None:  # its workers answer that they begin anew
                return self._checked(self._wait_for(begin))
            with workers_started():
                return self._checked(begin())

    def _checked(self, fetched: Any) -> Iterator[Batch]:
        while True:
            with self._watched(lambda: fetched):
                item = self._wait_for(lambda: next(fetched, None))
                if isinstance(item, RetinaError):  # DataLoader would have wrapped its line in the worker's traceback
                    raise item
                self.faults.update(item.faults if item else {})
                if len(self.faults) > self.max_bad:
                    raise self._too_many_faults()
            if item is None:
                return
            if item.content is not None:
                yield item.content

    def _wait_for(self, fetch: Callable[[], T]) -> T:
        if self.num_workers == 0:
            return fetch()
        timeout = self.config.timeout
        return patiently(fetch, self.stopping, timeout, lambda: too_late(timeout, self._guarded.being_read))

    @contextmanager
    def _watched(self, iterator: Callable[[], Any]) -> Iterator[None]:
        """Ends the workers of DataLoader's iterator when anything is raised; a dead worker is one line."""
        with under(self.section):
            try:
                yield
            except Exception as error:
                death = end_workers(getattr(iterator(), "_workers", []), error)
                self._iterator = None
                if death:
                    raise death from error
                raise

    def _too_many_faults(self) -> DataError:
        first = next(iter(self.faults.values()))
        allowed = self.config.max_bad_fraction
        if allowed == 0:
            return DataError(first, code="bad-image")
        problem = f"{len(self.faults)} of {self.num_images} images are bad, {self.max_bad} would be allowed"
        fix = f"mend or remove them, or raise it; the first: {first}"
        return DataError(f"{allowed:g}: {problem} - {fix}", code="bad-images", key="max_bad_fraction")


def train_loader(
    annotations: Annotations,
    pipeline: Pipeline | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    canvas: Canvas = Canvas(),
    config: LoaderConfig = LoaderConfig(),
    sampler: DetectionBatchSampler | None = None,
    crops: Crops | None = None,
) -> BatchLoader:
    """Batches of one epoch per iteration, for training; call `set_epoch` before each. They are always full.

    Batches depend neither on `config.num_workers` nor on the global random state, and leave that alone.

    Args:
        pipeline: augmentation; None flips half of the images and resizes them to 800 x 1333 pixels at most.
        batch_size: images of an optimizer step, over all processes.
        seed: of the order and the augmentation.
        sampler: which images in which order, instead of all of them shuffled; then `batch_size` is not used.
        crops: which part of an image is shown.
    """
    if sampler is None:
        rank, world_size = distributed.rank(), distributed.world_size()
        sampler = DetectionBatchSampler(
            annotations.sizes, total_batch=batch_size, rank=rank, world_size=world_size, seed=seed
        )
    options: Any = {"seed": seed, "max_pixels": config.max_pixels, "crops": crops}
    dataset = dataset_of(annotations, pipeline or default_pipeline(), **options)
    return BatchLoader(dataset, sampler, canvas, config, training=True)


def eval_loader(
    annotations: Annotations,
    pipeline: Pipeline | None = None,
    *,
    batch_size: int = 16,
    canvas: Canvas = Canvas(),
    config: LoaderConfig = LoaderConfig(),
) -> BatchLoader:
    """This process's share of all images in batches, each image once over all processes, except bad ones.

    annotations: also those of tiles, `retina.data.tiled.tiles_of`.
    pipeline: None resizes to 800 x 1333 pixels at most."""
    share = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    sampler = EvalSampler(annotations.sizes, batch_size=batch_size, **share)
    dataset = dataset_of(annotations, pipeline or eval_pipeline(), max_pixels=config.max_pixels)
    return BatchLoader(dataset, sampler, canvas, config, training=False)


def _collate(items: list[Read | RetinaError], canvas: Canvas) -> Read | RetinaError:
    reads = [item for item in items if isinstance(item, Read)]
    if len(reads) < len(items):
        return next(item for item in items if isinstance(item, RetinaError))
    samples = [read.content for read in reads if read.content is not None]
    try:
        in_worker = get_worker_info() is not None
        batch = collate(samples, canvas, shared=in_worker) if samples else None
        if batch is not None and in_worker:
            # Left to the thread that sends it, a failure would lose the batch, and the main process wait for ever.
            for tensor in (batch.images, batch.sizes, *batch.targets, batch.indices, batch.original_sizes):
                tensor.share_memory_()
    except RetinaError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        problem = f"a batch does not fit into (shared) memory ({' '.join(str(error).split())})"
        fix = "lower num_workers or the batch size, or enlarge /dev/shm (docker: --shm-size)"
        return RetinaError(f"{problem} - {fix}", code="out-of-memory", key="num_workers")
    return Read(batch, {index: fault for read in reads for index, fault in read.faults.items()})


def collate(samples: Sequence[Sample], canvas: Canvas = Canvas(), *, shared: bool = False) -> Batch:
    """Puts images at the top left of a common canvas, and pads their targets to a common count M.

    Images are [B C H W] in channels_last memory, which is the order in which they are decoded. Each pixel is written
    once, by the resize that `Sample.size` asks for or as a copy, and with `shared` to memory that other processes can
    map. Boxes and labels of padding are zero; without any object M is 0. It is also a `collate_fn` for torch's
    DataLoader: `partial(collate, canvas=Canvas(32))`.

    Raises ValueError if there are no samples, ConfigError if no canvas is large enough, RuntimeError if there is too
    little (shared) memory.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    sizes = [sample.size or sample.image.shape[:2] for sample in samples]
    height, width = canvas.fit(sizes)
    channels = samples[0].image.shape[2]
    images = _uninitialised((len(samples), height, width, channels), shared)
    shape = (len(samples), max(len(sample.boxes) for sample in samples))
    boxes, labels = np.zeros((*shape, 4), dtype=np.float32), np.zeros(shape, dtype=np.int64)
    valid, crowd = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    padding = np.full((width, channels), canvas.pad_value, dtype=np.uint8)
    for row, (sample, (bottom, right)) in enumerate(zip(samples, sizes, strict=True)):
        target = images[row].numpy()
        resize(sample.image, (bottom, right), out=target[:bottom, :right])
        # by rows: numpy writes one pixel after the other, and would take longer over them than to decode the image
        target[:bottom, right:] = padding[right:]
        target[bottom:] = padding
        objects = slice(len(sample.boxes))
        boxes[row, objects], labels[row, objects] = sample.boxes, sample.labels
        valid[row, objects], crowd[row, objects] = ~sample.crowd, sample.crowd
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
