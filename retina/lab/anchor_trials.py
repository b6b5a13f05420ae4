"""Anchors fitted from other lowest levels on, and the decision whether any of them is worth a change."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from retina.lab.anchor_fit import LEAST_IMAGES, WORTH, Gain, fit, gain, halves, held_out
from retina.lab.coverage import Objects, Pyramid, best_iou

_TIMES = 3  # that the images are cut into halves
_WORTH_OF_LEVEL = 0.03  # the least gain of recall that one more level is worth: it makes four times as many anchors


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
        told = {
            name: {"gain": one.mean, "noise": one.noise, "counts": one.counts}
            for name, one in (("best_iou", self.iou), ("recall_at_threshold", self.recall))
        }
        return {"levels": self.levels, "anchors": self.anchors, **told}


class Decision(NamedTuple):
    levels: list[int]
    change: bool
    reason: str


def try_levels(
    objects: Objects,
    now: Pyramid,
    starts: Iterable[tuple[list[int], Pyramid]],
    threshold: float,
    generator: torch.Generator,
) -> list[Trial]:
    """A fit from each start, compared with `now`. Empty where there are too few images to tell noise."""
    cuts = halves(objects, _TIMES, generator)
    before = best_iou(objects, now).amax(dim=1)
    canvas, count = objects.canvas.unique(dim=0, return_counts=True)
    trials = []
    for levels, start in starts if cuts else ():

        def fitted(half: Objects, start: Pyramid = start) -> Pyramid:
            return fit(half, start, threshold, generator)

        scores = held_out(objects, cuts, fitted)
        cells = int(start.cells(canvas[count.argmax()][None]).prod(dim=-1).sum())
        trials.append(
            Trial(
                levels,
                cells * start.anchors.num_per_cell,
                gain(objects, scores, before),
                gain(objects, *((ious >= threshold).float() for ious in (scores, before))),
                scores,
            )
        )
    return trials


def decide(objects: Objects, trials: Sequence[Trial], levels: list[int], threshold: float) -> Decision:
    """The first trial is that of the levels as they are; another has one level more below, or one less.

    One more level must lift the recall by 0.03; one less must cost neither best IoU nor recall. Then the anchors change
    if one of the two rises and none falls, counting what `Gain.counts`; or if a level is saved and none falls."""
    if not trials:
        return Decision(levels, False, f"no change: fewer than {LEAST_IMAGES} images with objects say nothing of noise")
    same, *others = trials
    chosen = same
    for other in others:
        iou = gain(objects, other.scores, same.scores)
        recall = gain(objects, *((trial.scores >= threshold).float() for trial in (other, same)))
        if len(other.levels) > len(levels):
            pays = recall.rises and recall.mean >= _WORTH_OF_LEVEL
        else:
            pays = not (iou.falls or recall.falls)
        if pays:
            chosen = other
            break
    return _judged(chosen, len(levels))


def _judged(trial: Trial, number: int) -> Decision:
    """`number`: of levels as they are."""
    iou, recall = trial.iou, trial.recall
    if iou.falls or recall.falls:
        change, why = False, "what one gains the other loses"
    elif iou.rises or recall.rises:
        change, why = True, "more than noise"
    elif len(trial.levels) < number:
        change, why = True, "one level less costs nothing"
    elif max(iou.mean - iou.noise, recall.mean - recall.noise) > 0:
        change, why = False, f"a gain below {WORTH:g} is worth no change"
    else:
        change, why = False, "the gain is within noise"
    where = "" if len(trial.levels) == number else f" from P{trial.levels[0]} on"
    told = f"{why}: mean best IoU {iou}, recall {recall} on images not fitted to"
    return Decision(trial.levels, change, f"{'change' if change else 'no change'}{where}, {told}")
