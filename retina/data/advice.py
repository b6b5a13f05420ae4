"""What a data set asks of the settings: object sizes as a detector sees them, rare classes, crowds. Beside the road."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64

from retina.data.annotations import Annotations
from retina.data.checks import some
from retina.data.oddities import crowding

FINEST_STRIDE = 8
"""Pixels between the anchors of P3, the finest level unless `model.levels` says otherwise."""
_FEW = {"train": 20, "val": 5}
"""Objects of a class below which little is learned, and below which its score says little."""
_TOLERATED = 0.02
"""Share of objects that no anchor can reach without a warning: nearly every data set has some."""


def resized_boxes(split: Annotations, short_side: int, long_side: int) -> Float64[np.ndarray, "T 4"]:
    """Boxes of all objects that have an area, crowd regions left out, in pixels after the resize of evaluation."""
    scales = np.minimum(short_side / split.sizes.min(axis=1), long_side / split.sizes.max(axis=1))
    boxes = split.boxes * np.repeat(scales, np.diff(split.offsets))[:, None]
    return boxes[~split.crowd & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)]


def unreachable(split: Annotations, short_side: int, long_side: int, *, stride: int = FINEST_STRIDE) -> str:
    """A warning if more than a few objects hold no centre of an anchor, as "problem - fix"; else empty.

    Centres stand at multiples of the finest level's stride (those of other levels are among them), and ATSS takes an
    anchor only if its centre lies in the object: such an object is trained as background. (MaxIoU and TaskAligned may
    still reach it, by an anchor that overlaps little.)
    """
    boxes = resized_boxes(split, short_side, long_side)
    inside = (
        np.ceil(boxes[:, 2:] / stride) - np.floor(boxes[:, :2] / stride) - 1
    )  # multiples strictly between the edges
    missed = boxes[(inside < 1).any(axis=1)]
    if len(missed) <= _TOLERATED * len(boxes):
        return ""
    side = float(np.median((missed[:, 2:] - missed[:, :2]).min(axis=1)))
    problem = (
        f"{len(missed)} of {len(boxes)} objects ({len(missed) / len(boxes):.0%}) lie between the anchors of a level"
    )
    problem += f" of stride {stride} at data.short_side={short_side} (they are some {side:.0f} px wide or high)"
    enough = -(-round(short_side * 1.5 * stride / max(side, 0.5)) // 32) * 32
    larger = f"data.short_side={enough} and as much more data.long_side, " if enough > short_side else ""
    fix = f"give a finer level (model.levels=[2,3,4,5,6,7]), {larger}or cut the images into tiles"
    return f"{split.file}: {problem}, and are trained as background with the default loss - {fix}"


def rare_classes(name: str, split: Annotations) -> list[str]:
    """A line if the split of that name has so few objects of some classes that they are hardly learned or measured."""
    counts = sorted(zip(split.class_counts().tolist(), split.classes, strict=True))
    few = [f"{label} ({count})" for count, label in counts if count < _FEW.get(name, _FEW["val"])]
    fix = "annotate more of them, or merge classes"
    if name == "train" and len(counts) > len(few):
        fix += "; data.sampling=class_balanced shows them more often"
    return [f"few objects of {some(few)} - {fix}"] if few else []


def advise(splits: Mapping[str, Annotations], short_side: int, long_side: int, max_dets: int = 100) -> list[str]:
    """A line for each thing that a user of these splits should know before training."""
    lines = []
    for name, split in splits.items():
        boxes = resized_boxes(split, short_side, long_side)
        if len(boxes):
            sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
            low, middle, high = np.quantile(sides, (0.05, 0.5, 0.95)).round().astype(int).tolist()
            small = f"{(sides < 32).mean():.0%} below 32 px"
            at = f"data.short_side={short_side}, data.long_side={long_side}"
            lines.append(f"{name}: objects are {low} to {high} px large at {at}, half of them above {middle}; {small}")
            lines += [line for line in (unreachable(split, short_side, long_side),) if line]
        lines += [f"{name}: {line}" for line in rare_classes(name, split)]
        lines += crowding(split, max_dets, max_dets)
    return lines
