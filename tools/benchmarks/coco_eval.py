"""COCO's box metrics against pycocotools, and what they cost on a data set like COCO val2017."""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina.data.annotations import Annotations
from retina.evaluation.metrics import DetectionArrays, coco_metrics
from retina.lab.clock import Bench, Row, absolute, speedup

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def run(bench: Bench) -> list[Row]:
    if bench.device.type != "cpu":  # there is nothing for a GPU to do
        bench = Bench(device=torch.device("cpu"), rounds=bench.rounds, quick=bench.quick)
    num_images, num_classes = (20, 5) if bench.quick else (2000, 80)
    annotations, detections = _drawn(num_images, objects=10, detections=100, num_classes=num_classes)
    truth, results = _as_coco(annotations, detections)

    ours = coco_metrics(annotations, detections)
    theirs = dict(zip(NAMES, _pycocotools(truth, results), strict=True))
    for name, value in theirs.items():
        assert ours[name] is not None, name
        assert abs(ours[name] - value) <= 1e-12, (name, ours[name], value)
    ways = {"ours": lambda: coco_metrics(annotations, detections), "reference": lambda: _pycocotools(truth, results)}
    size = f"{num_images} images x 10 objects x 100 detections x {num_classes} classes"
    rows = [speedup(f"coco_eval, {size}: vs pycocotools", bench.time(ways, warmup=0), must=8, goal=50)]

    num_images = 50 if bench.quick else 5000
    large = _drawn(num_images, objects=7, detections=100, num_classes=80)
    seconds = bench.time({"ours": lambda: coco_metrics(*large)}, warmup=1)["ours"].median
    measure = f"coco_eval, {num_images} images x 7 x 100 x 80 (like COCO val2017): seconds"
    return [*rows, absolute(measure, seconds, "s")]


def _drawn(num_images: int, *, objects: int, detections: int, num_classes: int) -> tuple[Annotations, DetectionArrays]:
    """Objects of all sizes, one in a hundred a crowd region; detections of which some 40 % are near one of them, with
    scores of 4 digits, so that ties occur."""
    generator = np.random.default_rng(0)
    total = num_images * objects
    sides = np.exp(generator.uniform(np.log(8), np.log(300), (total, 2)))
    corners = generator.random((total, 2)) * (np.array([640, 480]) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1)
    labels = generator.integers(0, num_classes, total)
    annotations = Annotations(
        file=Path("drawn.json"),
        image_root=Path(),
        classes=tuple(f"class {k}" for k in range(num_classes)),
        category_ids=tuple(range(1, num_classes + 1)),
        image_ids=np.arange(1, num_images + 1),
        sizes=np.tile([480, 640], (num_images, 1)),
        offsets=np.arange(num_images + 1) * objects,
        boxes=boxes,
        labels=labels,
        crowd=generator.random(total) < 0.01,
        areas=sides.prod(axis=1),
        names=np.empty(0, np.uint8),
        name_offsets=np.zeros(num_images + 1, np.int64),
    )
    images = np.repeat(np.arange(num_images), detections)
    near = generator.random(len(images)) < 0.4
    model = images * objects + generator.integers(0, objects, len(images))
    spread = np.where(near, 4, 60)[:, None]
    found = boxes[model] + generator.normal(0, 1, (len(images), 4)) * spread
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    own = np.where(near, labels[model], generator.integers(0, num_classes, len(images)))
    scores = np.round(generator.random(len(images)) * np.where(near, 1, 0.6), 4)
    return annotations, DetectionArrays(images, found, scores, own)


def _as_coco(annotations: Annotations, detections: DetectionArrays) -> tuple[COCO, np.ndarray]:
    """The same for pycocotools: the data set, and results as rows of (image, x, y, w, h, score, category)."""
    images = np.repeat(annotations.image_ids, np.diff(annotations.offsets)).tolist()
    columns = (images, _xywh(annotations.boxes).tolist(), annotations.labels.tolist())
    rows = zip(*columns, annotations.areas.tolist(), annotations.crowd.tolist(), strict=True)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in annotations.image_ids.tolist()],
        "categories": [{"id": k} for k in annotations.category_ids],
        "annotations": [
            {"id": i, "image_id": image, "bbox": box, "category_id": k + 1, "area": area, "iscrowd": int(crowd)}
            for i, (image, box, k, area, crowd) in enumerate(rows, start=1)
        ],
    }
    results = np.column_stack(
        [annotations.image_ids[detections.indices], _xywh(detections.boxes), detections.scores, detections.labels + 1]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth, results


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _pycocotools(truth: COCO, results: np.ndarray) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats
