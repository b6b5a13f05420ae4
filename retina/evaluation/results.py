"""Detections of any program, from a COCO results file. Beside the road."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from retina.data.checks import RecordsError
from retina.data.coco import Annotations
from retina.data.ids import is_id, settled
from retina.errors import DataError
from retina.evaluation.metrics import DetectionArrays
from retina.schema import unique_keys

_KEYS = ("image_id", "category_id", "bbox", "score")
_LARGEST = 1e100
"""A larger number is no score and no pixel: areas of boxes that far away would not be finite."""


def read_results(file: Path, annotations: Annotations, warnings: list[str] | None = None) -> DetectionArrays:
    """Detections of a COCO results file: a JSON list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.

    Other keys are ignored, an empty list is fine, and the order of the file is kept (it ranks equal scores). Numbers
    stay float64. Ids may be written as 7.0 or "7". Results of a category that `annotations` lacks are left out, as
    pycocotools does: `warnings` gets a line with their number. A file that has only such results belongs to other data.

    Raises:
        DataError: the file cannot be read, or is no list.
        RecordsError: results lack a key, hold a value of the wrong type or one that is not finite: one line for each.
            One line too for each image that `annotations` does not have, with the number of its results, and for each
            category where it has none of them.
    """
    try:
        records = json.loads(file.read_bytes(), object_pairs_hook=unique_keys)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror} - check the path", code="no-file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON: {error} - write it again", code="not-json") from None
    if not isinstance(records, list):
        problem = f"holds {type(records).__name__} instead of a list - give a results file, not an annotation file"
        raise DataError(f"{file}: {problem}", code="wrong-type")
    index_of = {image_id: index for index, image_id in enumerate(annotations.image_ids.tolist())}
    as_text = annotations.image_ids.dtype.kind == "U"
    label_of = {category_id: label for label, category_id in enumerate(annotations.category_ids)}
    label_of.pop(None, None)
    rows = np.zeros((len(records), 2), dtype=np.int64)
    numbers = np.zeros((len(records), 5), dtype=np.float64)
    faults: list[str] = []
    unknown: Counter[tuple[str, int | str]] = Counter()
    for position, record in enumerate(records):
        if problem := _problem(record):
            faults.append(f"{file}: result {position}: {problem}")
            continue
        image_id = settled(record["image_id"], as_text=as_text)
        category_id = settled(record["category_id"], as_text=False)
        if image_id not in index_of:
            unknown["image_id", image_id] += 1
        if category_id not in label_of:
            unknown["category_id", category_id] += 1
        rows[position] = index_of.get(image_id, 0), label_of.get(category_id, -1)
        numbers[position] = *record["bbox"], record["score"]
    of_other_data = len(records) > 0 and bool((rows[:, 1] < 0).all())
    for (key, value), count in unknown.items():
        problem = f"is that of {count} result{'s' * (count > 1)}, but not in {annotations.file}"
        line = f"{file}: {key} {value!r:.40}: {problem} - use the ids of that file"
        if key == "image_id" or of_other_data:
            faults.append(line)
        elif warnings is not None:
            warnings.append(f"{line}; left out")
    if faults:
        raise RecordsError(faults)
    known = rows[:, 1] >= 0
    rows, numbers = rows[known], numbers[known]
    boxes = numbers[:, :4]
    boxes[:, 2:] += boxes[:, :2]
    return DetectionArrays(rows[:, 0], boxes, numbers[:, 4], rows[:, 1])


def _problem(record: Any) -> str:
    """What is wrong with a record, and how to mend it; nothing for a sound one."""
    if not isinstance(record, dict):
        return f"is {record!r:.40} instead of an object - write one object per detection"
    for key in _KEYS:
        if key not in record:
            return f"has no key {key!r} - every result needs {', '.join(_KEYS)}"
    for key in ("image_id", "category_id"):
        if not is_id(settled(record[key], as_text=False)):
            return f"{key} is {record[key]!r:.40}, no id - use the ids of the annotation file"
    bbox = record["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4:
        return f"bbox is {bbox!r:.40} - write [x, y, width, height]"
    for key, values in (("bbox", bbox), ("score", [record["score"]])):
        for value in values:
            if type(value) not in (int, float) or not abs(value) <= _LARGEST:
                return f"{key} holds {value!r:.40} - write a finite number"
    return ""
