"""The elements of a detector's classification loss: counted over the images of a data set, and what the counts say.

An element is one class of one anchor. With z its logit against the truth (x where the truth is no, -x where it is
yes), the focal loss s^gamma softplus(z), s = sigmoid(z), rises with z for every gamma. So one order of the elements,
from easy to hard, serves all gammas. They are counted in bins of z, with the mean z of every bin, in memory that does
not grow with them; any gamma is evaluated later.

Exactness: counts are exact. A bin's loss is that of its mean z, which in bins of width w is off by at most
(gamma + 1)^2 w^2 / 8 of itself to leading order: 0.03 % at gamma 2, 0.1 % at gamma 5. A share of elements that ends
within a bin takes that part of the bin. What is easier than z = -32 is one bin, and what is harder than 32 another.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from retina.losses.detection import pad_if_empty
from retina.losses.focal import sigmoid_focal_loss
from retina.ops.assigners import Assigner
from retina.types import Assignment, Predictions, Targets

WIDTH = 1 / 64
REACH = 32
BINS = round(2 * REACH / WIDTH)
SHARES = [*(i / 100 for i in range(100)), *(1 - 10 ** (-i / 10) for i in range(21, 60)), 1.0]
"""Of the elements, easiest first: where the cumulative loss is told. Dense at the end, where it rises."""


class Bins(NamedTuple):
    """Elements from the easiest to the hardest bin; bins without any are left out."""

    counts: NDArray[np.float64]
    logits: NDArray[np.float64]
    """The mean z of each."""

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
        if not losses[-1]:
            return [0.0 for _ in shares]
        counts = np.concatenate(([0.0], self.counts.cumsum()))
        return [float(part) for part in np.interp(np.asarray(shares) * counts[-1], counts, losses) / losses[-1]]

    def hardest(self, gamma: float, share: float) -> float:
        """The part of the loss that the hardest share of the elements has; 0 if there is no loss."""
        if not len(self.counts):
            return 0.0
        return 1 - self.cumulative(gamma, [1 - share])[0]


class Histograms:
    """Bins of `rows` groups of elements."""

    def __init__(self, rows: int) -> None:
        self.counts = torch.zeros(rows, BINS, dtype=torch.float64)
        self.sums = torch.zeros(rows, BINS, dtype=torch.float64)

    def add(self, row: int, other: "Histograms") -> None:
        """All groups of another become part of one group of this."""
        self.counts[row] += other.counts.sum(dim=0)
        self.sums[row] += other.sums.sum(dim=0)

    def merge(self, other: "Histograms") -> None:
        self.counts += other.counts
        self.sums += other.sums

    def of(self, row: int) -> Bins:
        return _bins(self.counts[row], self.sums[row])

    def all(self) -> Bins:
        return _bins(self.counts.sum(dim=0), self.sums.sum(dim=0))


def histograms(logits: Float[Tensor, "N"], rows: Int64[Tensor, "N"], num_rows: int) -> Histograms:
    """Of elements given by their logit against the truth and their group."""
    bins = ((logits + REACH) / WIDTH).long().clamp(0, BINS - 1) + rows * BINS
    found = Histograms(num_rows)
    found.counts += bins.bincount(minlength=num_rows * BINS).view(num_rows, BINS)
    found.sums += bins.bincount(logits.double(), minlength=num_rows * BINS).view(num_rows, BINS)
    return found


def _bins(counts: Float[Tensor, "bins"], sums: Float[Tensor, "bins"]) -> Bins:
    there = counts > 0
    return Bins(counts[there].numpy(), (sums[there] / counts[there]).numpy())


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
        self.num_classes = num_classes
        self.positives = {"class": Histograms(num_classes), "level": Histograms(num_levels)}
        self.negatives = {"class": Histograms(num_classes), "level": Histograms(num_levels)}
        self.positive_anchors = 0
        self.anchors = 0
        """That are positive or negative."""

    def add(self, predictions: Predictions, labels: Int64[Tensor, "B A"], assigned: Assignment) -> None:
        """A batch; `labels` say something at positive anchors only."""
        counts = [len(anchors) for anchors in predictions.anchors]
        parts = (part.split(counts, dim=1) for part in (labels, assigned.positive, assigned.negative))
        for level, (logits, *of_level) in enumerate(zip(predictions.logits, *parts, strict=True)):
            for image in zip(logits, *of_level, strict=True):  # one at a time: each makes two float64 copies
                self._add(level, *(tensor.detach().cpu() for tensor in image))

    def _add(
        self,
        level: int,
        logits: Float[Tensor, "A_l K"],
        labels: Int64[Tensor, "A_l"],
        positive: Bool[Tensor, "A_l"],
        negative: Bool[Tensor, "A_l"],
    ) -> None:
        classes = torch.arange(self.num_classes).expand(logits.shape)
        is_class = positive[:, None] & (labels[:, None] == classes)
        is_not = (positive | negative)[:, None] & ~is_class
        logits = logits.float()
        for groups, elements, against_truth in (
            (self.positives, is_class, -logits[is_class]),
            (self.negatives, is_not, logits[is_not]),
        ):
            batch = histograms(against_truth, classes[elements], self.num_classes)
            groups["class"].merge(batch)
            groups["level"].add(level, batch)
        self.positive_anchors += int(positive.sum())
        self.anchors += int((positive | negative).sum())


def describe(
    elements: Elements,
    classes: Sequence[str],
    levels: Sequence[str],
    gammas: Sequence[float],
    alphas: Sequence[float],
) -> dict[str, Any]:
    """All numbers, as they go into the file."""
    groups = {"positives": elements.positives, "negatives": elements.negatives}
    names = {"class": classes, "level": levels}
    whole = {kind: of["class"].all() for kind, of in groups.items()}
    anchors = max(elements.positive_anchors, 1)
    rescored = []
    for gamma in gammas:
        positives, negatives = (whole[kind].total(gamma) / anchors for kind in ("positives", "negatives"))
        for alpha in [None, *alphas]:
            weights = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
            parts = [weight * part for weight, part in zip(weights, (positives, negatives), strict=True)]
            share = parts[0] / sum(parts) if sum(parts) else 0.0
            row = {"gamma": gamma, "alpha": alpha, "loss_per_positive": sum(parts), "share_of_positives": share}
            rescored.append(row)
    result: dict[str, Any] = {
        "anchors": elements.anchors,
        "positive_anchors": elements.positive_anchors,
        "rescored": rescored,
        "shares": SHARES,
    }
    for kind, of in groups.items():
        result[kind] = {"all": numbers(whole[kind], whole[kind], gammas)}
        for by in ("class", "level"):
            result[kind][by] = {name: numbers(of[by].of(i), whole[kind], gammas) for i, name in enumerate(names[by])}
    return result


def numbers(bins: Bins, whole: Bins, gammas: Sequence[float]) -> dict[str, Any]:
    """Of one group of elements, under each gamma and without alpha; `share` is the group's part of the whole loss."""
    count = int(bins.counts.sum())
    found: dict[str, Any] = {"elements": count}
    for gamma in gammas:
        found[f"gamma {gamma:g}"] = {
            "mean_loss": bins.total(gamma) / max(count, 1),
            "share": bins.total(gamma) / (whole.total(gamma) or 1),
            "hardest_1_percent": bins.hardest(gamma, 0.01),
            "hardest_10_percent": bins.hardest(gamma, 0.1),
            "cumulative": bins.cumulative(gamma, SHARES),
        }
    return found


