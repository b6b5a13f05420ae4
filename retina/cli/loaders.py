"""From the `data` section and checked annotations to loaders.

torch is imported only where images are loaded."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retina.cli.build import call
from retina.cli.data import PADDING, TILE, DataConfig, as_seen, load_checked, prepare_data, with_tile
from retina.data.coco import Annotations
from retina.data.pixels import FULL
from retina.engine.config import TrainConfig
from retina.errors import ConfigError, under
from retina.printing import say

if TYPE_CHECKING:
    from retina.cli.recipe import Recipe
    from retina.data.loader import BatchLoader, Canvas, LoaderConfig
    from retina.data.sampler import DetectionBatchSampler, Draws
    from retina.data.transforms import Pipeline
    from retina.inference import Detector
    from retina.model.retinanet import RetinaNet

T = TypeVar("T")


def canvas_of(config: DataConfig, usual: "Canvas") -> "Canvas":
    """The settings' canvas, or `usual` where they leave it open. Raises ConfigError for a canvas of wrong sides."""
    from retina.data.loader import Canvas

    canvases = [(height, width) for height, width in config.canvases] if config.canvases else None
    with under("data"):
        return Canvas(config.pad_multiple or usual.pad_multiple, usual.pad_value, canvases)


def _loader_config(config: DataConfig, pin_memory: bool) -> "LoaderConfig":
    from retina.data.loader import LoaderConfig

    return LoaderConfig(config.num_workers, pin_memory, config.max_pixels, config.max_bad_fraction, config.timeout)


def build_loaders(
    config: DataConfig,
    training: TrainConfig,
    recipe: "Recipe",
    train: Annotations,
    val: Annotations,
    model: "RetinaNet",
) -> "tuple[BatchLoader, DetectionBatchSampler, BatchLoader, dict[str, Any]]":
    """Loader and sampler of `train`, loader of `val`, and the preprocessing for the weights' header."""
    from retina.data.loader import Canvas

    stride, spread = max(model.strides), model.arguments["canvas_strides"]
    pad_multiple = config.pad_multiple or (stride if spread else min(stride, PADDING))
    if spread and pad_multiple % stride:
        problem = f"{pad_multiple} - anchors with strides from the canvas stand on a grid only where it is a multiple"
        fix = f"of {stride}: give that, or model.canvas_strides=false"
        raise ConfigError(f"{problem} {fix}", code="pad-multiple", key="data.pad_multiple")
    pin_memory = next(model.parameters()).is_cuda
    canvas = canvas_of(config, Canvas(pad_multiple, model.pad_value))
    draws = call(recipe.sampler, "data.sampling", annotations=train) if recipe.sampler else None
    with_tile(config, train)
    loader, sampler = build_train_loader(
        train, recipe.pipeline, config, training, canvas, draws=draws, pin_memory=pin_memory
    )
    batch_size = config.eval_batch_size or sampler.micro_batch
    val_loader = build_eval_loader(as_seen(config, val), config, canvas, batch_size=batch_size, pin_memory=pin_memory)
    preprocessing: dict[str, Any] = {key: getattr(config, key) for key in ("short_side", "long_side")}
    preprocessing |= {"value_range": list(train.pixels.value_range)} if train.pixels.value_range != FULL else {}
    preprocessing |= {key: getattr(config, key) for key in TILE} if config.tiling else {}
    preprocessing |= {"pad_multiple": pad_multiple, "pad_value": list(model.pad_value)}
    return loader, sampler, val_loader, preprocessing | {"precision": training.precision, "batch_size": batch_size}


def build_train_loader(
    annotations: Annotations,
    pipeline: "Pipeline",
    config: DataConfig,
    train: TrainConfig,
    canvas: "Canvas",
    *,
    draws: "Draws | None" = None,
    pin_memory: bool = False,
) -> "tuple[BatchLoader, DetectionBatchSampler]":
    """This rank's micro-batches. Raises ConfigError when the batch size cannot be cut evenly.

    draws: the sampler that a section `sampling` describes; its order is kept, that of others is shuffled."""
    import numpy as np

    from retina import distributed
    from retina.data.loader import train_loader
    from retina.data.repeats import Repeats, repeats_of
    from retina.data.sampler import DetectionBatchSampler
    from retina.data.tiled import Crops

    repeats: Draws | Repeats | None = draws
    crops = Crops(config.tiling, config.tile_empty) if config.tiling else None
    if repeats is None:
        rare = repeats_of(annotations, config.sampling, threshold=config.repeat_threshold)
        repeats = crops.repeats(annotations, rare) if crops else rare
    sizes = np.minimum(annotations.sizes, crops.tiling.tile) if crops else annotations.sizes
    try:
        with under("data"):
            sampler = DetectionBatchSampler(
                sizes,
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
    reading = _loader_config(config, pin_memory)
    options: dict[str, Any] = {"seed": train.seed, "canvas": canvas, "config": reading}
    loader = train_loader(annotations, pipeline, sampler=sampler, crops=crops, **options)
    loader.section = "data"
    return loader, sampler


def build_eval_loader(
    annotations: Annotations, config: DataConfig, canvas: "Canvas", *, batch_size: int, pin_memory: bool = False
) -> "BatchLoader":
    """This rank's share of images, each once over all ranks, except unreadable ones."""
    from retina.data.loader import eval_loader
    from retina.data.transforms import eval_pipeline

    pipeline, reading = eval_pipeline(config.short_side, config.long_side), _loader_config(config, pin_memory)
    loader = eval_loader(annotations, pipeline, batch_size=batch_size, canvas=canvas, config=reading)
    loader.section = "data"
    return loader


def open_split(
    data: DataConfig, split: str, detector: "Detector", output: Path, *, batch_size: int | None
) -> "tuple[Annotations, BatchLoader]":
    """Checked annotations and their images as the detector takes them; `data_report.json` goes to `output`.

    batch_size: None for the detector's own."""
    prepare_data(data)
    complain = partial(say, error=True)
    (annotations,) = load_checked(data, [split], output, classes=detector.classes, say=complain)
    if data.tile == "auto":
        data = with_tile(data, annotations)
    loader = build_eval_loader(
        as_seen(data, annotations),
        data,
        canvas_of(data, detector.canvas),
        batch_size=batch_size or detector.card.preprocessing["batch_size"],
        pin_memory=detector.device.type == "cuda",
    )
    return annotations, loader


def unreadable_images(loader: "BatchLoader") -> list[str]:
    """One line for each image that the loader of any process could not read."""
    from retina import distributed

    faults = dict(one for part in distributed.gather_objects(list(loader.faults.items())) for one in part)
    return [*dict.fromkeys(line for _, line in sorted(faults.items()))]  # tiles of one image have the same


def progress(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The items, with a bar on the main process's terminal."""
    from rich.console import Console
    from rich.progress import track

    from retina import distributed

    console = Console(stderr=True)
    shown = console.is_terminal and distributed.is_main()
    return track(items, what, total, console=console, transient=True, disable=not shown)
