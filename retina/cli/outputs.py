"""What tools/infer.py writes of its images: annotated pictures, crops, tables, results, and labels to be corrected."""

import csv
import io
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from retina.cli.journal import put
from retina.cli.sources import FORMATS, Source
from retina.data.results import Pictured, result
from retina.errors import ConfigError, DataError, plain

if TYPE_CHECKING:
    from PIL import Image

    from retina.inference import ImageDetections
    from retina.visualize import DrawStyle

CROPS, LABELS = "crops", "labels"
"""Folders of the output."""
PRELABELS = ("yolo", "coco")
IMAGE = ("id", "file_name", "width", "height")
"""Keys of an image, as COCO calls them."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is written beside detections.json and the tables."""

    pictures: bool
    crops: bool
    prelabels: Sequence[str]

    def claims(self, sources: Sequence[Source]) -> list[str]:
        """Every file and folder whose name depends on the images, relative to the output.

        Raises ConfigError for images whose labels would be one file, or that lie in a folder that the crops need."""
        if self.crops and any(PurePosixPath(source.picture).parts[0].casefold() == CROPS for source in sources):
            problem = f"has a folder {CROPS}, a name that the output needs itself - rename it"
            raise ConfigError(problem, code="reserved-name", key="source")
        names = [source.picture for source in sources] if self.pictures else []
        names += [f"{CROPS}/{source.picture}" for source in sources] if self.crops else []
        if "yolo" in self.prelabels:
            labels: dict[str, Source] = {}
            for source in sources:
                other = labels.setdefault(label_file(source.name).casefold(), source)
                if other is not source:
                    problem = f"{other.name} and {source.name} would share {label_file(source.name)} - rename one"
                    raise ConfigError(problem, code="same-name", key="source")
            names += [label_file(source.name) for source in sources]
        return names


def label_file(name: str) -> str:
    """Where YOLO looks for the labels of an image."""
    return f"{LABELS}/{PurePosixPath(name).with_suffix('.txt')}"


class Times:
    """Seconds of each stage of an inference, of all threads together, and the number of `images`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("images", "read", "detect", "draw and write"), 0.0)
        self._lock = threading.Lock()

    def add(self, stage: str, amount: float) -> None:
        with self._lock:
            self.seconds[stage] += amount

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Adds what passes within the `with` block."""
        begin = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - begin)

    @staticmethod
    def lines(parts: Sequence[Mapping[str, float]]) -> list[str]:
        """Milliseconds per image of each stage, of all processes; nothing where no image was looked at."""
        spent = {stage: sum(part[stage] for part in parts) for stage in parts[0]}
        images = spent.pop("images")
        stages = ", ".join(f"{stage} {1000 * seconds / images:.1f}" for stage, seconds in spent.items() if images)
        return [f"ms per image: {stages}"] if images else []


def draw_style(label: str, font: str | None, font_size: int | None, line_width: int | None) -> "DrawStyle":
    """Raises ConfigError for a font that cannot be used."""
    from PIL import ImageFont

    from retina.visualize import DrawStyle

    if font is not None:
        try:
            ImageFont.truetype(font, 12)
        except (OSError, ValueError) as fault:
            problem = f"{plain(font)} cannot be used ({plain(str(fault))}) - give a .ttf or .otf file"
            raise ConfigError(problem, code="no-file", key="font") from None
    return DrawStyle(label=label, font=font, font_size=font_size, line_width=line_width)


@dataclass(frozen=True)
class Writer:
    """Writes what there is for single images; threads may share it."""

    output: Path
    wanted: Wanted
    style: "DrawStyle"
    max_pixels: int
    times: Times = field(default_factory=Times)

    def write(self, source: Source, sample: Any, found: "ImageDetections") -> tuple[dict[str, Any], list[str]]:
        """The record of the image, and a line where something could not be written."""
        height, width = sample.original_size
        record: dict[str, Any] = {"file_name": source.name, "width": width, "height": height}
        record |= {key: values.tolist() for key, values in found.tensors._asdict().items()}
        try:
            with self.times.of("draw and write"):
                if self.wanted.crops or self.wanted.pictures:
                    self._write_pixels(source, sample, found, record)
        except DataError as fault:
            return record, [str(fault)]
        return record, []

    def _write_pixels(self, source: Source, sample: Any, found: "ImageDetections", record: dict[str, Any]) -> None:
        from retina.data.images import read_image
        from retina.data.regions import Regions

        image = sample.image
        cut = isinstance(image, Regions)
        if not cut and image.shape[:2] != sample.original_size:
            # a large JPEG, decoded smaller because the detector needs no more
            image = read_image(source.file, max_pixels=self.max_pixels, pixels=found.pixels)
        if self.wanted.crops:
            record["crops"] = self._write_crops(source, image, found)
        if self.wanted.pictures:
            if cut:
                image, factor = image.shrunk(self.max_pixels)
                found = replace(found, boxes=found.boxes / factor)
            record["picture"] = put(self.output, source.picture, picture_of(source, image, found, self.style))

    def _write_crops(self, source: Source, image: Any, found: "ImageDetections") -> list[str]:
        folder = self.output / CROPS / source.picture
        for earlier in folder.glob(f"{'[0-9]' * 4}_*.jpg"):  # of other settings; the folder is the inference's own
            earlier.unlink()
        return [put(self.output, *crop) for crop in crops_of(source, image, found)]


