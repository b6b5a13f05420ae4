"""The elements of a detector's classification loss: counted over the images of a data set, and what the counts say.

An element is one class of one anchor. With z its logit against the truth (x where the truth is no, -x where it is
yes), the focal loss s^gamma softplus(z), s = sigmoid(z), rises with z for every gamma. So one order of the elements,
from easy to hard, serves all gammas. They are counted in bins of z, with the mean z of every bin, in memory that does
not grow with them; any gamma is evaluated later.

Exactness: counts are exact. A bin's loss is that of its mean z, which in bins of width w is off by at most
(gamma + 1)^2 w^2 / 8 of itself to leading order: 0.03 % at gamma 2, 0.1 % at gamma 5. A share of elements that ends
within a bin takes that part of the bin. What is easier than z = -32 is one bin, and what is harder than 32 another.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from retina.lab.figures import KINDS
from retina.losses.detection import pad_if_empty
from retina.losses.focal import sigmoid_focal_loss
from retina.ops.assigners import Assigner
from retina.types import Assignment, Predictions, Targets

WIDTH = 1 / 64
REACH = 32
BINS = round(2 * REACH / WIDTH)
SHARES = [*(i / 100 for i in range(100)), *(1 - 10 ** (-i / 10) for i in range(21, 60)), 1.0]
"""Of the elements, easiest first: where the cumulative loss is stated. Dense at the end, where it rises."""


class Bins(NamedTuple):
    """Elements from the easiest to the hardest bin; bins without any are left out."""

    counts: NDArray[np.float64]
    logits: NDArray[np.float64]
    """The mean z of each."""

    @classmethod
    def of(cls, histogram: Float[Tensor, "2 bins"]) -> "Bins":
        counts, sums = histogram[:, histogram[0] > 0].numpy()
        return cls(counts, sums / counts)

    def losses(self, gamma: float) -> NDArray[np.float64]:
        """The sum of each bin, without alpha."""
        z = torch.from_numpy(self.logits)
        return self.counts * sigmoid_focal_loss(z, torch.zeros_like(z), alpha=None, gamma=float(gamma)).numpy()

    def total(self, gamma: float) -> float:
        return float(self.losses(gamma).sum())

    def cumulative(self, gamma: float, shares: Sequence[float]) -> list[float]:
        """Of the whole loss, the part that the easiest share of the elements has, for each of `shares`; 0 if there is
        no loss or no element."""
        losses = np.concatenate(([0.0], self.losses(gamma).cumsum()))
        counts = np.concatenate(([0.0], self.counts.cumsum()))
        if not losses[-1]:
            return [0.0 for _ in shares]
        return [float(part) for part in np.interp(np.asarray(shares) * counts[-1], counts, losses) / losses[-1]]

    def hardest(self, gamma: float, share: float) -> float:
        """The part of the loss that the hardest share of the elements has; 0 if there is no element."""
        return 1 - self.cumulative(gamma, [1 - share])[0] if len(self.counts) else 0.0


def histogram(logits: Float[Tensor, "N"], rows: Int64[Tensor, "N"], num_rows: int) -> Float[Tensor, "2 rows bins"]:
    """Counts and sums of elements given by their logit against the truth and their row."""
    bins = ((logits + REACH) / WIDTH).long().clamp(0, BINS - 1) + rows * BINS
    weights = torch.stack((torch.ones_like(logits), logits)).double()
    return torch.stack([bins.bincount(w, minlength=num_rows * BINS).view(num_rows, BINS) for w in weights])


def assign(assigner: Assigner, predictions: Predictions, targets: Targets) -> tuple[Int64[Tensor, "B A"], Assignment]:
    """The label of every anchor's object, and the assignment."""
    targets = pad_if_empty(targets)
    assigned = assigner(predictions, targets)
    return targets.labels.gather(1, assigned.matched), assigned


