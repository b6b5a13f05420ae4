"""From the `data` section to annotations (`engine/splits.py`) and loaders."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from retina import distributed
from retina.data.coco import Annotations
from retina.data.dataset import DetectionDataset
from retina.data.images import MAX_PIXELS
from retina.data.loader import BatchLoader, eval_loader, train_loader
from retina.data.report import DataReport
from retina.data.sampler import DetectionBatchSampler, EvalSampler, repeats_of
from retina.data.transforms import Pipeline, eval_pipeline
from retina.engine.config import DataConfig, TrainConfig
from retina.engine.splits import check_data, load_split
from retina.errors import ConfigError


def load_checked(
    config: DataConfig,
    splits: Sequence[str],
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    say: Callable[[str], None],
) -> list[Annotations]:
    """Annotations of the splits, on every rank, after the checks of tools/doctor.py but for the pixels.

    Labels follow `classes`, or else the first split. What is found is told by `say` on rank 0 if it is tolerated; all
    of it goes to `folder/data_report.json`. Raises as `load_split` and `check_data` do, on one rank alone."""
    report = DataReport()
    loaded: dict[str, Annotations] = {}

    def read() -> None:
        for split in splits:
            known = classes or (loaded[splits[0]].classes if loaded else None)
            loaded[split] = load_split(config, split, classes=known, report=report)

    goes_first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        # one process of each machine: large files are parsed once, and the others find what came of them in the cache
        distributed.on_all(lambda: read() if goes_first else None)
        distributed.on_all(lambda: None if goes_first else read())
        distributed.on_main(lambda: check_data(config, loaded, report))
    finally:
        if distributed.is_main() and (report.faults or report.warnings):
            report.write(folder / "data_report.json")
    for line in report.lines() if distributed.is_main() else []:
        say(line)
    return list(loaded.values())


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
    repeats = repeats_of(annotations, config.sampling, threshold=config.repeat_threshold)
    try:
        sampler = DetectionBatchSampler(
            annotations.sizes,
            total_batch=train.batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            accumulate=train.accumulate,
            seed=train.seed,
            group_by_aspect=config.group_by_aspect,
            repeats=repeats,
        )
    except ValueError as fault:
        raise ConfigError(f"train.batch_size: {fault}") from None
    loader = train_loader(
        DetectionDataset(annotations, pipeline, seed=train.seed, max_pixels=config.max_pixels),
        sampler,
        num_workers=config.num_workers,
        divisor=divisor,
        pad_value=pad_value,
        max_bad_fraction=config.max_bad_fraction,
        canvases=_canvases(config.canvases),
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
    canvases: Sequence[Sequence[int]] | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bad_fraction: float = 0.0,
) -> BatchLoader:
    """This rank's share of images, each once over all ranks, but for the unreadable ones: those are left out."""
    sampler = EvalSampler(
        annotations.sizes, batch_size=batch_size, rank=distributed.rank(), world_size=distributed.world_size()
    )
    return eval_loader(
        DetectionDataset(annotations, eval_pipeline(short_side, long_side), seed=0, max_pixels=max_pixels),
        sampler,
        num_workers=num_workers,
        divisor=divisor,
        pad_value=pad_value,
        max_bad_fraction=max_bad_fraction,
        canvases=_canvases(canvases),
        pin_memory=pin_memory,
    )


def _canvases(sides: Sequence[Sequence[int]] | None) -> list[tuple[int, int]] | None:
    return [(height, width) for height, width in sides] if sides else None
