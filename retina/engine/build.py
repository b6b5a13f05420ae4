"""From the `data` section to annotations (`engine/splits.py`) and loaders."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from retina import distributed
from retina.data.annotations import Annotations
from retina.data.checks import DataReport
from retina.data.loader import BatchLoader, Canvas, LoaderConfig, eval_loader, train_loader
from retina.data.repeats import repeats_of
from retina.data.sampler import DetectionBatchSampler, Draws
from retina.data.transforms import Pipeline, eval_pipeline
from retina.engine.config import DataConfig, TrainConfig
from retina.engine.splits import check_data, load_split
from retina.errors import ConfigError, under


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


def loader_config(config: DataConfig, *, pin_memory: bool) -> LoaderConfig:
    """How the settings want images to be read."""
    return LoaderConfig(config.num_workers, pin_memory, config.max_pixels, config.max_bad_fraction)


def canvas_of(config: DataConfig, usual: Canvas) -> Canvas:
    """The settings' canvas, or `usual` where they leave it open. Raises ConfigError for a canvas of wrong sides."""
    canvases = [(height, width) for height, width in config.canvases] if config.canvases else None
    with under("data"):
        return Canvas(config.pad_multiple or usual.pad_multiple, usual.pad_value, canvases)


def build_train_loader(
    annotations: Annotations,
    pipeline: Pipeline,
    config: DataConfig,
    train: TrainConfig,
    canvas: Canvas,
    *,
    draws: Draws | None = None,
    pin_memory: bool = False,
) -> tuple[BatchLoader, DetectionBatchSampler]:
    """This rank's micro-batches. Raises ConfigError when the batch size cannot be cut evenly.

    draws: the sampler that a section `sampling` describes; its order is kept, that of others is shuffled."""
    repeats = draws
    if repeats is None:
        repeats = repeats_of(annotations, config.sampling, threshold=config.repeat_threshold)
    try:
        with under("data"):
            sampler = DetectionBatchSampler(
                annotations.sizes,
                total_batch=train.batch_size,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                accumulate=train.accumulate,
                seed=train.seed,
                shuffle=draws is None,
                group_by_aspect=config.group_by_aspect,
                repeats=repeats,
            )
    except ValueError as fault:
        raise ConfigError(f"{fault}", code="batch-size", key="train.batch_size") from None
    reading = loader_config(config, pin_memory=pin_memory)
    loader = train_loader(annotations, pipeline, seed=train.seed, canvas=canvas, config=reading, sampler=sampler)
    loader.section = "data."
    return loader, sampler


def build_eval_loader(
    annotations: Annotations, config: DataConfig, canvas: Canvas, *, batch_size: int, pin_memory: bool = False
) -> BatchLoader:
    """This rank's share of images, each once over all ranks, except unreadable ones."""
    pipeline = eval_pipeline(config.short_side, config.long_side)
    reading = loader_config(config, pin_memory=pin_memory)
    loader = eval_loader(annotations, pipeline, batch_size=batch_size, canvas=canvas, config=reading)
    loader.section = "data."
    return loader
