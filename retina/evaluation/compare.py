"""Whether one detector is better than another on the same images, or the difference is one of luck. Beside the road."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, UInt8

from retina.data.annotations import Annotations
from retina.errors import DataError
from retina.evaluation.analysis import Analysis, analyze, mistakes_per_image
from retina.evaluation.bootstrap import DRAWS, LEVEL, mean_over_classes, resampled_ap, resamples
from retina.evaluation.metrics import COCO, DetectionArrays, Scoring, coco_metrics
from retina.evaluation.outcomes import find_outcomes

MEASURES = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
"""IoU thresholds that each is a mean over."""
SIZES = ("APs", "APm", "APl")


def compare(
    annotations: Annotations,
    first: DetectionArrays,
    second: DetectionArrays,
    *,
    scoring: Scoring = COCO,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """`second` minus `first`, paired: both are scored on the same resampled images.

    Keys: images, draws; `overall`, for AP, AP50 and AP75 both values, the difference, its 95 % interval and the
    two-sided p-value of no difference; `classes`, the same of AP for each label; `sizes`, both values and their
    difference for APs, APm and APl. Null where no object defines a value. Raises DataError for no images, and for
    scores or boxes that are not finite."""
    if not len(annotations):
        raise DataError(f"{annotations.file}: images: there are none - give images to compare on", code="no-images")
    weights = resamples(len(annotations), draws)
    analyses = [_drawn(annotations, detections, scoring, weights) for detections in (first, second)]
    (metrics_a, drawn_a), (metrics_b, drawn_b) = analyses
    change = drawn_b - drawn_a
    overall = {
        key: _difference(metrics_a[key], metrics_b[key], mean_over_classes(change[:, :, part].mean(axis=2)))
        for key, part in MEASURES.items()
    }
    own = [(metrics_a["per_class"][name], metrics_b["per_class"][name]) for name in annotations.classes]
    classes = [_difference(a["AP"], b["AP"], change[:, label].mean(axis=1)) for label, (a, b) in enumerate(own)]
    sizes = {key: _difference(metrics_a[key], metrics_b[key], None) for key in SIZES}
    return {"images": len(annotations), "draws": draws, "overall": overall, "classes": classes, "sizes": sizes}


def _drawn(
    annotations: Annotations, detections: DetectionArrays, scoring: Scoring, weights: UInt8[np.ndarray, "R N"]
) -> tuple[dict[str, Any], Float[np.ndarray, "R K T"]]:
    outcomes = find_outcomes(annotations, detections, max_dets=scoring.max_dets)
    return coco_metrics(annotations, detections, scoring), resampled_ap(outcomes, weights)


def _difference(a: float | None, b: float | None, change: Float[np.ndarray, "R"] | None) -> dict[str, Any] | None:
    if a is None or b is None:
        return None
    result: dict[str, Any] = {"first": a, "second": b, "difference": b - a}
    if change is not None:
        defined = change[np.isfinite(change)].astype(np.float64)
        defined = defined - defined.mean() + (b - a)  # the same bias of resampled AP on both sides, but not quite
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        tail = min((defined <= 0).sum(), (defined >= 0).sum()) + 1
        result |= {"low": low, "high": high, "p": float(min(1.0, 2 * tail / (len(defined) + 1)))}
    return result


def verdict(result: dict[str, Any], first: str, second: str) -> str:
    """One sentence."""
    ap = result["overall"]["AP"]
    if ap is None:
        return "Nothing can be compared: there are no objects."
    points, low, high = (100 * ap[key] for key in ("difference", "low", "high"))
    if low > 0 or high < 0:
        better, worse = (second, first) if points > 0 else (first, second)
        low, high = sorted((abs(low), abs(high)))
        return f"{better} is better than {worse} by {abs(points):.1f} AP, interval {low:.1f} to {high:.1f}."
    images = f"these {result['images']} images" if result["images"] > 1 else "this one image"
    span = f"{second} minus {first} is {points:+.1f} AP, interval {low:+.1f} to {high:+.1f}"
    return f"No difference that {images} can show: {span}."


def changed_images(first: Analysis, second: Analysis, limit: int = 8) -> tuple[list[int], list[int]]:
    """Images that got better and worse: by the change in missed objects and false alarms at each one's own operating
    point, most first."""
    change: Float64[np.ndarray, "N"] = np.sum(mistakes_per_image(second), axis=0) - np.sum(
        mistakes_per_image(first), axis=0
    )
    order = np.argsort(change, kind="stable")
    better = [int(image) for image in order[:limit] if change[image] < 0]
    worse = [int(image) for image in order[::-1][:limit] if change[image] > 0]
    return better, worse


def analyses_of(
    annotations: Annotations, sources: Sequence[DetectionArrays], scoring: Scoring = COCO
) -> list[Analysis]:
    """Of each, at an operating point that is fitted to it."""
    return [
        analyze(annotations, detections, coco_metrics(annotations, detections, scoring), scoring=scoring, draws=100)
        for detections in sources
    ]
