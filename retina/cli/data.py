"""From the `data` section to checked annotations.

torch is imported only where it is needed, so that faults of the settings and annotations are reported within a
second."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retina.cli.build import build
from retina.data.channels import MOST
from retina.data.checks import DataReport, RecordsError
from retina.data.coco import Annotations, read_coco
from retina.data.health import Files, check_objects, examine, unnamed_images
from retina.data.join import join, share
from retina.data.layouts import annotation_files, locate_split
from retina.data.pixels import FULL, PixelFormat, measured_range
from retina.data.windows import Tiling
from retina.engine.config import COUNT, Ranges, check_ranges, from_mapping
from retina.errors import ConfigError, DataError, check, check_choice
from retina.schema import MOST_PADDING, MOST_PIXELS

if TYPE_CHECKING:
    pass

T = TypeVar("T")
SPLITS = ("train", "val")
PADDING = 32
"""Canvas sides are multiples of it, unless the settings or anchors that are spread over the canvas want another."""

_SHARE = (lambda value: 0 <= value <= 1, "give a share from 0 to 1")
_RANGES: Ranges = {
    **dict.fromkeys(("eval_batch_size", "max_pixels"), COUNT),
    **dict.fromkeys(("short_side", "long_side"), (lambda value: 1 <= value <= MOST_PIXELS, f"give 1 to {MOST_PIXELS}")),
    "pad_multiple": (lambda value: 1 <= value <= MOST_PADDING, f"give 1 to {MOST_PADDING}"),
    **dict.fromkeys(("min_visibility", "max_bad_fraction"), _SHARE),
    "num_workers": (lambda value: value >= 0, "give 0 or more"),
    "timeout": (lambda value: value > 0, "give seconds above 0"),
    "repeat_threshold": (lambda value: 0 < value <= 1, "give a share of the images above 0, at most 1"),
    "min_size": (lambda value: value > 0, "give pixels above 0"),
    "channels": (lambda value: 1 <= value <= MOST, f"give 1 to {MOST}"),
    "tile_empty": (lambda value: 0 <= value <= 0.9, "give a share of the crops, from 0 to 0.9"),
}


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Where one split lies; null means the default place under `data.root`."""

    annotations: str | list[str] | None = None
    """A file, or several, whose images are joined and whose classes are united by name."""
    images: str | list[str] | None = None
    """The folder of all of them, or one for each."""
    fraction: float | list[float] = 1.0
    """Share of the images that is used, of all files or of each."""

    def __post_init__(self) -> None:
        shares = self.fraction if isinstance(self.fraction, list) else [self.fraction]
        check(all(0 < part <= 1 for part in shares), "fraction", self.fraction, "give shares above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The `data` section."""

    name: str
    root: str | None = None
    prepare: dict[str, Any] | None = None
    """A section with `_target_` that is called with `root` and makes the data set where it is not there yet."""
    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    short_side: int = 800
    long_side: int = 1333
    pad_multiple: int | None = None
    """Canvas sides are multiples of this; null: 32, or the coarsest stride of the model if that is less, or if the
    model's anchors are spread over the canvas."""
    num_workers: int = 2
    """Loader processes per training process."""
    timeout: float = 600.0
    """Seconds that loader processes may take over a batch; then the run is saved and stops, naming what is read."""
    eval_batch_size: int | None = None
    """Per process; null: the training micro-batch."""
    group_by_aspect: bool = True
    sampling: str | dict[str, Any] | None = None
    """repeat_factor: images of rare classes are repeated; class_balanced: classes are drawn equally often; a section: a
    sampler of your own, see docs/plugins.md."""
    repeat_threshold: float = 0.001
    """repeat_factor: classes in a smaller share of images are rare; with few classes more, say 0.1."""
    canvases: list[Any] | None = None
    """[height, width] of each, e.g. [[896, 1408], [1408, 896]]: the only canvases, so that a model is compiled once."""
    min_size: float = 1.0
    """Objects narrower or lower than this many pixels after augmentation are dropped,"""
    min_visibility: float = 0.1
    """and those that keep less than this share of their area when cropped."""
    on_error: str = "stop"
    """Or skip: faulty records of the annotation files are left out and listed."""
    max_bad_fraction: float = 0.01
    """Share of unreadable images that are skipped and listed; more of them stop the run."""
    max_pixels: int = 100_000_000
    """Larger images are refused before they are decoded."""
    allow_outside: bool = False
    """Whether file names may lead out of the image folder."""
    channels: int = 3
    """3 is RGB, 1 is grey, others are those of the files: RGBN, multispectral TIFFs (`pip install
    'retina-detect[tiff]'`)."""
    value_range: list[int] | None = None
    """Of 16-bit images, [black, white]; null: measured, where they use less than half of what 16 bits hold."""
    tile: list[int] | str | bool | None = None
    """[height, width] in pixels: training sees crops of that size, evaluation and inference overlapping tiles, each of
    which is resized as an image is (docs/tiles.md). auto: from the sizes of objects and images. false: no tiles,
    whatever the weights were trained with."""
    tile_overlap: float = 0.25
    """Of neighbours, as a share of a tile: objects up to that size are whole in one of them."""
    tile_whole: bool = False
    """Whole images as well, shrunk: for objects larger than the overlap."""
    tile_empty: float = 0.1
    """Share of the crops in training that show no object."""

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, dict):
            check_choice(self.sampling, (None, "repeat_factor", "class_balanced"), "sampling")
        check_choice(self.on_error, ("stop", "skip"), "on_error")
        check_ranges(self, _RANGES)
        check(
            self.short_side <= self.long_side, "short_side", self.short_side, f"give at most long_side={self.long_side}"
        )
        if self.value_range is not None:
            sound = len(self.value_range) == 2 and 0 <= self.value_range[0] < self.value_range[1] <= 65535
            check(sound, "value_range", self.value_range, "give two ascending values from 0 to 65535, or null")
        if self.tiling:
            self.tiling.check()
        elif self.tile:
            check(self.tile == "auto", "tile", self.tile, "give [height, width], auto, false or null")
        for canvas in self.canvases or []:
            sides = isinstance(canvas, list) and len(canvas) == 2 and all(isinstance(side, int) for side in canvas)
            sound = sides and all(1 <= side <= MOST_PIXELS + MOST_PADDING for side in canvas)
            check(sound, "canvases", canvas, f"give [height, width] of each, up to {MOST_PIXELS + MOST_PADDING}")

    @property
    def tiling(self) -> Tiling | None:
        """None also for `auto`, which `with_tile` settles."""
        if not isinstance(self.tile, list):
            return None
        return Tiling((*self.tile,), self.tile_overlap, self.tile_whole)

    @property
    def own_folders(self) -> list[str]:
        """The folders that the settings name. Nothing is written there."""
        return [*several(self.root), *several(self.train.images), *several(self.val.images)]