def summary(result: Mapping[str, Any]) -> str:
    """What the screen shows."""
    kinds = ("positives", "negatives")
    counts = ", ".join(f"{result[kind]['all']['elements']:,} {kind}" for kind in kinds)
    lines = [
        f"{result['images']:,} images, {result['positive_anchors']:,} of {result['anchors']:,} anchors positive",
        f"elements: {counts}",
        "",
        "share of the loss that the hardest 1 % and 10 % carry:",
        f"{'gamma':<8}" + "".join(f"{kind:>22}" for kind in kinds),
    ]
    for gamma in (key for key in result["positives"]["all"] if key.startswith("gamma ")):
        cells = (result[kind]["all"][gamma] for kind in kinds)
        shown = (f"{of['hardest_1_percent']:.1%} {of['hardest_10_percent']:7.1%}" for of in cells)
        lines.append(f"{gamma.removeprefix('gamma '):<8}" + "".join(f"{cell:>22}" for cell in shown))
    lines += ["", "the same logits under other losses:"]
    lines += [f"{'gamma':<8}{'alpha':<8}{'per positive':>14}{'of positives':>14}"]
    for row in result["rescored"]:
        alpha = "none" if row["alpha"] is None else f"{row['alpha']:g}"
        numbers_of_row = f"{row['loss_per_positive']:>14.4g}{row['share_of_positives']:>14.1%}"
        lines.append(f"{row['gamma']:<8g}{alpha:<8}{numbers_of_row}")
    return "\n".join(lines)
