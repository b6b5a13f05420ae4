"""Plants wrong labels in a data set and counts how many of them an audit finds, beside cleanlab on the same detections.

python tools/benchmarks/planted_labels.py data/bccd out/planted --seed 0
python tools/benchmarks/planted_labels.py data/bccd out/planted --seed 0 --folds 2 train.length=5ep

20 images lose all their labels, 15 objects get another class (where there are others), 15 objects lose their label, and
15 boxes are shifted by a third of their sides. The detectors are trained on that. A suspect is right if it is about a
label that was changed, or its box overlaps a removed or shifted object by an IoU of 0.5. cleanlab is optional.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retina.cli.audit import AuditConfig, detect, subset, train_folds
from retina.data.annotations import Annotations
from retina.data.coco import read_coco
from retina.data.layouts import locate_split
from retina.evaluation.audit import find_suspects
from retina.evaluation.metrics import DetectionArrays
from retina.files import make_folder, write_whole
from retina.printing import say

SETTINGS = [
    *("auto=false", "data.short_side=144", "data.long_side=192", "data.num_workers=0", "trackers=[]"),
    *("model.backbone=resnet18", "model.levels=[3,4,5]", "model.fpn_channels=96", "model.head_convs=2"),
    *("optimizer.lr=0.001", "schedule=cosine", "schedule.warmup=20", "train.length=8ep"),
    *("train.batch_size=8", "train.lr_batch_size=8", "train.precision=fp32"),
]
_SAME = 0.5


class Fault(NamedTuple):
    kind: str
    """unlabelled, missing, class or place."""
    image: int
    boxes: list[list[float]]
    """As they were."""
    row: int | None
    """Of the changed label in the dirty annotations."""


class Guess(NamedTuple):
    """What one of the two suspects."""

    image: int
    box: list[float]
    row: int | None


def main(typed: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="planted labels that an audit finds")
    parser.add_argument("root", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="of the trainings, after those that this file gives")
    given = parser.parse_intermixed_args(typed)
    clean = read_coco(*locate_split(given.root, "train"))
    dirty, faults = plant(clean, given.seed)
    make_folder(given.output)
    file = given.output / "dirty.json"
    write_whole(file, json.dumps(subset(dirty, list(range(len(dirty))))).encode())
    dirty = read_coco(file, clean.image_root)
    config = AuditConfig(
        checkpoint=None,
        output=str(given.output),
        split="train",
        folds=given.folds,
        training=[*SETTINGS, *given.settings],
        limit=200,
        seed=given.seed,
        device="cpu",
        plugins=[],
        data={},
        traceback=False,
    )
    detections = detect(train_folds(dirty, config, given.output), dirty, config)
    ours = [Guess(one.image, one.box, one.object) for one in find_suspects(dirty, detections)]
    say(*report("retina audit", ours, dirty, faults))
    if find_spec("cleanlab"):
        say(*report("cleanlab", cleanlab_guesses(dirty, detections), dirty, faults))


def plant(clean: Annotations, seed: int) -> tuple[Annotations, list[Fault]]:
    generator = np.random.default_rng(seed)
    images = np.repeat(np.arange(len(clean)), np.diff(clean.offsets))
    full = generator.permutation(np.unique(images))
    stripped, rest = full[:20], full[20:]
    rows = generator.permutation(np.flatnonzero(np.isin(images, rest) & ~clean.crowd))
    deleted, swapped, shifted = rows[:15], rows[15:30], rows[30:45]
    boxes, labels = clean.boxes.copy(), clean.labels.copy()
    if len(clean.classes) > 1:
        labels[swapped] = (labels[swapped] + generator.integers(1, len(clean.classes), len(swapped))) % len(
            clean.classes
        )
    else:
        swapped = swapped[:0]
    sides = boxes[shifted, 2:] - boxes[shifted, :2]
    moved = sides / 3 * generator.choice([-1.0, 1.0], sides.shape)
    sizes = clean.sizes[images[shifted]][:, ::-1]
    moved = np.clip(moved, -boxes[shifted, :2], sizes - boxes[shifted, 2:])
    boxes[shifted] += np.tile(moved, 2)
    kept = ~np.isin(images, stripped)
    kept[deleted] = False
    place = np.cumsum(kept) - 1
    faults = [Fault("unlabelled", int(i), clean.boxes[images == i].tolist(), None) for i in stripped]
    faults += [Fault("missing", int(images[row]), [clean.boxes[row].tolist()], None) for row in deleted]
    faults += [Fault("class", int(images[row]), [], int(place[row])) for row in swapped]
    faults += [Fault("place", int(images[row]), [clean.boxes[row].tolist()], int(place[row])) for row in shifted]
    counts = np.bincount(images[kept], minlength=len(clean))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    fields: Any = {"boxes": boxes[kept], "labels": labels[kept], "crowd": clean.crowd[kept], "areas": areas[kept]}
    return replace(clean, offsets=offsets, **fields), faults


def report(name: str, guesses: Sequence[Guess], dirty: Annotations, faults: Sequence[Fault]) -> list[str]:
    """Precision in the first 50, and recall in the first 100, of all faults and of each kind."""
    right = [next((n for n, fault in enumerate(faults) if is_about(guess, fault)), None) for guess in guesses[:100]]
    found = {number for number in right if number is not None}
    lines = [f"{name}: {sum(one is not None for one in right[:50])} of the first 50 are right"]
    for kind in dict.fromkeys(fault.kind for fault in faults):
        own = [number for number, fault in enumerate(faults) if fault.kind == kind]
        lines.append(f"  {kind}: {sum(number in found for number in own)} of {len(own)} among the first 100")
    return [*lines, f"  all: {len(found)} of {len(faults)} among the first 100"]


def is_about(guess: Guess, fault: Fault) -> bool:
    if guess.image != fault.image:
        return False
    if guess.row is not None:
        return guess.row == fault.row
    return any(_iou(guess.box, box) >= _SAME for box in fault.boxes)


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / max(sum(areas) - shared, 1e-9)


def cleanlab_guesses(dirty: Annotations, detections: DetectionArrays) -> list[Guess]:
    """Its three scores of boxes, lowest first, whatever their kind."""
    from cleanlab.object_detection import rank  # type: ignore[import-not-found]

    labels, predictions = [], []
    for image in range(len(dirty)):
        rows = slice(*dirty.offsets[image : image + 2].tolist())
        labels.append({"bboxes": dirty.boxes[rows], "labels": dirty.labels[rows]})
        here = detections.indices == image
        table = np.column_stack([detections.boxes[here], detections.scores[here]])
        own = detections.labels[here]
        predictions.append(np.array([table[own == label] for label in range(len(dirty.classes))], dtype=object))
    given: Any = {"labels": labels, "predictions": predictions}
    scored: list[tuple[float, Guess]] = []
    for image, scores in enumerate(rank.compute_overlooked_box_scores(**given)):
        boxes = np.concatenate([table[:, :4] for table in predictions[image]])
        scored += [(s, Guess(image, b, None)) for s, b in zip(scores, boxes.tolist(), strict=True)]
    for compute in (rank.compute_badloc_box_scores, rank.compute_swap_box_scores):
        for image, scores in enumerate(compute(**given)):
            first = int(dirty.offsets[image])
            scored += [(s, Guess(image, dirty.boxes[first + k].tolist(), first + k)) for k, s in enumerate(scores)]
    ranked = sorted((pair for pair in scored if np.isfinite(pair[0])), key=lambda pair: pair[0])
    first_of: dict[Any, Guess] = {}  # a label may have two scores
    for _, guess in ranked:
        first_of.setdefault((guess.image, tuple(guess.box), guess.row), guess)
    return list(first_of.values())


if __name__ == "__main__":
    main()
