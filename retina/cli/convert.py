"""Convert a Pascal VOC or YOLO data set into COCO's layout.

python tools/convert.py format=voc  source=VOCdevkit/VOC2012 output=data/voc2012
python tools/convert.py format=yolo source=mydata            output=data/mydata

    format=voc|yolo    layout of the source
    source=DIR         voc: holds Annotations/, JPEGImages/ and maybe ImageSets/Main/{train,val}.txt
                       yolo: holds images/, labels/ and data.yaml or classes.txt
    output=DIR         gets annotations/instances_{train,val}.json, train/ and val/; must not exist or be empty
    classes=a,b,c      classes in this order, or a text file with one per line
                       (default: voc: the names met, sorted; yolo: those of data.yaml or classes.txt)
    on_error=stop      any faulty record: list the faults, write nothing, exit 2;
                       skip: leave out the faulty objects, and images whose annotations cannot be read
    copy=false         true: copy images; false: hard link, else symbolic link, else copy
    val_fraction=0.2   share drawn for validation where the source is not split
    seed=0             of that draw; the same seed draws the same images
    one_based=false    voc: true for files in the challenge's own convention (pixels counted from 1, the last included):
                       subtracts 1 from xmin and ymin
    difficult=keep     voc: objects marked difficult become normal objects; crowd: regions where nothing is learned and
                       no detection is counted (`iscrowd` 1); drop: left out

The source is only read. Exit code 0: written; 2: nothing written.
"""

import difflib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from retina.data.convert.records import Fault, Record, Records, check_classes
from retina.data.convert.voc import DIFFICULT, read_voc
from retina.data.convert.yolo import read_yolo
from retina.errors import ConfigError, DataError, RetinaError

MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line; see the text above."""

    format: str
    source: Path
    output: Path
    classes: tuple[str, ...] | None = None
    on_error: str = "stop"
    copy: bool = False
    val_fraction: float = 0.2
    seed: int = 0
    one_based: bool = False
    difficult: str = "keep"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        options = parse(arguments)
        reading = read(options)
        if reading.faults:
            report(reading.faults, options.on_error)
            if options.on_error == "stop":
                return 2
        write(options, reading)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (RetinaError, OSError) as error:
        print(" ".join(str(error).split("\n")), file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Typed options from `key=value` words. Raises ConfigError for the first that is wrong."""
    known = [field.name for field in fields(Options)]
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean {near[0]}=?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"command line: {key}: no such option - {hint} (--help explains all)", code="unknown-key")
        if not equals or not text:
            raise ConfigError(f"command line: {key}: no value - write {key}=...", code="missing-setting")
        if key in values:
            raise ConfigError(f"command line: {key}: given twice - keep one", code="contradiction")
        values[key] = _value(key, text)
    for key in ("format", "source", "output"):
        if key not in values:
            raise ConfigError(
                f"command line: {key}: missing - add {key}=... (--help explains all)", code="missing-setting"
            )
    options = Options(**values)
    if options.format == "yolo" and (options.one_based or options.difficult != "keep"):
        raise ConfigError(
            "command line: one_based, difficult: only for format=voc - leave them out", code="contradiction"
        )
    return options


def _value(key: str, text: str) -> Any:
    choices = {
        "format": ("voc", "yolo"),
        "on_error": ("stop", "skip"),
        "difficult": DIFFICULT,
        "copy": ("true", "false"),
        "one_based": ("true", "false"),
    }
    if key in choices:
        if text not in choices[key]:
            raise ConfigError(
                f"command line: {key}: {text!r} is not a choice - use {' or '.join(choices[key])}", code="unknown-value"
            )
        return text == "true" if key in {"copy", "one_based"} else text
    if key == "classes":
        return _classes(text)
    if key in {"source", "output"}:
        return Path(text)
    try:
        number = int(text) if key == "seed" else float(text)
    except ValueError as error:
        raise ConfigError(
            f"command line: {key}: {text!r} is not a number - write {key}=0, say", code="wrong-type"
        ) from error
    if key == "val_fraction" and not 0 < number < 1:
        raise ConfigError(
            f"command line: val_fraction: {text} is not between 0 and 1 - write val_fraction=0.2, say",
            code="out-of-range",
        )
    return number


