"""From a detector to a file that another runtime runs, and the proof that it finds the same there."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retina import __version__
from retina.data.annotations import Annotations
from retina.data.images import read_image
from retina.data.join import select
from retina.data.pixels import PixelFormat
from retina.errors import CheckpointError, DataError, RetinaError
from retina.evaluation.metrics import COCO, DetectionArrays, coco_metrics
from retina.export.description import SCHEMA_VERSION
from retina.export.formats import ProgramFile, onnx_bytes, onnx_model, program_bytes, trace
from retina.export.graph import ExportedDetector
from retina.export.onnx_runtime import OnnxFile
from retina.export.openvino_runtime import OpenvinoFile
from retina.export.proof import (
    Entry,
    Image,
    Run,
    Table,
    Times,
    Tolerance,
    as_values,
    digest,
    look_again,
    pixels_of,
    read_entry,
    timed,
)
from retina.export.quantize import quantized
from retina.inference import Detector
from retina.types import DTYPES

_TILE = ("tile", "tile_overlap", "tile_whole")
"""The file itself looks at an image, which may be a tile: who runs it cuts."""
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class Pictures(NamedTuple):
    """Images that a file is proved with."""

    folder: Path
    names: Sequence[str]
    annotations: Annotations | None = None
    """Of a split whose images these are in the same order, to be scored."""

    @classmethod
    def of(cls, annotations: Annotations) -> "Pictures":
        names = [annotations.file_name(row) for row in range(len(annotations))]
        return cls(annotations.image_root, names, annotations)

    def some(self, count: int) -> "Pictures":
        """So many of them, evenly spread; all if there are fewer."""
        rows = np.unique(np.linspace(0, len(self.names) - 1, min(count, len(self.names))).round().astype(np.int64))
        annotations = self.annotations and select(self.annotations, rows)
        return Pictures(self.folder, [self.names[row] for row in rows], annotations)


def describe(
    detector: Detector,
    *,
    format: str,
    raw: bool,
    weights: str,
    score_threshold: float | None = None,
    precision: str | None = None,
) -> dict[str, Any]:
    """What a file says about itself.

    weights: SHA-256 of what it was made from.
    score_threshold: None takes that of each class, as `Detector.predict` does.
    precision: None is the detector's own; int8 comes after."""
    card = detector.card
    options = {"score_threshold": 0.05, "candidates_per_level": 1000, "nms_iou": 0.5, "max_detections": 100}
    options |= {"class_agnostic": False} | card.postprocess
    thresholds = detector.thresholds if score_threshold is None else []
    if score_threshold is not None:
        options["score_threshold"] = score_threshold
    elif thresholds:
        options["score_threshold"] = min(thresholds)
    boxes = "boxes [B A 4] as x1, y1, x2, y2 in pixels of the images, and scores [B A K]"
    table = "detections [B D 6], best first: x1, y1, x2, y2 in pixels of the images, score, label (-1: no more)"
    return {
        "schema_version": SCHEMA_VERSION,
        "format": format,
        "raw": raw,
        "channels": detector.pixels.channels,
        "inputs": "images [B H W C], uint8, RGB or as trained, each at the top left of the canvas; sizes [B 2], int64: "
        "their (height, width)",
        "outputs": boxes if raw else f"{table}; counts [B]",
        "classes": list(card.classes),
        "category_ids": list(card.category_ids),
        **options,
        "thresholds": thresholds or [0.0] * len(card.classes),
        "preprocessing": {
            key: card.preprocessing[key]
            for key in ("short_side", "long_side", "pad_multiple", "value_range", *_TILE)
            if key in card.preprocessing
        },
        "precision": precision or next(name for name, dtype in DTYPES.items() if dtype == detector.dtype),
        "weights": {"sha256": weights, "step": card.step},
        "versions": {"retina": __version__, "torch": torch.__version__},
    }


def look(detector: Detector, image: Image, score_threshold: float | None = None) -> Table:
    """What the detector itself finds."""
    (found,) = detector.predict(image, score_threshold=score_threshold)
    labels = found.labels.double()[:, None]
    return torch.cat([found.boxes.double(), found.scores.double()[:, None], labels], dim=1).numpy()


class Graph(NamedTuple):
    """A detector in the format of a runtime."""

    run: Run
    runtime: str
    sealed: Callable[[dict[str, Any]], dict[str, bytes]]
    """The bytes of the files by suffix, with a description; the one that is opened comes last."""


def build(detector: Detector, description: dict[str, Any], calibration: Iterable[Image] = ()) -> Graph:
    """The graph that the description describes.

    calibration: images that int8 is measured on.

    Raises ConfigError where a package is missing, CheckpointError for a detector that torch cannot write."""
    try:
        return _build(detector, description, calibration)
    except RetinaError:
        raise
    except Exception as fault:  # exporters raise whatever they stumble over
        reason = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
        problem = f"torch {torch.__version__} cannot write it as {description['format']} ({reason})"
        fix = "give another format, or leave out the part of the model that it names"
        raise CheckpointError(f"{detector.file}: {problem} - {fix}", code="not-exportable") from fault


