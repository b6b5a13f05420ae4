"""Precision over recall, and which class is taken for which, as pictures for trackers. Beside the road."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from retina.data.annotations import Annotations
from retina.errors import plain
from retina.evaluation.confusion import confusion_matrix
from retina.evaluation.metrics import DetectionArrays
from retina.evaluation.outcomes import Outcomes, find_outcomes

_CLASSES = 30
"""That a picture shows: those with most objects."""


def decision_pictures(
    annotations: Annotations, detections: DetectionArrays, point: Mapping[str, Any], *, max_dets: int
) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
    """By the name of the picture. `point`: of `fit_operating_point`; without any there are no pictures."""
    if not point:
        return {}
    outcomes = find_outcomes(annotations, detections, max_dets=max_dets)
    thresholds = np.array([one["threshold"] for one in point["classes"]], dtype=np.float64)
    shown = np.sort(np.argsort(-outcomes.annotations.class_counts(), kind="stable")[:_CLASSES])
    return {"precision_recall": _curves(outcomes, shown), "confusion": _confusion(outcomes, thresholds, shown)}


def _curves(outcomes: Outcomes, shown: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Of each class at IoU 0.5."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(5, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    hits, ignored, counts = outcomes.hits(), outcomes.ignored(), outcomes.annotations.class_counts()
    for label in shown.tolist():
        part = outcomes.of_class(label)
        right, counted = np.cumsum(hits[part]), np.cumsum(~ignored[part])
        if counts[label] and len(right):
            name = plain(outcomes.annotations.classes[label])
            axes.plot(right / counts[label], right / np.maximum(counted, 1), label=name, linewidth=1)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1), title="IoU 0.5")
    axes.grid(alpha=0.3)
    if 0 < len(axes.lines) <= 10:
        axes.legend(fontsize="small")
    return _pixels(figure)


def _confusion(
    outcomes: Outcomes, thresholds: Float64[np.ndarray, "K"], shown: np.ndarray
) -> UInt8[np.ndarray, "H W 3"]:
    """At the thresholds, as shares of the objects of each class (rows)."""
    from matplotlib.figure import Figure

    matrix = confusion_matrix(outcomes, outcomes.above(thresholds))
    rows = [*shown.tolist(), len(thresholds)]
    names = [*(plain(outcomes.annotations.classes[label])[:16] for label in shown.tolist()), "background"]
    part = matrix[np.ix_(rows, rows)]
    shares = part / np.maximum(part.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(2.5 + 0.35 * len(rows), 2 + 0.35 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(rows)), names, rotation=90)
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlabel="detected as", ylabel="object", title="at the operating point")
    for row, column in np.argwhere(part > 0).tolist() if len(rows) <= 16 else []:
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(part[row, column]), ha="center", va="center", fontsize="small", color=colour)
    return _pixels(figure)


def _pixels(figure: object) -> UInt8[np.ndarray, "H W 3"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)  # type: ignore[arg-type]
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
