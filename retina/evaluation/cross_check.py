"""The same numbers by pycocotools, so that ours can be checked against them. Beside the road."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retina.evaluation.metrics import COCO, Scoring


def pycocotools_metrics(
    ground_truth: Path, results: Sequence[Mapping[str, Any]], scoring: Scoring = COCO
) -> dict[str, float | None]:
    """The twelve COCO numbers of results in COCO's format; None where pycocotools says -1, without ground truth."""
    stats = score(load_truth(json.loads(ground_truth.read_bytes())), [dict(result) for result in results], scoring)
    return {name: None if value == -1 else float(value) for name, value in zip(scoring.meanings(), stats, strict=True)}


def load_truth(document: Mapping[str, Any]) -> Any:
    """pycocotools' own object for the content of an annotation file.

    Annotations without `iscrowd` or `area` count as 0 and width x height, and are numbered from 1, because pycocotools
    takes annotation 0 for unmatched."""
    from pycocotools.coco import COCO

    defaults = ({"iscrowd": 0, "area": box["bbox"][2] * box["bbox"][3]} | box for box in document["annotations"])
    truth = COCO()
    truth.dataset = (
        {"info": {}} | dict(document) | {"annotations": [box | {"id": n} for n, box in enumerate(defaults, 1)]}
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth.createIndex()
    return truth


def score(truth: Any, results: list[dict[str, Any]], scoring: Scoring = COCO) -> np.ndarray:
    """The twelve numbers of COCOeval.

    Its own summary of AP insists on 100 detections; the means are taken here, as it takes them, for any number."""
    import pycocotools.coco
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(truth, truth.loadRes(results) if results else pycocotools.coco.COCO(), "bbox")
        scorer.params.maxDets = list(scoring.limits)
        scorer.params.areaRng = scoring.ranges.tolist()
        scorer.evaluate()
        scorer.accumulate()
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    parts = [precision[..., 0, 2], precision[0, ..., 0, 2], precision[5, ..., 0, 2]]
    parts += [precision[..., area, 2] for area in (1, 2, 3)]
    parts += [recall[..., 0, limit] for limit in (0, 1, 2)] + [recall[..., area, 2] for area in (1, 2, 3)]
    return np.array([part[part > -1].mean() if (part > -1).any() else -1.0 for part in parts])


def describe_differences(metrics: Mapping[str, Any], reference: Mapping[str, float | None]) -> list[str]:
    """A line per number with both values and their difference, and the largest difference last."""
    lines, largest = [f"{'':6} {'retina':>12} {'pycocotools':>12} {'difference':>11}"], 0.0
    for name, expected in reference.items():
        value = metrics[name]
        if value is None or expected is None:
            same = value is expected
            largest = largest if same else float("inf")
            lines.append(f"{name:6} {value or '-':>12} {expected or '-':>12} {'0' if same else 'only one':>11}")
            continue
        largest = max(largest, abs(value - expected))
        lines.append(f"{name:6} {value:12.9f} {expected:12.9f} {value - expected:11.1e}")
    return [*lines, f"largest difference from pycocotools: {largest:.1e}"]