def _build(detector: Detector, description: dict[str, Any], calibration: Iterable[Image]) -> Graph:
    make = partial(ExportedDetector, detector, description)
    if description["format"] == "pt2":
        program = trace(make())
        write = partial(program_bytes, program)
        return Graph(
            ProgramFile(program, description), f"torch {torch.__version__}", lambda values: {".pt2": write(values)}
        )
    model = onnx_model(make, ("boxes", "scores") if description["raw"] else ("detections", "counts"))
    if description["precision"] == "int8":
        model = quantized(model, calibration)
    content = onnx_bytes(model, description)
    if description["format"] == "openvino":
        other = OpenvinoFile(content, description)
        return Graph(other, other.runtime, other.sealed)
    file = OnnxFile(content, description)
    return Graph(file, file.runtime, lambda values: {".onnx": onnx_bytes(model, values)})


def prove(
    detector: Detector,
    graph: Graph,
    pictures: Pictures,
    description: dict[str, Any],
    *,
    tolerance: Tolerance,
    num_images: int,
    num_scored: int,
    score_threshold: float | None = None,
    progress: Callable[[Sequence[Any], str], Any],
) -> dict[str, Any]:
    """Runs the file and the detector over the same images, and returns what came of it.

    num_images: to be compared detection by detection. num_scored: of a split, to be scored.

    Raises CheckpointError where they part by more than the tolerance, DataError for images that cannot be read, or in
    which nothing is found."""
    pixels = pixels_of(description)
    read = partial(read_part, pixels=pixels)
    chosen = pictures.some(num_images)
    parts = [read(chosen.folder / name, number) for number, name in enumerate(chosen.names)]
    predict = partial(look, detector, score_threshold=score_threshold)
    predict(parts[0])  # the first call is slower
    tables, seconds = timed(predict, progress(parts, "looking"))
    entries = [
        Entry(name, digest(chosen.folder / name), [*part.shape[:2]], table.tolist())
        for name, part, table in zip(chosen.names, parts, tables, strict=True)
    ]
    differences, times = look_again(entries, parts, graph.run, tolerance, description)
    if problem := differences.refuses(tolerance):
        line = f"{graph.runtime}: {problem} - nothing was written"
        raise CheckpointError(f"{line}; a wider tolerance= would accept it, or report it", code="not-equal")
    if not differences.matched:
        problem = f"{len(entries)} images of {chosen.folder} hold nothing that it finds: they prove nothing"
        fix = "give images= with objects, or a lower score_threshold"
        raise DataError(f"{problem} - {fix}", code="no-detections", key="images")
    proof: dict[str, Any] = {"runtime": graph.runtime, "folder": str(chosen.folder), "tolerance": tolerance._asdict()}
    proof |= as_values(differences) | {"ap": None}
    proof["milliseconds"] = {"retina": Times.of(seconds)._asdict(), "file": times._asdict()}
    if pictures.annotations is not None and num_scored:
        proof["ap"] = scored(pictures.some(num_scored), predict, graph.run, pixels, progress)
    return proof | {"images": [entry._asdict() for entry in entries]}


def read_part(file: Path, number: int, pixels: PixelFormat) -> Image:
    """An image, or of every third one the part at the top left, so that images have several sizes."""
    image = read_entry(file.parent, file.name, digest(file), [1 << 30] * 2, pixels)
    height, width = image.shape[:2]
    return image if number % 3 != 2 else np.ascontiguousarray(image[: -(-3 * height // 4), : -(-2 * width // 3)])


def calibration_images(pictures: Pictures, count: int, pixels: PixelFormat) -> Iterable[Image]:
    """So many whole images, read one by one."""
    chosen = pictures.some(count)
    return (read_image(chosen.folder / name, pixels=pixels) for name in chosen.names)


def scored(
    pictures: Pictures, predict: Callable[[Image], Table], run: Run, pixels: PixelFormat, progress: Any
) -> dict[str, Any]:
    """COCO's AP of the detector and of the file over the same images."""
    assert pictures.annotations is not None
    found: dict[str, list[Table]] = {"retina": [], "file": []}
    for name in progress(pictures.names, "scoring"):
        file = pictures.folder / name
        image = read_entry(file.parent, file.name, digest(file), [1 << 30] * 2, pixels)
        found["retina"].append(predict(image))
        found["file"] += run([image])
    result: dict[str, Any] = {"images": len(pictures.names)}
    for key, tables in found.items():
        indices = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        rows = np.concatenate([*tables, np.zeros((0, 6))])
        arrays = DetectionArrays(indices, rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))
        metrics = coco_metrics(pictures.annotations, arrays, COCO)
        result[key] = {name: metrics[name] for name in _METRICS}
    return result
