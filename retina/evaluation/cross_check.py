"""The same numbers by pycocotools, so that ours can be checked against them."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retina.evaluation.results import HEADLINES


def pycocotools_metrics(ground_truth: Path, results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The twelve COCO numbers of results in COCO's format; None where pycocotools says -1, without ground truth.

    Annotations without `iscrowd` or `area` count as 0 and width x height, and are numbered from 1, because pycocotools
    takes annotation 0 for unmatched."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    document = json.loads(ground_truth.read_bytes())
    defaults = ({"iscrowd": 0, "area": box["bbox"][2] * box["bbox"][3]} | box for box in document["annotations"])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth, found = COCO(), COCO()
        truth.dataset = document | {"annotations": [box | {"id": n} for n, box in enumerate(defaults, 1)]}
        truth.createIndex()
        areas = [result["bbox"][2] * result["bbox"][3] for result in results]
        numbered = zip(range(1, len(results) + 1), results, areas, strict=True)
        found.dataset = {key: document[key] for key in ("images", "categories")}
        found.dataset["annotations"] = [{**result, "id": n, "iscrowd": 0, "area": area} for n, result, area in numbered]
        found.createIndex()
        scorer = COCOeval(truth, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return {name: None if value == -1 else float(value) for name, value in zip(HEADLINES, scorer.stats, strict=True)}


def describe_differences(ours: Mapping[str, Any], reference: Mapping[str, float | None]) -> list[str]:
    """A line per number with both values and their difference, and the largest difference last."""
    lines, largest = [f"{'':6} {'retina':>12} {'pycocotools':>12} {'difference':>11}"], 0.0
    for name, theirs in reference.items():
        value = ours[name]
        if value is None or theirs is None:
            same = value is theirs
            largest = largest if same else float("inf")
            lines.append(f"{name:6} {value or '-':>12} {theirs or '-':>12} {'0' if same else 'only one':>11}")
            continue
        largest = max(largest, abs(value - theirs))
        lines.append(f"{name:6} {value:12.9f} {theirs:12.9f} {value - theirs:11.1e}")
    return [*lines, f"largest difference from pycocotools: {largest:.1e}"]
