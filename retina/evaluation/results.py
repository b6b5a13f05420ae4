"""Results on disk and on screen: COCO results files in, metrics out as JSON or as a table."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retina.data.coco import Annotations
from retina.errors import DataError
from retina.evaluation.metrics import DetectionArrays

_HEADLINES = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "area up to 32^2",
    "APm": "area 32^2 to 96^2",
    "APl": "area over 96^2",
    "AR1": "best 1 per image and class",
    "AR10": "best 10 per image and class",
    "AR100": "best 100 per image and class",
    "ARs": "area up to 32^2",
    "ARm": "area 32^2 to 96^2",
    "ARl": "area over 96^2",
}
_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def read_results(file: Path, annotations: Annotations) -> DetectionArrays:
    """Detections of a COCO results file: a JSON list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.

    Other keys are ignored, an empty list is fine, and the order of the file is kept (it ranks equal scores). Numbers
    stay float64. Raises DataError naming the first record that is faulty: a missing key, a value of the wrong type or
    not finite, an image or category that `annotations` does not have.
    """
    try:
        records = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror} - check the path") from None
    except ValueError as error:
        raise DataError(f"{file}: is not JSON: {error} - write it again") from None
    if not isinstance(records, list):
        raise DataError(
            f"{file}: holds {type(records).__name__} instead of a list - give a results file, not an annotation file"
        )
    images = {int(image_id): index for index, image_id in enumerate(annotations.image_ids)}
    labels = {known: label for label, known in enumerate(annotations.category_ids) if known is not None}
    rows = np.empty((len(records), 2), dtype=np.int64)
    numbers = np.empty((len(records), 5), dtype=np.float64)
    for position, record in enumerate(records):
        try:
            rows[position] = _known(record, "image_id", images), _known(record, "category_id", labels)
            numbers[position] = *_bbox(record), _number(record["score"], "score")
        except KeyError as error:
            problem = f"has no key {error} - every result needs image_id, category_id, bbox and score"
        except _RecordError as error:
            problem = str(error)
        else:
            continue
        raise DataError(f"{file}: result {position}: {problem}")
    boxes = numbers[:, :4]
    boxes[:, 2:] += boxes[:, :2]
    return DetectionArrays(rows[:, 0], boxes, numbers[:, 4], rows[:, 1])


class _RecordError(Exception):
    """What is wrong with one record and how to mend it."""


def _known(record: object, key: str, known: Mapping[int, int]) -> int:
    if not isinstance(record, dict):
        raise _RecordError(f"is {record!r:.40} instead of an object - write one object per detection")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise _RecordError(f"{key} is {value!r:.40} instead of an integer - use the ids of the annotation file")
    if value not in known:
        raise _RecordError(
            f"{key} {value!r:.40} is not in the annotations - use the ids of the file these results are for"
        )
    return known[value]


def _bbox(record: Mapping[str, object]) -> list[float]:
    bbox = record["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise _RecordError(f"bbox is {bbox!r:.40} - write [x, y, width, height]")
    return [_number(value, "bbox") for value in bbox]


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _RecordError(f"{key} holds {value!r:.40} instead of a number - write a finite number")
    if not abs(value) <= sys.float_info.max:
        raise _RecordError(f"{key} holds {value!r:.40} - write a finite number")
    return float(value)


def write_metrics(file: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics as JSON (None becomes null) so that `file` is never seen half written; parent folders are made.

    Raises ValueError for NaN or infinity, which JSON does not have.
    """
    text = json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The twelve numbers of `coco_metrics` in percent, then a table with a row per class; undefined is shown as "-"."""
    width = max(map(len, _HEADLINES))
    lines = [f"{key:<{width}}  {_percent(metrics[key]):>5}  {meaning}" for key, meaning in _HEADLINES.items()]
    table = [("class", "objects", *_COLUMNS)]
    for name, values in metrics["per_class"].items():
        table.append((name, str(values["num_objects"]), *(_percent(values[key]) for key in _COLUMNS)))
    return "\n".join([*lines, "", *_aligned(table)])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in table
    ]
