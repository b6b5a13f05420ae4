"""COCO's box metrics against pycocotools, and what they cost on a data set like COCO val2017."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from retina.data.coco import read_coco
from retina.evaluation.cross_check import load_truth, score
from retina.evaluation.metrics import METRICS, coco_metrics
from retina.evaluation.results import read_results
from retina.files import write_whole
from retina.lab.clock import Bench, Row, absolute, speedup


def run(bench: Bench) -> list[Row]:
    if bench.device.type != "cpu":  # there is nothing for a GPU to do
        bench = Bench(device=torch.device("cpu"), rounds=bench.rounds, quick=bench.quick)
    num_images, num_classes = (20, 5) if bench.quick else (2000, 80)
    document, results = draw(num_images, objects=10, detections=100, num_classes=num_classes)
    data, truth = as_read(document, results), load_truth(document)
    metrics, reference = coco_metrics(*data), score(truth, results)
    for name, value in zip(METRICS, reference, strict=True):
        assert abs(metrics[name] - value) <= 1e-12, (name, metrics[name], value)
    times = bench.time({"ours": lambda: coco_metrics(*data), "reference": lambda: score(truth, results)}, warmup=0)
    size = f"{num_images} images x 10 objects x 100 detections x {num_classes} classes"
    row = speedup(f"coco_eval, {size}: vs pycocotools", times, must=8, goal=50)

    num_images = 50 if bench.quick else 5000
    large = as_read(*draw(num_images, objects=7, detections=100, num_classes=80))
    seconds = bench.time({"ours": lambda: coco_metrics(*large)}, warmup=1)["ours"].median
    return [row, absolute(f"coco_eval, {num_images} images x 7 x 100 x 80 (like COCO val2017): seconds", seconds, "s")]


def draw(
    num_images: int, *, objects: int, detections: int, num_classes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An annotation file and results. Objects of all sizes, one in a hundred a crowd region; detections of which some
    40 % are near one of them, with scores of 4 digits, so that ties occur."""
    generator = np.random.default_rng(0)
    total = num_images * objects
    sides = np.exp(generator.uniform(np.log(8), np.log(300), (total, 2)))
    boxes = np.hstack([generator.random((total, 2)) * (np.array([640, 480]) - sides), sides]).round(2)
    labels = generator.integers(1, num_classes + 1, total)
    crowd = (generator.random(total) < 0.01).astype(int)
    image_ids = np.repeat(np.arange(1, num_images + 1), objects)
    rows = zip(image_ids.tolist(), labels.tolist(), boxes.tolist(), crowd.tolist(), strict=True)
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, num_images + 1)],
        "categories": [{"id": k, "name": str(k)} for k in range(1, num_classes + 1)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for number, (image, k, box, crowd) in enumerate(rows, start=1)
        ],
    }
    images = np.repeat(np.arange(num_images), detections)
    near = generator.random(len(images)) < 0.4
    nearest = images * objects + generator.integers(0, objects, len(images))
    noise = generator.normal(0, 1, (len(images), 4)) * np.where(near, 4, 60)[:, None]
    predicted = np.maximum(boxes[nearest] + noise, [-np.inf, -np.inf, 1, 1]).round(2)
    classes = np.where(near, labels[nearest], generator.integers(1, num_classes + 1, len(images)))
    scores = np.round(generator.random(len(images)) * np.where(near, 1, 0.6), 4)
    columns = ((images + 1).tolist(), classes.tolist(), predicted.tolist(), scores.tolist())
    keys = ("image_id", "category_id", "bbox", "score")
    return document, [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def as_read(document: dict[str, Any], results: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Annotations and detections, as our readers give them."""
    with TemporaryDirectory() as folder:
        truth, detections = Path(folder, "truth.json"), Path(folder, "detections.json")
        write_whole(truth, json.dumps(document).encode())
        write_whole(detections, json.dumps(results).encode())
        annotations = read_coco(truth, Path(folder))
        return annotations, read_results(detections, annotations)
