"""Intervals by resampling images: what else a number could have been, had other images been drawn. Beside the road."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, UInt8

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
