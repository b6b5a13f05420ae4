"""A split of a data set for a trained detector: its settings, its annotations and its images, in batches."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retina.cli.build import build
from retina.engine.config import DataConfig, from_mapping

if TYPE_CHECKING:
    from retina.data.coco import Annotations
    from retina.data.loader import BatchLoader
    from retina.inference import Detector

T = TypeVar("T")

NEVER_OF_A_RUN = ("prepare", "allow_outside", "max_pixels")
"""Settings of data that are not taken from a run's config.yaml, which may be a stranger's: they make files and open
doors. Only the command line gives them."""


def data_of(trained: Mapping[str, Any], given: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> DataConfig:
    """The run's own data at the detector's image size, changed by what was given.

    With `data=...` nothing but the image size is the run's; another `data.root` leaves the run's places behind."""
    given = drop_nulls(given)
    sizes = {key: preprocessing[key] for key in ("short_side", "long_side") if key in preprocessing}
    left_out = (*NEVER_OF_A_RUN, *(("train", "val") if "root" in given else ()))
    own = {} if "name" in given else {key: value for key, value in trained.items() if key not in left_out}
    from_mapping(DataConfig, {"name": "given"} | own, "data")
    return from_mapping(DataConfig, merge({"name": "given"} | own | sizes, given), "data")


def merge(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `given` over it, section by section."""
    merged = dict(base)
    for key, value in given.items():
        merged[key] = merge(base.get(key) or {}, value) if isinstance(value, Mapping) else value
    return merged


def drop_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is left after removing null, also in inner sections, and sections of nothing else."""
    inner = {key: drop_nulls(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


def open_split(
    data: DataConfig, split: str, detector: "Detector", output: Path, *, batch_size: int | None
) -> "tuple[Annotations, BatchLoader]":
    """Checked annotations and their images as the detector wants them; `data_report.json` goes to `output`.

    batch_size: null for the detector's own."""
    from functools import partial

    from retina import distributed
    from retina.engine.build import build_eval_loader, canvas_of, load_checked

    if data.prepare and data.root:
        prepare, root = data.prepare, Path(data.root)
        distributed.on_main(lambda: build(prepare, "data.prepare", root=root))
    complain = partial(print, file=sys.stderr)
    (annotations,) = load_checked(data, [split], output, classes=detector.classes, say=complain)
    loader = build_eval_loader(
        annotations,
        data,
        canvas_of(data, detector.canvas),
        batch_size=batch_size or detector.card.preprocessing["batch_size"],
        pin_memory=detector.device.type == "cuda",
    )
    return annotations, loader


def progress(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The items, with a bar on the main process's terminal."""
    from rich.console import Console
    from rich.progress import track

    from retina import distributed

    console = Console(stderr=True)
    shown = console.is_terminal and distributed.is_main()
    return track(items, what, total, console=console, transient=True, disable=not shown)
