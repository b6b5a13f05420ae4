"""From the `data` section to annotations and loaders."""

from collections.abc import Sequence
from pathlib import Path

from retina import distributed
from retina.data.coco import Annotations, locate_split, read_coco
from retina.data.dataset import DetectionDataset
from retina.data.loader import BatchLoader, eval_loader, train_loader
from retina.data.sampler import DetectionBatchSampler, EvalSampler
from retina.data.transforms import Pipeline, eval_pipeline
from retina.engine.config import DataConfig, SplitConfig, TrainConfig
from retina.errors import ConfigError, DataError


def load_split(
    config: DataConfig, split: str, *, classes: Sequence[str] | None = None, images_needed: bool = True
) -> Annotations:
    """Annotations of "train" or "val", from where the settings say or the default places under `data.root`.

    Without `images_needed`, the annotation file is enough: a results file can be scored without any image.

    Raises ConfigError when the settings leave the place open, DataError for what is wrong there."""
    places: SplitConfig = getattr(config, split)
    if places.annotations and (places.images or not images_needed):
        file, images = Path(places.annotations), Path(places.images or ".")
    elif config.root:
        file, images = locate_split(Path(config.root), split)
        file, images = Path(places.annotations or file), Path(places.images or images)
    else:
        raise ConfigError(
            f"data.root: missing - give data.root=DIR, or data.{split}.annotations=FILE and data.{split}.images=DIR"
        )
    if images_needed and not images.is_dir():
        raise DataError(f"{images}: no such folder of images - correct data.{split}.images or data.root")
    return read_coco(file, images, classes=classes)


def build_train_loader(
    annotations: Annotations,
    pipeline: Pipeline,
    config: DataConfig,
    train: TrainConfig,
    *,
    divisor: int,
    pad_value: tuple[int, int, int],
    pin_memory: bool,
) -> tuple[BatchLoader, DetectionBatchSampler]:
    """This rank's micro-batches. Raises ConfigError when the batch size cannot be cut evenly."""
    try:
        sampler = DetectionBatchSampler(
            annotations.sizes,
            total_batch=train.batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            accumulate=train.accumulate,
            seed=train.seed,
            group_by_aspect=config.group_by_aspect,
        )
    except ValueError as fault:
        raise ConfigError(f"train.batch_size: {fault}") from None
    loader = train_loader(
        DetectionDataset(annotations, pipeline, seed=train.seed),
        sampler,
        num_workers=config.num_workers,
        divisor=divisor,
        pad_value=pad_value,
        canvases=[(height, width) for height, width in config.canvases] if config.canvases else None,
        pin_memory=pin_memory,
    )
    return loader, sampler


def build_eval_loader(
    annotations: Annotations,
    *,
    short_side: int,
    long_side: int,
    batch_size: int,
    num_workers: int,
    divisor: int,
    pad_value: tuple[int, int, int],
    pin_memory: bool,
) -> BatchLoader:
    """This rank's share of images, each once over all ranks."""
    sampler = EvalSampler(
        annotations.sizes, batch_size=batch_size, rank=distributed.rank(), world_size=distributed.world_size()
    )
    return eval_loader(
        DetectionDataset(annotations, eval_pipeline(short_side, long_side), seed=0),
        sampler,
        num_workers=num_workers,
        divisor=divisor,
        pad_value=pad_value,
        pin_memory=pin_memory,
    )
