"""Annotations and detections of random scenes, and the plainest way to say which detection takes which object."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from retina.data.annotations import Annotations, offsets_of
from retina.evaluation.metrics import DetectionArrays


def annotations_of(
    objects: list[tuple[int, int, list[float]]], num_images: int, classes: list[str], crowd: set[int] = frozenset()
) -> Annotations:
    """From (image, label, box) in the order of images; `crowd` are positions in that list."""
    images = np.array([image for image, _, _ in objects], dtype=np.int64)
    assert (np.diff(images) >= 0).all()
    boxes = np.array([box for _, _, box in objects], dtype=np.float64).reshape(-1, 4)
    names = [f"{image}.jpg".encode() for image in range(num_images)]
    return Annotations(
        file=Path("gt.json"),
        image_root=Path("images"),
        classes=tuple(classes),
        category_ids=tuple(range(1, len(classes) + 1)),
        image_ids=np.arange(num_images, dtype=np.int64),
        sizes=np.full((num_images, 2), 200, dtype=np.int64),
        offsets=offsets_of(np.bincount(images, minlength=num_images)),
        boxes=boxes,
        labels=np.array([label for _, label, _ in objects], dtype=np.int64),
        crowd=np.array([row in crowd for row in range(len(objects))], dtype=bool),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_offsets=offsets_of(np.array([len(name) for name in names], dtype=np.int64)),
    )


def detections_of(found: list[tuple[int, int, float, list[float]]]) -> DetectionArrays:
    """From (image, label, score, box)."""
    images, labels, scores, boxes = zip(*found, strict=True) if found else ((), (), (), ())
    return DetectionArrays(
        np.array(images, dtype=np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(scores, dtype=np.float64),
        np.array(labels, dtype=np.int64),
    )


def random_scene(
    seed: int, num_images: int = 30, num_classes: int = 3, decimals: int = 2, crowds: bool = True
) -> tuple[Annotations, DetectionArrays]:
    """Objects, near and far detections, other classes, doubles, crowds and equal scores; an image without anything."""
    generator = np.random.default_rng(seed)
    objects: list[tuple[int, int, list[float]]] = []
    found: list[tuple[int, int, float, list[float]]] = []
    for image in range(num_images - 1):
        for _ in range(int(generator.integers(0, 6))):
            x, y = generator.integers(0, 150, 2).tolist()
            width, height = generator.integers(10, 50, 2).tolist()
            label = int(generator.choice(num_classes, p=_falling(num_classes)))
            objects.append((image, label, [x, y, x + width, y + height]))
            for _ in range(int(generator.integers(0, 3))):
                shift = generator.integers(-6, 7, 4)
                box = [x + shift[0], y + shift[1], x + width + shift[2], y + height + shift[3]]
                other = int(generator.integers(num_classes)) if generator.random() < 0.2 else label
                score = round(float(generator.beta(4, 2)), decimals)
                found.append((image, other, score, [float(value) for value in box]))
        for _ in range(int(generator.integers(0, 3))):
            x, y = generator.integers(0, 150, 2).tolist()
            score = round(float(generator.beta(2, 4)), decimals)
            found.append((image, int(generator.integers(num_classes)), score, [x, y, x + 20.0, y + 20.0]))
    crowd = {row for row in range(len(objects)) if generator.random() < 0.05} if crowds else set()
    order = generator.permutation(len(found)).tolist()
    classes = [f"class {label}" for label in range(num_classes)]
    return annotations_of(objects, num_images, classes, crowd), detections_of([found[row] for row in order])


def _falling(count: int) -> np.ndarray:
    shares = 1.0 / np.arange(1, count + 1)
    return shares / shares.sum()


def iou(a: np.ndarray, b: np.ndarray, *, crowd: bool = False) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    own = (a[2] - a[0]) * (a[3] - a[1])
    other = (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (own if crowd else own + other - width * height)


def plain_matches(annotations: Annotations, detections: DetectionArrays, least: float = 0.5) -> dict[int, int]:
    """Detection to object, image by image, class by class, best score first."""
    taken: dict[int, int] = {}
    for image in range(len(annotations)):
        here = range(annotations.offsets[image], annotations.offsets[image + 1])
        for label in range(len(annotations.classes)):
            rows = [
                row
                for row in range(len(detections.scores))
                if detections.indices[row] == image and detections.labels[row] == label
            ]
            free = {row for row in here if annotations.labels[row] == label}
            for row in sorted(rows, key=lambda row: -detections.scores[row]):
                candidates = []
                for place in sorted(free):
                    crowd = bool(annotations.crowd[place])
                    overlap = iou(detections.boxes[row], annotations.boxes[place], crowd=crowd)
                    if overlap >= least:
                        candidates.append((not crowd, overlap, place))
                if candidates:
                    place = max(candidates)[2]
                    taken[row] = place
                    if not annotations.crowd[place]:
                        free.remove(place)
    return taken


def write_coco(annotations: Annotations, detections: DetectionArrays, folder: Path) -> tuple[str, str]:
    """An annotation file and a results file, for the programs of others."""
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets)).tolist()
    objects: list[dict[str, Any]] = []
    for row, (image, label, box) in enumerate(
        zip(images, annotations.labels.tolist(), annotations.boxes.tolist(), strict=True)
    ):
        sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        record = {"id": row + 1, "image_id": image, "category_id": label + 1, "bbox": sides, "iscrowd": 0}
        objects.append(record | {"area": sides[2] * sides[3]})
    ground = {
        "images": [{"id": image, "width": 200, "height": 200} for image in range(len(annotations))],
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(annotations.classes)],
        "annotations": objects,
    }
    results = [
        {"image_id": i, "category_id": k + 1, "score": s, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for i, b, s, k in zip(*(field.tolist() for field in detections), strict=True)
    ]
    (folder / "gt.json").write_text(json.dumps(ground))
    (folder / "dt.json").write_text(json.dumps(results))
    return str(folder / "gt.json"), str(folder / "dt.json")
