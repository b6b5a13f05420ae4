"""Precision, recall and F1 over score thresholds; precision over recall; how far scores are probabilities. Beside the
road."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina.evaluation.metrics import RECALLS
from retina.evaluation.outcomes import Outcomes

GRID = np.arange(100) / 100
"""[S] score thresholds at which detections are counted."""


def counts_over_thresholds(
    outcomes: Outcomes, grid: Float64[np.ndarray, "S"] = GRID
) -> tuple[Int64[np.ndarray, "K S"], Int64[np.ndarray, "K S"]]:
    """Hits and false alarms of each class with a score of at least each threshold."""
    num_classes = len(outcomes.annotations.classes)
    hit, ignored = outcomes.hits(), outcomes.ignored()
    bins = np.searchsorted(grid, outcomes.scores, side="right")  # thresholds that are reached
    tables = []
    for chosen in (hit, ~hit & ~ignored):
        cells = outcomes.labels[chosen] * (len(grid) + 1) + bins[chosen]
        table = np.bincount(cells, minlength=num_classes * (len(grid) + 1)).reshape(num_classes, -1)
        tables.append(np.cumsum(table[:, ::-1], axis=1)[:, ::-1][:, 1:].astype(np.int64))
    return tables[0], tables[1]


def precision_over_recall(
    hit: Bool[np.ndarray, "n"], counted: Bool[np.ndarray, "n"], num_objects: int
) -> Float64[np.ndarray, "P"]:
    """COCO's interpolated precision at `RECALLS` of detections of one class, best score first; NaN without objects."""
    if not num_objects:
        return np.full(len(RECALLS), np.nan)
    kept = np.cumsum(counted)[hit]
    true = np.arange(1, len(kept) + 1)
    envelope = np.maximum.accumulate((true / np.maximum(kept, 1))[::-1])[::-1]
    first = np.searchsorted(true / num_objects, RECALLS, side="left")
    return np.append(envelope, 0.0)[np.minimum(first, len(kept))]


def precision_curves(outcomes: Outcomes) -> Float64[np.ndarray, "T K P"]:
    """At every IoU threshold, of every class."""
    counts = outcomes.annotations.class_counts().tolist()
    parts = [outcomes.of_class(label) for label in range(len(counts))]
    curves = []
    for number in range(outcomes.objects.shape[1]):
        hit, counted = outcomes.hits(number), ~outcomes.ignored(number)
        curves.append(
            [precision_over_recall(hit[part], counted[part], n) for part, n in zip(parts, counts, strict=True)]
        )
    return np.array(curves, dtype=np.float64).reshape(outcomes.objects.shape[1], len(counts), len(RECALLS))


def calibration(outcomes: Outcomes, num_bins: int = 10) -> dict[str, Any]:
    """Scores against the share of detections that are right (IoU 0.5), in bins of equal width.

    ece: mean gap between the two, weighted by detections; None without any. Detections that took a crowd region do not
    count. Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""
    counted = ~outcomes.ignored()
    scores, hits = outcomes.scores[counted], outcomes.hits()[counted]
    bins = np.clip((scores * num_bins).astype(np.int64), 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    score, right = (np.bincount(bins, values, minlength=num_bins) for values in (scores, hits))
    gaps = np.abs(score - right).sum() / max(len(scores), 1)
    rows = [
        {"from": low / num_bins, "count": int(n), "score": s / n if n else None, "right": float(r / n) if n else None}
        for low, (n, s, r) in enumerate(zip(count.tolist(), score.tolist(), right.tolist(), strict=True))
    ]
    return {"ece": float(gaps) if len(scores) else None, "bins": rows}