def picture_of(source: Source, image: Any, found: "ImageDetections", style: "DrawStyle") -> bytes:
    """Raises DataError where the picture's format cannot hold it."""
    suffix = PurePosixPath(source.picture).suffix
    try:
        return encoded(found.draw(image, style=style), FORMATS[suffix.lower()])
    except Exception as fault:  # sides that are too long, for one; each format has its own way to say so
        problem = f"no picture of it as {suffix} ({fault}) - give pictures=false, or another format"
        raise DataError(plain(f"{source.file}: {problem}"), code="no-picture") from None


def encoded(picture: "Image.Image", kind: str) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, quality=92)
    return content.getvalue()


def crops_of(source: Source, image: Any, found: "ImageDetections") -> Iterator[tuple[str, bytes]]:
    """Name, relative to the output, and JPEG of each detection, best first."""
    from PIL import Image

    from retina.visualize import shown_channels

    height, width = image.shape[:2]
    for number, (box, label) in enumerate(zip(found.boxes.tolist(), found.labels.tolist(), strict=True), start=1):
        x1, y1 = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
        x2, y2 = max(min(int(box[2]) + 1, width), x1 + 1), max(min(int(box[3]) + 1, height), y1 + 1)
        kind = re.sub(r"[^\w-]+", "_", found.classes[label])[:40]
        crop = Image.fromarray(shown_channels(image[y1:y2, x1:x2]))
        yield f"{CROPS}/{source.picture}/{number:04}_{kind}.jpg", encoded(crop, "JPEG")


def about(settings: Mapping[str, Any], classes: Sequence[str], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the output comes from: `inference.json`."""
    images = [{key: record[key] for key in (*IMAGE, "picture", "crops") if key in record} for record in records]
    return {"settings": dict(settings), "classes": list(classes), "images": images}


def final_files(
    records: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    category_ids: Sequence[int],
    prelabels: Sequence[str],
) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files that hold all images. Records are those of `retina.cli.journal.RECORD`."""
    results = [
        (
            record,
            label,
            result(
                Pictured(*(record[key] for key in IMAGE)),
                category_ids[label],
                classes[label],
                [*map(float, box)],
                float(score),
            ),
        )
        for record in records
        for box, score, label in zip(record["boxes"], record["scores"], record["labels"], strict=True)
    ]
    lines = ",\n".join(json.dumps(one) for _, _, one in results)
    yield "detections.json", f"[\n{lines}\n]\n".encode()
    corners = (
        [record["file_name"], classes[label], one["score"], *box]
        for record, label, one in results
        for x, y, width, height in [one["bbox"]]
        for box in [(x, y, x + width, y + height)]
    )
    yield "detections.csv", csv_of(["image", "class", "score", "x1", "y1", "x2", "y2"], corners)
    counts = (
        [record["file_name"], *(record["labels"].count(label) for label in range(len(classes))), len(record["labels"])]
        for record in records
    )
    yield "counts.csv", csv_of(["image", *classes, "total"], counts)
    if "coco" in prelabels:
        yield "coco.json", _coco(records, [one for _, _, one in results], classes, category_ids)
    if "yolo" in prelabels:
        yield "classes.txt", "".join(f"{plain(name)}\n" for name in classes).encode()
        for record in records:
            yield label_file(record["file_name"]), _yolo(record)


def csv_of(head: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(head)
    writer.writerows(rows)
    return content.getvalue().encode(errors="backslashreplace")


def _coco(
    records: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    category_ids: Sequence[int],
) -> bytes:
    """An annotation file as annotation tools load it; its image ids are those of detections.json."""
    images = [{key: record[key] for key in IMAGE} for record in records]
    pairs = zip(category_ids, classes, strict=True)
    annotations = [
        {key: one[key] for key in ("image_id", "category_id", "bbox", "score")}
        | {"id": number, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0, "segmentation": []}
        for number, one in enumerate(results, start=1)
    ]
    categories = [{"id": category, "name": name} for category, name in pairs]
    return json.dumps({"images": images, "categories": categories, "annotations": annotations}).encode()


def _yolo(record: Mapping[str, Any]) -> bytes:
    """Lines of label, centre and size as shares of the image; without scores, which trainers refuse."""
    width, height = record["width"], record["height"]
    rows = (
        f"{label} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f}"
        f" {(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}\n"
        for label, (x1, y1, x2, y2) in zip(record["labels"], record["boxes"], strict=True)
    )
    return "".join(rows).encode()
