"""Checks a data set, annotations and images, and changes nothing in it. Exit code 0: healthy, 2: faults found.

python tools/doctor.py data=coco data.root=DIR
python tools/doctor.py data=coco data.root=DIR decode=false output=REPORT.json

Both splits are checked, or the only one there is. The screen shows the first faults; the report file has them all.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.compose import entry
from retina.cli.data import DataConfig, as_seen, left_over, load_split, named_splits, pixel_format, with_tile
from retina.cli.loaders import progress
from retina.data.advice import advise
from retina.data.checks import DataReport
from retina.data.plots import draw_plots, is_ours
from retina.engine.config import from_mapping
from retina.errors import ConfigError, DataError, plain
from retina.files import read_plain
from retina.printing import say
from retina.schema import parse_json

if TYPE_CHECKING:
    from retina.data.coco import Annotations


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """configs/doctor.yaml says what each is."""

    data: dict[str, Any]
    decode: bool
    output: str
    plots: bool
    traceback: bool


@entry("doctor", DoctorConfig)
def main(config: DoctorConfig) -> int:
    data = from_mapping(DataConfig, config.data, "data")
    output = Path(config.output)
    plots = output.with_name(f"{output.stem}_plots.png") if config.plots else None
    refuse_to_overwrite(output, plots, data)

    report = DataReport()
    splits = read_splits(data, report)
    examine_images(data, splits, report, decode=config.decode)
    report.advice += advise_tiles(data, splits)
    seen = {split: as_seen(data, annotations) for split, annotations in splits.items()}
    report.advice += advise(seen, data.short_side, data.long_side)
    report.write(output)
    if plots and splits:
        draw_plots(plots, splits, data.short_side, data.long_side)
    advice = [f"advice: {line}" for line in report.advice]
    say(*describe(report), *report.lines(), *advice, verdict(report, output))
    return 2 if report.faults else 0


def advise_tiles(data: DataConfig, splits: Mapping[str, "Annotations"]) -> list[str]:
    """A line if the objects of the training images call for tiles that the settings have not."""
    train = splits.get("train")
    tile = with_tile(replace(data, tile="auto"), train).tile if train is not None and not data.tiling else None
    if not tile:
        return []
    return [f"train: the smallest objects are lost in whole images - give 'data.tile={tile}', see docs/tiles.md"]


def read_splits(data: DataConfig, report: DataReport) -> dict[str, "Annotations"]:
    """What can be read of each split; faulty records are left out, so that the rest is examined too."""
    splits: dict[str, Annotations] = {}
    for split in named_splits(data):
        classes = splits["train"].classes if "train" in splits else None
        try:
            splits[split] = load_split(replace(data, on_error="skip"), split, classes=classes, report=report)
        except DataError:
            continue  # in the report
    return splits


def examine_images(data: DataConfig, splits: Mapping[str, "Annotations"], report: DataReport, *, decode: bool) -> None:
    """Image files, every pixel of them with `decode`, and the splits against each other."""
    from retina.data.health import examine, undecodable

    files = examine(splits, report, max_pixels=data.max_pixels, thorough=decode)
    report.warnings += left_over(data, splits, report)
    if splits:
        pixel_format(data, splits, files, report)
    for split, annotations in splits.items() if decode else []:
        rows = [row for row in range(len(annotations)) if row not in files[split].bad]
        faults = undecodable(annotations, rows, max_pixels=data.max_pixels)
        report.faults += [fault for fault in progress(faults, f"decoding {split}", len(rows)) if fault]


def describe(report: DataReport) -> list[str]:
    """What was read: places, counts, and objects per class."""
    lines = []
    for split, counts in report.splits.items():
        empty = f"{counts['num_images_without_objects']:,} without objects"
        objects = f"{counts['num_objects']:,} objects, {counts['num_crowd_regions']:,} crowd regions"
        lines.append(f"{split}: {counts['num_images']:,} images ({empty}), {objects} - {counts['annotations']}")
    tables = {split: counts["objects_per_class"] for split, counts in report.splits.items()}
    if names := list(dict.fromkeys(name for table in tables.values() for name in table)):
        width = max(len(plain(name)) for name in ["class", *names])
        lines += ["", f"{'class':<{width}}" + "".join(f"{split:>12}" for split in tables)]
        for name in names:
            lines.append(f"{plain(name):<{width}}" + "".join(f"{table.get(name, 0):>12,}" for table in tables.values()))
        lines.append("")
    return lines


def verdict(report: DataReport, output: Path) -> str:
    def count(lines: list[str], what: str) -> str:
        return f"{len(lines):,} {what}{'s' * (len(lines) != 1)}"

    state = count(report.faults, "fault") if report.faults else "healthy"
    return f"{state}, {count(report.warnings, 'warning')} - all in {output}"


def refuse_to_overwrite(output: Path, plots: Path | None, data: DataConfig) -> None:
    """Raises ConfigError for places among the data, and for files that are not those of an earlier report."""
    for folder in data.own_folders:
        for key, place in (("output", output), ("plots", plots)):
            if place and place.resolve().is_relative_to(Path(folder).resolve()):
                problem = f"{place} lies in {folder}, the data set's own - choose another place"
                raise ConfigError(problem, code="output-in-data", key=key)
    if plots and os.path.lexists(plots) and not is_ours(plots):
        problem = f"{plots} is there already and not the doctor's - choose another output, or give plots=false"
        raise ConfigError(problem, code="output-taken", key="plots")
    if os.path.lexists(output):
        try:
            is_report = "num_faults" in parse_json(read_plain(output))
        except (OSError, ValueError, TypeError, RecursionError):
            is_report = False
        if not is_report:
            problem = f"{output} is there already and is no report - choose another file"
            raise ConfigError(problem, code="output-taken", key="output")
