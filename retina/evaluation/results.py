"""Results on disk and on screen: COCO results files in, metrics out as JSON or as a table."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retina.data.checks import RecordsError
from retina.data.coco import Annotations
from retina.errors import DataError, plain
from retina.evaluation.metrics import DetectionArrays
from retina.files import write_whole

HEADLINES = {
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
_LARGEST = 1e100
"""A larger number is no score and no pixel: areas of boxes that far away would not be finite."""


def read_results(file: Path, annotations: Annotations) -> DetectionArrays:
    """Detections of a COCO results file: a JSON list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.

    Other keys are ignored, an empty list is fine, and the order of the file is kept (it ranks equal scores). Numbers
    stay float64.

    Raises:
        DataError: the file cannot be read, or is no list.
        RecordsError: results lack a key, hold a value of the wrong type or one that is not finite: one line for each.
            One line too for each image or category that `annotations` does not have, with the number of its results.
    """
    try:
        records = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror} - check the path", code="no-file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON: {error} - write it again", code="not-json") from None
    if not isinstance(records, list):
        raise DataError(
            f"{file}: holds {type(records).__name__} instead of a list - give a results file, not an annotation file",
            code="wrong-type",
        )
    known = {
        "image_id": {int(image_id): index for index, image_id in enumerate(annotations.image_ids)},
        "category_id": {own: label for label, own in enumerate(annotations.category_ids) if own is not None},
    }
    rows = np.zeros((len(records), 2), dtype=np.int64)
    numbers = np.empty((len(records), 5), dtype=np.float64)
    faults: list[str] = []
    unknown: Counter[tuple[str, int]] = Counter()
    for position, record in enumerate(records):
        try:
            ids = [_id(record, key) for key in known]
            numbers[position] = *_bbox(record), _number(record["score"], "score")
        except KeyError as error:
            keys = "image_id, category_id, bbox and score"
            faults.append(f"{file}: result {position}: has no key {error} - every result needs {keys}")
            continue
        except _RecordError as error:
            faults.append(f"{file}: result {position}: {error}")
            continue
        unknown.update((key, own) for key, own in zip(known, ids, strict=True) if own not in known[key])
        rows[position] = [known[key].get(own, 0) for key, own in zip(known, ids, strict=True)]
    faults += [
        f"{file}: {key} {own!r:.40}: is that of {count} result{'s' * (count > 1)}, but not in {annotations.file} - use "
        "the ids of that file"
        for (key, own), count in unknown.items()
    ]
    if faults:
        raise RecordsError(faults)
    boxes = numbers[:, :4]
    boxes[:, 2:] += boxes[:, :2]
    return DetectionArrays(rows[:, 0], boxes, numbers[:, 4], rows[:, 1])


class _RecordError(Exception):
    """A fault in one record, and how to mend it."""


def _id(record: object, key: str) -> int:
    if not isinstance(record, dict):
        raise _RecordError(f"is {record!r:.40} instead of an object - write one object per detection")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise _RecordError(f"{key} is {value!r:.40} instead of an integer - use the ids of the annotation file")
    return value


def _bbox(record: Mapping[str, object]) -> list[float]:
    bbox = record["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise _RecordError(f"bbox is {bbox!r:.40} - write [x, y, width, height]")
    return [_number(value, "bbox") for value in bbox]


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _RecordError(f"{key} holds {value!r:.40} instead of a number - write a finite number")
    if not abs(value) <= _LARGEST:
        raise _RecordError(f"{key} holds {value!r:.40} - write a finite number")
    return float(value)


def write_metrics(file: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics as JSON (None becomes null) so that `file` is never seen half written; parent folders are made.

    Raises ValueError for NaN or infinity, which JSON does not have.
    """
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode())


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The twelve numbers of `coco_metrics`, 0 to 1, then a table with a row per class; undefined is shown as "-"."""
    width = max(map(len, HEADLINES))
    lines = [f"{key:<{width}}  {_shown(metrics[key]):>5}  {meaning}" for key, meaning in HEADLINES.items()]
    table: list[tuple[str, ...]] = [("class", "objects", *_COLUMNS)]
    for name, values in metrics["per_class"].items():
        table.append((plain(name), str(values["num_objects"]), *(_shown(values[key]) for key in _COLUMNS)))
    return "\n".join([*lines, "", *_aligned(table)])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in table
    ]
