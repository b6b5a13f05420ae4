"""Intervals by resampling images: what else a number could have been, had other images been drawn. Beside the road."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, UInt8

from retina.evaluation.outcomes import Outcomes

DRAWS = 1000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def resamples(num_images: int, draws: int = DRAWS, seed: int = 0) -> UInt8[np.ndarray, "R N"]:
    """How often each image is drawn when as many as there are are drawn with replacement, `draws` times.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993."""
    generator = np.random.default_rng(seed)
    weights = np.empty((draws, num_images), dtype=np.uint8)
    for row in weights:
        row[:] = np.bincount(generator.integers(0, num_images, num_images), minlength=num_images)
    return weights


def weighted_sums(
    weights: UInt8[np.ndarray, "R N"], images: Int64[np.ndarray, "E"], values: Float[np.ndarray, "E V"]
) -> Float[np.ndarray, "R V"]:
    """Sums over entries, each as often as its image is drawn."""
    per_image, where = np.unique(images, return_inverse=True)
    totals = np.zeros((len(per_image), values.shape[1]), dtype=np.float32)
    np.add.at(totals, where, values)
    return weights[:, per_image].astype(np.float32) @ totals


def interval(value: float, draws: Float[np.ndarray, "R"], level: float = LEVEL) -> Estimate | None:
    """The value with the percentiles of its draws; draws in which it is undefined (NaN) do not count.

    None where the value itself is undefined."""
    defined = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Estimate(float(value), min(low, float(value)), max(high, float(value)))


_CELLS = 1 << 21
"""Numbers of a resampled curve that are in memory at a time."""
_FEW_OBJECTS = 20_000
"""Up to which float32 tells a recall from the next."""


def resampled_ap(outcomes: Outcomes, weights: UInt8[np.ndarray, "R N"]) -> Float[np.ndarray, "R K T"]:
    """AP of every class at every IoU threshold, had each image been there as often as `weights` say; NaN where
    no object is left.

    Of COCO's AP up to rounding: a recall that is met to the last bit is met here, and may not be there."""
    annotations, num_classes = outcomes.annotations, len(outcomes.annotations.classes)
    draws, num_thresholds = len(weights), outcomes.objects.shape[1]
    values = np.full((draws, num_classes, num_thresholds), np.nan, dtype=np.float32)
    counted, places = ~annotations.crowd, outcomes.object_images()
    hits = np.stack([outcomes.hits(number) for number in range(num_thresholds)], axis=1)
    ignored = np.stack([outcomes.ignored(number) for number in range(num_thresholds)], axis=1)
    for label in range(num_classes):
        here = places[counted & (annotations.labels == label)]
        part = outcomes.of_class(label)
        last = np.flatnonzero(hits[part].any(axis=1))[-1:]  # what comes after the last hit changes nothing
        end = part.start + int(last[0]) + 1 if len(last) else part.start
        rows = max(1, _CELLS // max(1, end - part.start, len(here)))
        for first in range(0, draws, rows):
            drawn = weights[first : first + rows]
            objects = drawn.take(here, axis=1).sum(axis=1, dtype=np.int32)
            seen = drawn.take(outcomes.images[part.start : end], axis=1)
            ap = _ap(seen, hits[part.start : end], ignored[part.start : end], objects)
            values[first : first + rows, label] = np.where(objects[:, None] > 0, ap, np.nan)
    return values


def _ap(
    seen: UInt8[np.ndarray, "r n"],
    hits: Bool[np.ndarray, "n T"],
    ignored: Bool[np.ndarray, "n T"],
    objects: Int32[np.ndarray, "r"],
) -> Float[np.ndarray, "r T"]:
    """Of one class, from how often each of its detections, best score first, is drawn. Sums run along the innermost
    axis: along the other one they take ten times as long."""
    values = np.zeros((len(seen), hits.shape[1]), dtype=np.float32)
    some = np.flatnonzero(hits.any(axis=1))
    if not len(some):
        return values
    begins = np.concatenate([[0], some[:-1] + 1])  # of the runs that end with a hit
    # whole numbers in float32, which is exact for so few and faster than integers
    everything = np.cumsum(np.add.reduceat(seen, begins, axis=1, dtype=np.float32), axis=1)
    divisor = np.maximum(objects, 1)[:, None]
    exact = np.float32 if divisor.max() < _FEW_OBJECTS else np.float64
    percent, half = (100 / divisor).astype(exact), (0.5 / divisor).astype(exact)
    for number in range(hits.shape[1]):
        rows = np.flatnonzero(hits[:, number])
        if not len(rows):
            continue
        kept = everything.take(np.searchsorted(some, rows), axis=1)
        if len(aside := np.flatnonzero(ignored[:, number])):
            before = np.zeros((len(seen), len(aside) + 1), dtype=np.float32)
            np.cumsum(seen.take(aside, axis=1), axis=1, dtype=np.float32, out=before[:, 1:])
            kept -= before.take(np.searchsorted(aside, rows), axis=1)
        true = np.cumsum(seen.take(rows, axis=1), axis=1, dtype=np.float32)
        precision = np.divide(true, np.maximum(kept, 1, out=kept), out=kept)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # recalls of 0, 0.01, ..., 1 that each true positive is the first to reach; a half keeps 28.999999 from being 28
        reached = np.floor(true * percent + half) + (true > 0)
        reached[:, 1:] -= reached[:, :-1].copy()
        values[:, number] = np.einsum("rn,rn->r", envelope, reached) / 101
    return values


def mean_over_classes(values: Float[np.ndarray, "R K"]) -> Float[np.ndarray, "R"]:
    """Without classes in which it is undefined; NaN where it is so in all."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=1)
    return np.divide(np.where(defined, values, 0).sum(axis=1), count, out=np.full(len(values), np.nan), where=count > 0)