class Elements:
    """Counts what a classification loss would be a sum of.

    An element is one class of one anchor that is positive or negative. It is positive for the class of the anchor's own
    object, and negative for every other class and at negative anchors. The targets are hard, whatever the loss that
    the detector was trained with."""

    def __init__(self, num_classes: int, num_levels: int) -> None:
        shape = 2, num_classes + num_levels, BINS
        self.num_classes = num_classes
        self.histograms = {kind: torch.zeros(shape, dtype=torch.float64) for kind in KINDS}
        """A row for each class, then one for each level."""
        self.positive_anchors = 0
        self.anchors = 0
        """That are positive or negative."""

    def add(self, predictions: Predictions, labels: Int64[Tensor, "B A"], assigned: Assignment) -> None:
        """A batch; `labels` say something at positive anchors only."""
        counts = [len(anchors) for anchors in predictions.anchors]
        parts = (part.split(counts, dim=1) for part in (labels, assigned.positive, assigned.negative))
        for level, tensors in enumerate(zip(predictions.logits, *parts, strict=True)):
            for image in zip(*tensors, strict=True):  # one at a time: each makes two float64 copies
                self._add(level, *(tensor.detach().cpu() for tensor in image))

    def _add(
        self,
        level: int,
        logits: Float[Tensor, "A_l K"],
        labels: Int64[Tensor, "A_l"],
        positive: Bool[Tensor, "A_l"],
        negative: Bool[Tensor, "A_l"],
    ) -> None:
        is_class = positive[:, None] & (labels[:, None] == torch.arange(self.num_classes))
        is_not = (positive | negative)[:, None] & ~is_class
        for kind, chosen, sign in (("positives", is_class, -1), ("negatives", is_not, 1)):
            batch = histogram(sign * logits[chosen].float(), chosen.nonzero()[:, 1], self.num_classes)
            self.histograms[kind][:, : self.num_classes] += batch
            self.histograms[kind][:, self.num_classes + level] += batch.sum(dim=1)
        self.positive_anchors += int(positive.sum())
        self.anchors += int((positive | negative).sum())


def describe(
    elements: Elements, classes: Sequence[str], levels: Sequence[str], gammas: Sequence[float], alphas: Sequence[float]
) -> dict[str, Any]:
    """All numbers, as they go into the file."""
    anchors = max(elements.positive_anchors, 1)
    rows = {"class": dict(zip(classes, range(len(classes)), strict=True))}
    rows["level"] = {name: len(classes) + i for i, name in enumerate(levels)}
    whole = {kind: Bins.of(of_kind[:, : len(classes)].sum(dim=1)) for kind, of_kind in elements.histograms.items()}
    rescored = []
    for gamma, alpha in itertools.product(gammas, [None, *alphas]):
        weights = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
        positives, negatives = (w * whole[kind].total(gamma) / anchors for w, kind in zip(weights, KINDS, strict=True))
        loss = positives + negatives
        share = positives / loss if loss else 0.0
        rescored.append({"gamma": gamma, "alpha": alpha, "loss_per_positive": loss, "share_of_positives": share})
    anchor_counts = {"anchors": elements.anchors, "positive_anchors": elements.positive_anchors}
    result: dict[str, Any] = {**anchor_counts, "rescored": rescored, "shares": SHARES}
    for kind, of_kind in elements.histograms.items():
        result[kind] = {"all": numbers(whole[kind], whole[kind], gammas)}
        for by, places in rows.items():
            groups = {name: Bins.of(of_kind[:, row]) for name, row in places.items()}
            result[kind][by] = {name: numbers(bins, whole[kind], gammas) for name, bins in groups.items()}
    return result


def numbers(bins: Bins, whole: Bins, gammas: Sequence[float]) -> dict[str, Any]:
    """Of one group of elements, under each gamma and without alpha; `share` is the group's part of the whole loss."""
    count = int(bins.counts.sum())
    by_gamma = {
        f"gamma {gamma:g}": {
            "mean_loss": bins.total(gamma) / max(count, 1),
            "share": bins.total(gamma) / (whole.total(gamma) or 1),
            "hardest_1_percent": bins.hardest(gamma, 0.01),
            "hardest_10_percent": bins.hardest(gamma, 0.1),
            "cumulative": bins.cumulative(gamma, SHARES),
        }
        for gamma in gammas
    }
    return {"elements": count, **by_gamma}


def summary(result: Mapping[str, Any]) -> str:
    """What the screen shows."""
    whole = [result[kind]["all"] for kind in KINDS]
    counts = ", ".join(f"{of_kind['elements']:,} {kind}" for kind, of_kind in zip(KINDS, whole, strict=True))
    lines = [
        f"{result['images']:,} images, {result['positive_anchors']:,} of {result['anchors']:,} anchors positive",
        f"elements: {counts}\n",
        "share of the loss that the hardest 1 % and 10 % carry:",
        f"{'gamma':<8}" + "".join(f"{kind:>22}" for kind in KINDS),
    ]
    for gamma in list(whole[0])[1:]:
        parts = [(of_kind[gamma]["hardest_1_percent"], of_kind[gamma]["hardest_10_percent"]) for of_kind in whole]
        cells = "".join(f"{one:>14.1%} {ten:7.1%}" for one, ten in parts)
        lines.append(f"{gamma.removeprefix('gamma '):<8}{cells}")
    lines += ["\nthe same logits under other losses:"]
    lines += [f"{'gamma':<8}{'alpha':<8}{'per positive':>14}{'of positives':>14}"]
    for row in result["rescored"]:
        alpha = "none" if row["alpha"] is None else f"{row['alpha']:g}"
        cells = f"{row['loss_per_positive']:>14.4g}{row['share_of_positives']:>14.1%}"
        lines.append(f"{row['gamma']:<8g}{alpha:<8}{cells}")
    return "\n".join(lines)
