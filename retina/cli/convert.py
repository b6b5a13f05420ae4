"""Converts a data set with labels of Pascal VOC, YOLO or CSV into COCO's layout. The source is only read.

python tools/convert.py format=voc  source=VOCdevkit/VOC2012 output=data/voc2012
python tools/convert.py format=yolo source=mydata            output=data/mydata

Exit code 0: written; 2: nothing written.
"""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from retina.cli.compose import entry
from retina.data.checks import DataReport, RecordsError
from retina.data.convert.records import Record, Records, check_classes, read_lines
from retina.data.convert.tables import read_csv
from retina.data.convert.voc import DIFFICULT, read_voc
from retina.data.convert.yolo import read_yolo
from retina.errors import ConfigError, DataError, check, check_choice
from retina.files import make_folder, open_plain, write_synced
from retina.printing import say


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """configs/convert.yaml says what each is."""

    format: str
    source: str
    output: str
    classes: list[str] | str | None
    on_error: str
    copy: bool
    val_fraction: float
    seed: int
    one_based: bool
    difficult: str
    traceback: bool

    def __post_init__(self) -> None:
        check_choice(self.format, ("voc", "yolo", "csv"), "format")
        check_choice(self.on_error, ("stop", "skip"), "on_error")
        check_choice(self.difficult, DIFFICULT, "difficult")
        check(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "give more than 0 and less than 1")
        if self.format != "voc" and (self.one_based or self.difficult != "keep"):
            key = "one_based" if self.one_based else "difficult"
            raise ConfigError("is for format=voc - leave it out", code="contradiction", key=key)


@entry("convert", ConvertConfig)
def main(config: ConvertConfig) -> None:
    records = read(config)
    faults = [str(fault) for fault in records.faults]
    if faults and config.on_error == "stop":
        error = RecordsError(faults)
        error.add_note("nothing is written: correct the records, or leave them out with on_error=skip")
        raise error
    say(*(f"left out: {line}" for line in DataReport(faults).lines()), error=True)
    say(*(f"warning: {line}" for line in records.warnings), error=True)
    write(config, records)


def read(config: ConvertConfig) -> Records:
    """The records of the source, once the output is known to be free."""
    source, output = Path(config.source), Path(config.output)
    if output.resolve().is_relative_to(source.resolve()):
        problem = f"{output} lies inside source, which is only read - name a folder elsewhere"
        raise ConfigError(problem, code="output-in-data", key="output")
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        problem = f"{output} exists already and is never overwritten - name another folder"
        raise ConfigError(problem, code="output-taken", key="output")
    draw: dict[str, Any] = {"val_fraction": config.val_fraction, "seed": config.seed, "classes": class_names(config)}
    if config.format == "voc":
        return read_voc(source, one_based=config.one_based, difficult=config.difficult, **draw)
    return (read_csv if config.format == "csv" else read_yolo)(source, **draw)


def class_names(config: ConvertConfig) -> list[str] | None:
    """Those of the setting `classes`: a list, a text with commas, or a file of lines. None: as the source says."""
    names = config.classes
    if names is None:
        return None
    if isinstance(names, str):
        names = read_lines(Path(names)) if Path(names).is_file() else names.split(",")
    names = [name.strip() for name in names if name.strip()]
    check_classes("classes", names)
    return names


def write(config: ConvertConfig, data: Records) -> None:
    """The data set in COCO's layout: made in a temporary folder beside the output, which is then renamed."""
    splits = {"train": data.train, "val": data.val} | ({"test": data.test} if data.test else {})
    check_classes(config.source, data.classes)
    for split, records in splits.items():
        if not records:
            problem = "no image is left - correct the faults, or the split"
            raise DataError(f"{config.source}: {split}: {problem}", code="no-images")
    shared = {record.image for record in data.train} & {record.image for record in data.val}
    if shared:
        say(f"warning: {len(shared)} images are in train and in val: metrics will look too good", error=True)
    output = Path(config.output).resolve()
    make_folder(output.parent)
    temporary = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        make_folder(temporary / "annotations")
        for split, records in splits.items():
            names = unique_names(records)
            for record, name in zip(records, names, strict=True):
                place(record.image, temporary / split / name, copy=config.copy)
            text = json.dumps(to_coco(records, names, data.classes), allow_nan=False)
            write_synced(temporary / "annotations" / f"instances_{split}.json", text.encode())
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for split, records in splits.items():
        say(f"{split}: {len(records)} images, {sum(len(record.objects) for record in records)} objects")
    say(f"{len(data.classes)} classes: {', '.join(data.classes)}", f"written: {config.output}")


def unique_names(records: Sequence[Record]) -> list[str]:
    """File names of a split, made distinct by _2, _3, ... also where upper and lower case are the same."""
    names: dict[str, str] = {}
    for record in records:
        path, name, count = PurePosixPath(record.file_name), record.file_name, 1
        while name.casefold() in names:
            count += 1
            name = path.with_stem(f"{path.stem}_{count}").as_posix()
        names[name.casefold()] = name
    return list(names.values())


def place(image: Path, target: Path, *, copy: bool) -> None:
    """Bring an image to `target` without changing it: hard link, else symbolic link, else (or with `copy`) a copy."""
    assert ".." not in target.parts
    make_folder(target.parent)
    for put in () if copy else (os.link, os.symlink):
        with suppress(OSError):  # another file system, or one without such links
            put(image.resolve(), target)
            return
    with image.open("rb") as content, open_plain(target, "xb") as handle:
        shutil.copyfileobj(content, handle)


def to_coco(records: Sequence[Record], names: Sequence[str], classes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The COCO document of a split. Ids count from 1; categories follow `classes`; whole numbers are written whole."""
    categories = [{"id": k, "name": name, "supercategory": "none"} for k, name in enumerate(classes, 1)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (record, name) in enumerate(zip(records, names, strict=True), 1):
        images.append({"id": image_id, "file_name": name, "height": record.size[0], "width": record.size[1]})
        for item in record.objects:
            x1, y1, x2, y2 = item.box
            box = [int(v) if v.is_integer() else v for v in (x1, y1, x2 - x1, y2 - y1)]
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": classes.index(item.name) + 1}
            annotations.append(ids | {"bbox": box, "area": box[2] * box[3], "iscrowd": int(item.crowd)})
    return {"images": images, "annotations": annotations, "categories": categories}
