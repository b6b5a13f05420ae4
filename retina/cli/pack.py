"""Packs the images of a data set into a few large files; the source is only read.

python tools/pack.py data=coco data.root=/data/coco output=/fast/coco
and then give data.root=/fast/coco to any other command.

The same command after a kill goes on where it was; of a pack that is finished, it verifies every image.
Exit code 0: written, or whole; 2: something is wrong with the data or the pack.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.compose import entry
from retina.cli.data import DataConfig, load_split, named_splits, prepare_data, several
from retina.cli.loaders import progress
from retina.data.checks import DataReport, RecordsError
from retina.data.health import check_files
from retina.data.pack_writer import damaged, plan, write_index, write_shard
from retina.data.packs import INDEX, pack_of
from retina.data.paths import name_problem
from retina.engine.config import from_mapping
from retina.errors import ConfigError, DataError, check
from retina.files import advice, descriptor_of, lock, make_folder, remove, write_whole
from retina.printing import say

if TYPE_CHECKING:
    from retina.data.annotations import Annotations

STATE = ".packing"
"""Holds a lock; there until the pack is finished."""
_PART = 1 << 24


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """configs/pack.yaml says what each is."""

    data: dict[str, Any]
    output: str
    shard_size: int
    traceback: bool

    def __post_init__(self) -> None:
        check(self.shard_size >= 1, "shard_size", self.shard_size, "give megabytes, 1 or more")


@entry("pack", PackConfig)
def main(config: PackConfig) -> int:
    data = from_mapping(DataConfig, config.data, "data")
    output = Path(config.output)
    for folder in data.own_folders:
        if output.resolve().is_relative_to(Path(folder).resolve()):
            problem = f"{output} lies in {folder}, the data set's own - choose another place"
            raise ConfigError(problem, code="output-in-data", key="output")
    prepare_data(data)
    splits = read_splits(data)
    names = {split: packable(annotations, data) for split, annotations in splits.items()}
    with open_output(output):
        try:
            for split, annotations in splits.items():
                pack_split(annotations, names[split], output, split, config.shard_size * 1_000_000)
        except OSError as fault:
            problem = f"{fault.filename or output}: {fault.strerror or fault}"
            raise DataError(
                f"{problem} - {advice(fault)}, and give the same command again", code="not-packed"
            ) from None
    return 0


@contextmanager
def open_output(output: Path) -> Iterator[None]:
    """Makes the folder, and keeps others out of it. Raises ConfigError for one that holds anything but a pack."""
    try:
        finished = output.is_dir() and any(output.glob(f"*/{INDEX}"))
        is_free = not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir()))
        if not (is_free or finished or (output / STATE).is_dir()):
            problem = f"{output} exists already and holds no pack - name another folder"
            raise ConfigError(problem, code="output-taken", key="output")
        make_folder(output)
        make_folder(output / STATE, within=output)
        held = descriptor_of(output / STATE / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as fault:
        problem = f"{output} cannot be written ({fault.strerror}) - {advice(fault)}"
        raise ConfigError(problem, code="not-written", key="output") from None
    try:
        lock(held)
    except BlockingIOError:
        os.close(held)
        raise ConfigError(f"{output} is being packed by another process - wait", code="in-use", key="output") from None
    try:
        yield
        finished = True
    finally:
        if finished:
            remove(output / STATE)
        os.close(held)


def read_splits(data: DataConfig) -> "dict[str, Annotations]":
    """All images of each split. Raises ConfigError for one that is put together from several, DataError."""
    splits: dict[str, Annotations] = {}
    for split in named_splits(data):
        places = getattr(data, split)
        if len(several(places.annotations)) > 1 or several(places.fraction) != [1]:
            problem = "several annotation files, or a fraction, cannot be packed - pack each file by itself, whole"
            raise ConfigError(problem, code="contradiction", key=f"data.{split}")
        splits[split] = load_split(data, split)
    return splits


def pack_split(annotations: "Annotations", names: list[str], output: Path, split: str, shard_bytes: int) -> None:
    """Packs the images of a split, or verifies them if they are packed. Raises DataError, OSError."""
    folder = output / split
    if pack := pack_of(folder):
        if {*pack.names()} != {*names}:
            problem = f"{folder} is a pack of other images - name another folder"
            raise ConfigError(problem, code="output-taken", key="output")
        if faults := damaged(pack):
            raise RecordsError(faults)
        say(f"{split}: {len(pack)} images, each as it was packed")
    else:
        pack_images(annotations.image_root, names, folder, output, shard_bytes)
    copy_file(annotations.file, output / "annotations" / f"instances_{split}.json", output)


def pack_images(root: Path, names: list[str], folder: Path, output: Path, shard_bytes: int) -> None:
    make_folder(folder, within=output)
    shards = plan(root, names, shard_bytes)
    written = [write_shard(folder, root, shard) for shard in progress(shards, f"packing {folder.name}", len(shards))]
    write_index(folder, shards)
    there = f", {len(shards) - sum(written)} of them there already" if not all(written) else ""
    say(f"{folder.name}: {len(names)} images in {len(shards)} archives{there}: {folder}")


def packable(annotations: "Annotations", data: DataConfig) -> list[str]:
    """Names of the images that can be used; faults are raised, or with `data.on_error=skip` reported."""
    files = check_files(annotations, max_pixels=data.max_pixels)
    names = [annotations.file_name(row) for row in range(len(annotations))]
    faults = [*files.bad.values()]
    for row, name in enumerate(names):
        if row not in files.bad and (problem := name_problem(name, allow_outside=False)):
            faults.append(f"{annotations.file}: image {annotations.image_ids[row]} ({name}): {problem}")
    if faults and data.on_error == "stop":
        error = RecordsError(faults)
        error.add_note("mend them, or leave them out with data.on_error=skip")
        raise error
    say(*(f"left out: {line}" for line in DataReport(faults).lines()), error=True)
    return [
        name for row, name in enumerate(names) if row not in files.bad and not name_problem(name, allow_outside=False)
    ]


def copy_file(source: Path, target: Path, output: Path) -> None:
    make_folder(target.parent, within=output)
    with source.open("rb") as stream:
        write_whole(target, iter(lambda: stream.read(_PART), b""))