TILE = ("tile", "tile_overlap", "tile_whole")
"""Settings of data that the weights' header holds."""
NEVER_OF_A_RUN = ("prepare", "allow_outside", "max_pixels")
"""Settings of data that are not taken from a run's config.yaml, which may be a stranger's: they make files and open
doors. Only the command line gives them."""


def data_of(trained: Mapping[str, Any], typed: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> DataConfig:
    """The run's own data at the detector's image size, changed by what was typed.

    With `data=...` nothing but the image size is the run's; another `data.root` leaves the run's places behind."""
    typed = drop_nulls(typed)
    sizes = {key: preprocessing[key] for key in ("short_side", "long_side") if key in preprocessing}
    sizes["channels"] = len(preprocessing.get("pad_value", "RGB"))
    if preprocessing and typed.get("channels", sizes["channels"]) != sizes["channels"]:
        problem = f"{typed['channels']}, but the detector was trained on {sizes['channels']} - leave it out"
        raise ConfigError(problem, code="contradiction", key="data.channels")
    sizes["value_range"] = preprocessing.get("value_range", [*FULL])  # never measured anew
    if preprocessing:
        sizes["tile"] = False
        sizes |= {key: preprocessing[key] for key in TILE if key in preprocessing}
    left_out = (*NEVER_OF_A_RUN, *(SPLITS if "root" in typed else ()))
    base = {"name": "given"}
    if "name" not in typed:
        base |= {key: value for key, value in trained.items() if key not in left_out}
    from_mapping(DataConfig, base, "data")
    return from_mapping(DataConfig, merge(base | sizes, typed), "data")


def with_tile(config: DataConfig, annotations: Annotations) -> DataConfig:
    """With `tile=auto` settled for this data. Raises ConfigError for tiles that are larger than all images."""
    from retina.data.tiled import choose_tile

    if config.tile == "auto":
        tile = choose_tile(annotations, config.short_side, config.long_side)
        return replace(config, tile=list(tile) if tile else False)
    if config.tiling and not (annotations.sizes > config.tiling.tile).any():
        problem = f"{config.tile} is larger than all images of {annotations.file} - give a smaller one, or false"
        raise ConfigError(problem, code="tile-too-large", key="data.tile")
    return config


def as_seen(config: DataConfig, annotations: Annotations, *, with_objects: bool = False) -> Annotations:
    """In tiles, where the settings cut images; or only those tiles that have objects."""
    from retina.data.tiled import tiles_of

    return tiles_of(annotations, config.tiling, with_objects=with_objects) if config.tiling else annotations


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes` over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = merge(base.get(key) or {}, value) if isinstance(value, Mapping) else value
    return merged


def drop_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is left after removing null, also in inner sections, and sections of nothing else."""
    inner = {key: drop_nulls(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value not in (None, {})}


def prepare_data(config: DataConfig, plugins: Sequence[str] = ()) -> None:
    """Rank 0 makes the data set that `data.prepare` describes, where it is not there yet."""
    from retina import distributed

    if config.prepare and config.root:
        root = Path(config.root)
        distributed.on_main(partial(build, config.prepare, "data.prepare", plugins=plugins, root=root))


def load_split(
    config: DataConfig,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    needs: str = "images",
    report: DataReport | None = None,
) -> Annotations:
    """Annotations of "train" or "val", from where the settings say or the default places under `data.root`.

    needs: "images"; or "sizes", for which the annotation file alone is enough; or "ids", all that a results file needs
        to be scored.
    report: takes counts, warnings and faults, also those that are raised. With `data.on_error=skip` faulty records are
        left out, images together with their annotations.

    Raises ConfigError when the settings leave the place open, DataError for what is wrong there."""
    report = DataReport() if report is None else report
    try:
        parts = []
        for file, images, fraction in _places(config, split, needs):
            if needs == "images" and not images.is_dir():
                fix = f"correct data.{split}.images or data.root"
                raise DataError(f"{images}: no such folder of images - {fix}", code="no-images")
            part = read_coco(
                file,
                images,
                classes=classes,
                report=report,
                skip_faulty=config.on_error == "skip",
                allow_outside=config.allow_outside or needs != "images",
                ids_only=needs == "ids",
            )
            parts.append(replace(share(part, fraction), pixels=PixelFormat(channels=config.channels)))
        annotations = join(parts)
    except DataError as fault:
        report.faults += fault.faults if isinstance(fault, RecordsError) else [str(fault)]
        raise
    report.splits[split] = {
        "annotations": str(annotations.file),
        "images": str(annotations.image_root),
        "num_images": len(annotations),
        "num_images_without_objects": int((annotations.offsets[1:] == annotations.offsets[:-1]).sum()),
        "num_objects": annotations.num_objects,
        "num_crowd_regions": int(annotations.crowd.sum()),
        "objects_per_class": dict(zip(annotations.classes, annotations.class_counts().tolist(), strict=True)),
    }
    return annotations


def _places(config: DataConfig, split: str, needs: str) -> Iterator[tuple[Path, Path, float]]:
    """Annotation file, image folder and the share that is used of each part of a split."""
    places: SplitConfig = getattr(config, split)
    files: list[Any] = [*several(places.annotations)]
    folders: list[Any] = [*several(places.images)]
    shares = [*several(places.fraction)]
    if not (files and (folders or needs != "images")):
        if not config.root:
            fix = f"give data.root=DIR, or data.{split}.annotations=FILE and data.{split}.images=DIR"
            raise ConfigError(f"missing - {fix}", code="missing-setting", key="data.root")
        file, images = locate_split(Path(config.root), split)
        files, folders = files or [file], folders or [images]
    folders = folders or ["."]
    for key, values in (("images", folders), ("fraction", shares)):
        if len(values) not in (1, len(files)):
            fix = f"give one, or one for each of {len(files)} annotation files"
            raise ConfigError(f"{values} - {fix}", code="contradiction", key=f"data.{split}.{key}")
    if needs == "ids" and len(files) > 1:
        problem = f"{len(files)} files, but results are those of one - score them one by one"
        raise ConfigError(problem, code="contradiction", key=f"data.{split}.annotations")
    for number, file in enumerate(files):
        yield Path(file), Path(folders[number % len(folders)]), float(shares[number % len(shares)])


def several(value: T | list[T] | None) -> list[T]:
    """What a setting holds that may be one value, a list or nothing."""
    return value if isinstance(value, list) else [] if value is None else [value]


def named_splits(config: DataConfig) -> list[str]:
    """The splits that the settings name an annotation file of, or that have one under `data.root`; else "train"."""

    def is_there(split: str) -> bool:
        files = annotation_files(Path(config.root), split) if config.root else []
        return bool(getattr(config, split).annotations) or any(map(os.path.lexists, files))

    return [split for split in SPLITS if is_there(split)] or ["train"]


def check_data(config: DataConfig, splits: Mapping[str, Annotations], report: DataReport) -> PixelFormat:
    """How the images are to be read, after the checks.

    Before anything is trained or scored: image files by their headers, and "train" against "val" if both are given.

    All faults go to `report`. Images that cannot be used (missing, unreadable, not of the size stated) are tolerated
    up to `data.max_bad_fraction` of a split, since loaders leave them out; other faults are tolerated with
    `data.on_error=skip`. The pixels are not read: tools/doctor.py does that.

    Raises RecordsError, which lists all that cannot be tolerated."""
    files = examine(splits, report, max_pixels=config.max_pixels)
    report.warnings += left_over(config, splits, report)
    grave: list[str] = []
    for split, annotations in splits.items():
        bad = list(files[split].bad.values())
        # as in the loaders: 0.29 * 100 is 28.999...; and some images must be left
        allowed = min(int(config.max_bad_fraction * len(annotations) + 1e-9), len(annotations) - 1)
        if len(bad) > max(allowed, 1):
            share = f"{len(bad)} of {len(annotations)} cannot be used, {allowed} may be"
            grave.append(f"{annotations.file}: images: {share} - mend them, or raise data.max_bad_fraction")
        grave += bad if len(bad) > allowed else []
        grave += check_objects(annotations)
    if grave:
        raise RecordsError(grave)
    return pixel_format(config, splits, files, report)


def left_over(config: DataConfig, splits: Mapping[str, Annotations], report: DataReport) -> list[str]:
    """Lines on images that no record names, where all records of all splits are read.

    Where there are faults they have nothing to add: a name that is misspelt leaves an image over as well."""
    shares = [*several(config.train.fraction), *several(config.val.fraction)]
    is_whole = all(part == 1 for part in shares) and {*named_splits(config)} <= splits.keys()
    return [*unnamed_images(splits)] if is_whole and not report.faults else []


def pixel_format(
    config: DataConfig, splits: Mapping[str, Annotations], files: Mapping[str, Files], report: DataReport
) -> PixelFormat:
    """As the settings say, or measured on the first split; `report` tells what was measured."""
    if config.value_range is not None:
        return PixelFormat((config.value_range[0], config.value_range[1]), config.channels)
    first, annotations = next(iter(splits.items()))
    deep = files[first].deep
    options = {"max_pixels": config.max_pixels, "channels": config.channels}
    low, high = measured_range((annotations.path(row) for row in deep), **options)
    if (low, high) != FULL:
        problem = f"{len(deep)} have 16 bits per channel, and values of {low} to {high}: these become black and white"
        report.warnings.append(f"{annotations.file}: images: {problem} - give data.value_range=[low,high] for others")
    return PixelFormat((low, high), config.channels)


def load_checked(
    config: DataConfig,
    splits: Sequence[str],
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    say: Callable[[str], None],
) -> list[Annotations]:
    """Annotations of the splits, on every rank, after the checks of tools/doctor.py except those of the pixels.

    Labels follow `classes`, or else the first split. `say` gets a line on rank 0 for each fault that is tolerated; all
    of them go to `folder/data_report.json`. Raises as `load_split` and `check_data` do, on one rank alone."""
    from retina import distributed

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
        low, high = distributed.on_main(lambda: [*check_data(config, loaded, report).value_range])
    finally:
        if distributed.is_main() and (report.faults or report.warnings):
            report.write(folder / "data_report.json")
    for line in report.lines() if distributed.is_main() else []:
        say(line)
    pixels = PixelFormat((low, high), config.channels)
    return [replace(annotations, pixels=pixels) for annotations in loaded.values()]