def _classes(text: str) -> tuple[str, ...]:
    file = Path(text)
    try:
        names = file.read_text(encoding="utf-8-sig").split("\n") if file.is_file() else text.split(",")
    except ValueError as error:
        raise ConfigError(f"{file}: not UTF-8 text ({error}) - save it as UTF-8", code="unreadable-file") from error
    classes = tuple(name.strip() for name in names if name.strip())
    check_classes(text, classes)
    return classes


def read(options: Options) -> Records:
    """The records of the source, once the output is known to be free."""
    source, output = options.source.resolve(), options.output.resolve()
    if output.is_relative_to(source):
        raise ConfigError(
            f"{options.output}: output inside source, which is only read - name a folder elsewhere",
            code="output-in-data",
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{options.output}: output exists already and is never overwritten - name another output",
            code="output-taken",
        )
    draw: dict[str, Any] = {"classes": options.classes, "val_fraction": options.val_fraction, "seed": options.seed}
    if options.format == "voc":
        return read_voc(options.source, one_based=options.one_based, difficult=options.difficult, **draw)
    return read_yolo(options.source, **draw)


def report(faults: Sequence[Fault], on_error: str) -> None:
    """List faults on stderr."""
    for fault in faults[:MAX_LISTED]:
        print(fault, file=sys.stderr)
    if len(faults) > MAX_LISTED:
        print(f"and {len(faults) - MAX_LISTED} more", file=sys.stderr)
    stopped = "nothing written; correct them, or leave these records out with on_error=skip"
    outcome = "left out" if on_error == "skip" else stopped
    print(f"{len(faults)} faulty {'record' if len(faults) == 1 else 'records'}: {outcome}", file=sys.stderr)


def write(options: Options, reading: Records) -> None:
    """The data set in COCO's layout: made in a temporary folder beside the output, which is then renamed."""
    splits = {"train": reading.train, "val": reading.val}
    check_classes(options.source, reading.classes)
    for split, records in splits.items():
        if not records:
            raise DataError(
                f"{options.source}: {split}: no image is left - correct the faults, or the split", code="no-images"
            )
    shared = {record.image for record in reading.train} & {record.image for record in reading.val}
    if shared:
        print(f"warning: {len(shared)} images are in train and in val: metrics will look too good", file=sys.stderr)
    output = options.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        (temporary / "annotations").mkdir(parents=True)
        for split, records in splits.items():
            names = unique_names(records)
            for record, name in zip(records, names, strict=True):
                place(record.image, temporary / split / name, copy=options.copy)
            document = to_coco(records, names, reading.classes)
            text = json.dumps(document, allow_nan=False)
            (temporary / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for split, records in splits.items():
        objects = sum(len(record.objects) for record in records)
        print(f"{split}: {len(records)} images, {objects} objects")
    print(f"{len(reading.classes)} classes: {', '.join(reading.classes)}")
    print(f"written: {options.output}")


def unique_names(records: Sequence[Record]) -> list[str]:
    """File names of a split, made distinct by _2, _3, ... also where upper and lower case are the same."""
    taken: set[str] = set()
    names = []
    for record in records:
        path, name, count = PurePosixPath(record.file_name), record.file_name, 1
        while name.casefold() in taken:
            count += 1
            name = path.with_stem(f"{path.stem}_{count}").as_posix()
        taken.add(name.casefold())
        names.append(name)
    return names


def place(image: Path, target: Path, *, copy: bool) -> None:
    """Bring an image to `target` without changing it: hard link, else symbolic link, else (or with `copy`) a copy."""
    assert ".." not in target.parts
    image = image.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    for link in () if copy else (os.link, os.symlink):
        try:
            return link(image, target)
        except OSError:  # another file system, or one without such links
            continue
    shutil.copyfile(image, target)
    return None


def to_coco(records: Sequence[Record], names: Sequence[str], classes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The COCO document of a split. Ids count from 1; categories follow `classes`; whole numbers are written whole."""
    category_of = {name: k for k, name in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (record, name) in enumerate(zip(records, names, strict=True), 1):
        height, width = record.size
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for item in record.objects:
            x1, y1, x2, y2 = item.box
            box = [int(v) if v.is_integer() else v for v in (x1, y1, x2 - x1, y2 - y1)]
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_of[item.name]}
            annotations.append({**annotation, "bbox": box, "area": box[2] * box[3], "iscrowd": int(item.crowd)})
    categories = [{"id": k, "name": name, "supercategory": "none"} for k, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}
