"""Anchors fitted to the objects of a data set, and whether what is gained is more than noise.

What changes are the size of every level, and the scales and ratios that all levels share, as `retinanet` takes them;
the number of anchors per cell is kept. A fit climbs, in log space, the gradient of

    mean over objects of  v + min(v / t, 1),   v the best IoU with any anchor, t the matching threshold,

so that an object which no anchor reaches pulls harder than one that could only be covered better. As in k-means, each
object pulls at the anchor that overlaps it most.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retina.lab.coverage import Objects, Pyramid, best_iou, distances, iou_of_shapes, overlap
from retina.ops.anchors import AnchorGenerator

LEAST_GAIN = 0.01
"""The least difference, of mean best IoU or of recall, that other anchors are worth: new ones cost a trained head."""
LEAST_IMAGES = 8
"""With objects: fewer cannot tell a gain from noise."""
_MOST_OBJECTS = 1500  # that one fit looks at; a few numbers need no more
_MOST_STRIDES = 8  # side of an anchor, but on the coarsest level: a cell sees no more. ATSS (arXiv 1912.02424) has 8
_TIMES = 3  # that the images are cut into halves
LEAST_GAIN_OF_LEVEL = 0.03  # the least gain of recall that one more level is worth: it makes four times as many anchors
_ROUNDS = ((3, 10), (1, 20), (1, 50))  # so many of the starts are left after so many steps
_RATE = 0.06  # of a log side per step


class Logs(NamedTuple):
    """Anchors as the natural logarithms of their numbers."""

    sizes: Float[Tensor, "L"]
    scales: Float[Tensor, "s"]
    ratios: Float[Tensor, "r"]
    """Height / width."""

    def sides(self) -> Float[Tensor, "L s*r 2"]:
        """Width and height of the anchors around a cell."""
        side = (self.sizes[:, None] + self.scales)[:, :, None]
        return torch.stack((side - self.ratios / 2, side + self.ratios / 2), dim=-1).exp().flatten(1, 2)


@dataclass(frozen=True)
class Gain:
    """A difference between two sets of anchors over the same objects, neither of which they were fitted to."""

    mean: float
    noise: float
    """Two standard errors: of the mean over images (objects of one image are alike), or over the ways of cutting the
    data into halves, whichever is larger."""

    @property
    def sign(self) -> int:
        """1 where it rises and -1 where it falls; 0 where the difference is noise, or worth nothing."""
        counts = abs(self.mean) > self.noise and abs(self.mean) >= LEAST_GAIN
        return (1 if self.mean > 0 else -1) if counts else 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.noise:.3f}"


def fit(objects: Objects, pyramid: Pyramid, threshold: float, generator: torch.Generator) -> Pyramid:
    """The pyramid with anchors fitted to the objects, of which there is at least one; the same for the same generator.

    Every way of writing the number of anchors per cell as scales x ratios is tried."""
    rows = torch.randperm(len(objects.boxes), generator=generator)[:_MOST_OBJECTS]
    data = _Data(objects.sides()[rows], distances(objects.of(rows), pyramid), torch.tensor(pyramid.strides), threshold)
    tried = _starts(data.sides, pyramid)
    for number, steps in _ROUNDS:
        climbed = sorted((data.climb(start, steps) for start in tried), key=lambda one: -one[0])
        tried = [logs for _, logs in climbed[:number]]
    return replace(pyramid, anchors=_anchors(data.with_idle_levels(tried[0]), pyramid))


def halves(objects: Objects, times: int, generator: torch.Generator) -> list[Bool[Tensor, "N"]]:
    """Random halves of the images, as masks of their objects. None with fewer than LEAST_IMAGES."""
    images, number = objects.image.unique(return_inverse=True)
    if len(images) < LEAST_IMAGES:
        return []
    return [(torch.randperm(len(images), generator=generator) < len(images) // 2)[number] for _ in range(times)]


def held_out(
    objects: Objects, cuts: Sequence[Bool[Tensor, "N"]], fitted: Callable[[Objects], Pyramid]
) -> Float[Tensor, "S N"]:
    """Best IoU of every object with the anchors fitted to the half that it is not in, for each cut into halves."""
    scores = torch.empty(len(cuts), len(objects.boxes))
    for score, cut in zip(scores, cuts, strict=True):
        for half in (cut, ~cut):
            score[~half] = best_iou(objects.of(~half), fitted(objects.of(half))).amax(dim=1)
    return scores


def gain(objects: Objects, after: Float[Tensor, "S N"], before: Float[Tensor, "*S N"]) -> Gain:
    """Of numbers per object, and per cut into halves or for all of them."""
    differences = after.double() - before.double()
    of_object = differences.mean(dim=0)
    mean = of_object.mean()
    images, number = objects.image.unique(return_inverse=True)
    # of a ratio of two sums over images: Cochran, Sampling Techniques, 3rd edition, section 2.11
    residual = torch.zeros(len(images), dtype=torch.float64).index_add_(0, number, of_object - mean)
    error = (residual.square().sum() * len(images) / (len(images) - 1)).sqrt() / len(of_object)
    return Gain(mean.item(), 2 * max(error.item(), differences.mean(dim=1).std().item()))


class Trial(NamedTuple):
    """What a fit on some levels gains on images that it was not made from."""

    levels: list[int]
    anchors: int
    """On the canvas of most objects."""
    iou: Gain
    """Of the mean best IoU."""
    recall: Gain
    """Of the share of objects that reach the matching threshold."""
    scores: Float[Tensor, "S N"]
    """Best IoU of every object, for each cut of the images into halves."""

    def numbers(self) -> dict[str, Any]:
        gains = {"best_iou": self.iou, "recall_at_threshold": self.recall}
        described = {name: {"gain": g.mean, "noise": g.noise, "counts": g.sign != 0} for name, g in gains.items()}
        return {"levels": self.levels, "anchors": self.anchors, **described}


class Decision(NamedTuple):
    levels: list[int]
    change: bool
    reason: str


def try_levels(
    objects: Objects, now: Pyramid, starts: Iterable[Pyramid], threshold: float, generator: torch.Generator
) -> list[Trial]:
    """A fit from each start, compared with `now`. Empty where there are too few images to tell noise."""
    cuts = halves(objects, _TIMES, generator)
    before = best_iou(objects, now).amax(dim=1)
    canvas, count = objects.canvas.unique(dim=0, return_counts=True)
    trials = []
    for start in starts if cuts else ():
        scores = held_out(objects, cuts, lambda half, start=start: fit(half, start, threshold, generator))  # type: ignore[misc]
        recall = gain(objects, *((ious >= threshold).float() for ious in (scores, before)))
        cells = int(start.cells(canvas[count.argmax()][None]).prod(dim=-1).sum())
        anchors = cells * start.anchors.num_per_cell
        trials.append(Trial(start.levels, anchors, gain(objects, scores, before), recall, scores))
    return trials


def decide(objects: Objects, trials: Sequence[Trial], levels: list[int], threshold: float) -> Decision:
    """The first trial is that of the levels as they are; another has one level more below, or one less.

    One more level must lift the recall by 0.03; one less must cost neither best IoU nor recall. Then the anchors change
    if one of the two rises and none falls, by `Gain.sign`; or if a level is saved and none falls."""
    if not trials:
        return Decision(levels, False, f"no change: fewer than {LEAST_IMAGES} images with objects say nothing of noise")
    same, *others = trials
    chosen = same
    for other in others:
        iou = gain(objects, other.scores, same.scores)
        recall = gain(objects, *((trial.scores >= threshold).float() for trial in (other, same)))
        more = len(other.levels) > len(levels)
        if recall.sign > 0 and recall.mean >= LEAST_GAIN_OF_LEVEL if more else min(iou.sign, recall.sign) >= 0:
            chosen = other
            break
    iou, recall = chosen.iou, chosen.recall
    reasons = (
        (min(iou.sign, recall.sign) < 0, False, "what one gains the other loses"),
        (max(iou.sign, recall.sign) > 0, True, "more than noise"),
        (len(chosen.levels) < len(levels), True, "one level less costs nothing"),
        (iou.mean > iou.noise or recall.mean > recall.noise, False, f"a gain below {LEAST_GAIN:g} is worth no change"),
        (True, False, "the gain is within noise"),
    )
    change, why = next((change, why) for holds, change, why in reasons if holds)
    where = "" if len(chosen.levels) == len(levels) else f" from P{chosen.levels[0]} on"
    numbers = f"mean best IoU {iou}, recall {recall} on images not fitted to"
    return Decision(chosen.levels, change, f"{'change' if change else 'no change'}{where}, {why}: {numbers}")


class _Data(NamedTuple):
    """The objects that a fit looks at."""

    sides: Float[Tensor, "N 2"]
    distance: Float[Tensor, "N L 2"]
    """To the nearest anchor's centre."""
    strides: Int64[Tensor, "L"]
    threshold: float

    def climb(self, start: Logs, steps: int) -> tuple[float, Logs]:
        """The value reached, and where: Adam's steps (Kingma and Ba, ICLR 2015), whose rate falls to 0."""
        logs = Logs(*(part.clone().requires_grad_() for part in start))
        optimizer = torch.optim.Adam(logs, maximize=True)
        most = (_MOST_STRIDES * self.strides).log()
        most[-1] = math.inf
        for step in range(steps + 1):
            with torch.no_grad():  # a coarser level has no smaller anchors
                logs.sizes.copy_(torch.minimum(logs.sizes.cummax(dim=0).values, most - logs.scales.max()))
            optimizer.zero_grad()
            value = self.value(logs)
            value.backward()
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / steps)
            optimizer.step()
        return value.item(), Logs(*(part.detach() for part in logs))

    def value(self, logs: Logs) -> Float[Tensor, ""]:
        """What a fit climbs."""
        sides = logs.sides()
        winner = self.winners(logs)
        distance = self.distance[torch.arange(len(winner)), winner // sides.shape[1]]
        iou = overlap(self.sides.T, distance.T, sides.flatten(0, 1)[winner].T)
        return (iou + (iou / self.threshold).clamp(max=1)).mean()

    @torch.no_grad()
    def winners(self, logs: Logs) -> Int64[Tensor, "N"]:
        """The best of all L x n shapes for each object."""
        return iou_of_shapes(self.sides, self.distance, logs.sides()).flatten(0, 1).argmax(dim=0)

    def with_idle_levels(self, logs: Logs) -> Logs:
        """The levels above and below all those that win an object follow by octaves: nothing pulled at them."""
        used = (self.winners(logs) // (len(logs.scales) * len(logs.ratios))).unique().tolist()
        sizes = logs.sizes.clone()
        for level in range(used[-1] + 1, len(sizes)):
            sizes[level] = sizes[level - 1] + math.log(2)
        for level in reversed(range(used[0])):
            sizes[level] = sizes[level + 1] - math.log(2)
        return logs._replace(sizes=sizes)


def _starts(sides: Float[Tensor, "N 2"], pyramid: Pyramid) -> list[Logs]:
    """The anchors as they are; and for every way of cutting their number into scales and ratios, levels that share the
    objects, or the octaves between the smallest and the largest, evenly."""
    sizes, ratios = sides.log().mean(dim=1), (sides[:, 1] / sides[:, 0]).log()
    levels = _middles(len(pyramid.strides))
    by_number = torch.quantile(sizes, levels)
    low, high = torch.quantile(sizes, torch.tensor([0.02, 0.98]))
    by_octaves = low + (high - low) * levels
    now = pyramid.anchors
    starts = [Logs(*(torch.tensor(numbers).log() for numbers in (now.sizes, now.scales, now.ratios)))]
    for count in range(1, now.num_per_cell + 1):
        if now.num_per_cell % count == 0:
            of_ratio = torch.quantile(ratios, _middles(now.num_per_cell // count))
            # the paper's octave, and the distance of the levels
            for middle, span in ((by_number, math.log(2)), (by_octaves, float(high - low) / len(levels))):
                starts.append(Logs(middle, span * (_middles(count) - 0.5), of_ratio))
    return starts


def _middles(count: int) -> Float[Tensor, "n"]:
    """Of equal parts of 0..1."""
    return (torch.arange(count) + 0.5) / count


def _anchors(logs: Logs, pyramid: Pyramid) -> AnchorGenerator:
    """Scales begin with 1, all ascend, and no number has more digits than it deserves."""
    sizes, scales, ratios = (part.exp() for part in logs)
    least = scales.min()

    def plain(numbers: Tensor) -> tuple[float, ...]:
        return tuple(float(f"{number:.3g}") for number in numbers.tolist())

    return replace(
        pyramid.anchors,
        sizes=plain(sizes * least),
        scales=plain(scales.sort().values / least),
        ratios=plain(ratios.sort().values),
    )
