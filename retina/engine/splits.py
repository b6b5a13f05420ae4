"""From the `data` section to checked annotations. Loads no torch, so that faults are told within a second."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from retina.data.checks import DataReport, RecordsError
from retina.data.coco import Annotations, locate_split, read_coco
from retina.data.health import check_objects, examine
from retina.engine.config import DataConfig, SplitConfig
from retina.errors import ConfigError, DataError

SPLITS = ("train", "val")


def load_split(
    config: DataConfig,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    images_needed: bool = True,
    report: DataReport | None = None,
) -> Annotations:
    """Annotations of "train" or "val", from where the settings say or the default places under `data.root`.

    Without `images_needed`, the annotation file is enough: a results file can be scored without any image. `report`
    takes what was read, warnings and faults, also those that are raised. With `data.on_error=skip` faulty records are
    left out, images together with their annotations.

    Raises ConfigError when the settings leave the place open, DataError for what is wrong there."""
    report = DataReport() if report is None else report
    try:
        file, images = _places(config, split, images_needed)
        if images_needed and not images.is_dir():
            raise DataError(f"{images}: no such folder of images - correct data.{split}.images or data.root")
        annotations = read_coco(
            file,
            images,
            classes=classes,
            report=report,
            skip_faulty=config.on_error == "skip",
            allow_outside=config.allow_outside or not images_needed,
        )
    except DataError as fault:
        report.faults += fault.faults if isinstance(fault, RecordsError) else [str(fault)]
        raise
    report.splits[split] = {
        "annotations": str(file),
        "images": str(images),
        "num_images": len(annotations),
        "num_images_without_objects": int((annotations.offsets[1:] == annotations.offsets[:-1]).sum()),
        "num_objects": annotations.num_objects,
        "num_crowd_regions": int(annotations.crowd.sum()),
        "objects_per_class": dict(zip(annotations.classes, annotations.class_counts().tolist(), strict=True)),
    }
    return annotations


def check_data(config: DataConfig, splits: Mapping[str, Annotations], report: DataReport) -> None:
    """Before anything is trained or scored: image files by their headers, and "train" against "val" if both are given.

    Everything found goes to `report`. Images that cannot be used (missing, unreadable, not of the size stated) are
    tolerated up to `data.max_bad_fraction` of a split, since loaders leave them out; what else is at fault is tolerated
    with `data.on_error=skip`. The pixels are not read: tools/doctor.py does that.

    Raises:
        RecordsError: what was found cannot be tolerated; all of it is listed.
    """
    files = examine(splits, report, max_pixels=config.max_pixels)
    grave: list[str] = []
    for split, annotations in splits.items():
        bad = list(files[split].bad.values())
        # as in the loaders: 0.29 * 100 is 28.999...; and some images must be left
        allowed = min(int(config.max_bad_fraction * len(annotations) + 1e-9), len(annotations) - 1)
        if len(bad) > max(allowed, 1):
            grave.append(
                f"{annotations.file}: images: {len(bad)} of {len(annotations)} cannot be used, {allowed} may be - mend "
                "them, or raise data.max_bad_fraction"
            )
        grave += bad if len(bad) > allowed else []
        grave += check_objects(annotations) if config.on_error == "stop" else []
    if grave:
        raise RecordsError(grave)


def named_splits(config: DataConfig) -> list[str]:
    """The splits that the settings name an annotation file of, or that have one under `data.root`; else "train"."""

    def is_there(split: str) -> bool:
        if getattr(config, split).annotations:
            return True
        names = [f"instances_{split}{year}.json" for year in ("", "2017")]
        return any(os.path.lexists(Path(config.root or ".", "annotations", name)) for name in names if config.root)

    return [split for split in SPLITS if is_there(split)] or ["train"]


def _places(config: DataConfig, split: str, images_needed: bool) -> tuple[Path, Path]:
    places: SplitConfig = getattr(config, split)
    if places.annotations and (places.images or not images_needed):
        return Path(places.annotations), Path(places.images or ".")
    if config.root:
        file, images = locate_split(Path(config.root), split)
        return Path(places.annotations or file), Path(places.images or images)
    raise ConfigError(
        f"data.root: missing - give data.root=DIR, or data.{split}.annotations=FILE and data.{split}.images=DIR"
    )
