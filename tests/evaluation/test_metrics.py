"""pycocotools is the oracle: all twelve numbers within 1e-12, and what it gets wrong by our own definition."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina.data.coco import Annotations, read_coco
from retina.errors import DataError
from retina.evaluation.metrics import DetectionArrays, coco_metrics
from retina.evaluation.results import read_results

KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SETS = [("cocoapi_val2014_fake100", "dt_bbox", "bbox"), ("review_coco_eval", "dt", "pycocotools_here")]
Ground = dict[str, list[dict[str, Any]]]
Results = list[dict[str, Any]]


def oracle(ground: Ground, results: Results) -> tuple[dict[str, float | None], dict[int, float | None]]:
    """pycocotools' twelve numbers and its AP per category id, undefined as None."""
    coco = COCO()
    coco.dataset = json.loads(json.dumps(ground))
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = dict(zip(KEYS, (None if value == -1 else float(value) for value in evaluation.stats), strict=True))
    per_class: dict[int, float | None] = {}
    for k, category_id in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, k, 0, 2]
        per_class[int(category_id)] = float(precision.mean()) if (precision > -1).all() else None
    return numbers, per_class


def read(folder: Path, ground: Ground, results: Results) -> tuple[Annotations, DetectionArrays]:
    (folder / "gt.json").write_text(json.dumps(ground))
    (folder / "dt.json").write_text(json.dumps(results))
    annotations = read_coco(folder / "gt.json", folder)
    return annotations, read_results(folder / "dt.json", annotations)


def assert_equal(metrics: dict[str, Any], expected: dict[str, float | None], tolerance: float = 1e-12) -> None:
    for key in KEYS:
        ours, theirs = metrics[key], expected[key]
        assert (ours is None) == (theirs is None), (key, ours, theirs)
        assert ours is None or abs(ours - theirs) <= tolerance, (key, ours, theirs)


def box(rng: np.random.Generator, decimals: int | None) -> list[float]:
    side = float(rng.choice([10, 32, 64, 96, 200]))
    values = [*rng.uniform(0, 300, 2), *(side * rng.choice([1, 1, 0.5, 1.3, rng.uniform(0.2, 2)], 2))]
    return [float(value) if decimals is None else round(float(value), decimals) for value in values]


def random_set(seed: int) -> tuple[Ground, Results]:
    """Sparse category ids, images out of order, crowds, score ties, equal and shifted boxes, empty images and classes."""
    rng = np.random.default_rng(seed)
    decimals = [None, 2, 0, 1][seed % 4]
    categories = [int(c) for c in rng.choice(np.arange(1, 90), rng.integers(1, 6), replace=False)]
    images = [int(i) for i in rng.choice(10_000, rng.integers(1, 12), replace=False)]
    objects: list[dict[str, Any]] = []
    for image in images:
        for _ in range(int(rng.integers(0, 14))):
            bbox = box(rng, decimals)
            if objects and rng.random() < 0.15:
                bbox = objects[-1]["bbox"]
            category = int(rng.choice(categories[: max(1, len(categories) - 1)]))
            area = bbox[2] * bbox[3] * float(rng.choice([1, 1, 0.6]))
            crowd = int(rng.random() < 0.15)
            objects.append({"image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": crowd})
    rng.shuffle(objects)
    for position, record in enumerate(objects):
        record["id"] = position + 1
    results: Results = []
    heavy = images[0] if seed % 5 == 0 else None
    for image in images:
        here = [record for record in objects if record["image_id"] == image]
        for _ in range(260 if image == heavy else int(rng.integers(0, 30))):
            bbox, category = box(rng, decimals), int(rng.choice(categories))
            if here and rng.random() < 0.7:
                near = here[int(rng.integers(len(here)))]
                category = near["category_id"]
                # With all digits in use xyxy cannot give back w to the last bit, so no IoU is put on a threshold there.
                step = rng.normal(0, 4) if decimals is None else near["bbox"][2] / 3
                shift = rng.choice([0, 1, 3, step, rng.normal(0, 4)], 4) * rng.choice([-1, 0, 1], 4)
                bbox = [float(value) for value in np.array(near["bbox"]) + shift]
                bbox = bbox if decimals is None else [round(value, decimals) for value in bbox]
                bbox[2:] = [max(value, 1.0) for value in bbox[2:]]
            score = float(rng.random()) if seed % 3 else round(float(rng.random()), 1)
            results.append({"image_id": image, "category_id": category, "bbox": bbox, "score": score})
    rng.shuffle(results)
    width = [{"id": image, "file_name": f"{image}.jpg", "width": 640, "height": 480} for image in images]
    names = [{"id": category, "name": f"class {category}"} for category in categories]
    return {"images": width, "categories": names, "annotations": objects}, results


@pytest.mark.parametrize(("folder", "results", "expected"), SETS)
def test_known_sets(metric_fixtures: Path, folder: str, results: str, expected: str) -> None:
    root = metric_fixtures / folder
    annotations = read_coco(root / "gt.json", root)
    metrics = coco_metrics(annotations, read_results(root / f"{results}.json", annotations))
    known = json.loads((root / "expected.json").read_text())
    assert_equal(metrics, {key: known[expected][key] for key in KEYS})
    live, per_class = oracle(
        json.loads((root / "gt.json").read_text()), json.loads((root / f"{results}.json").read_text())
    )
    assert_equal(metrics, live)
    for category_id, name in zip(annotations.category_ids, annotations.classes, strict=True):
        assert metrics["per_class"][name]["AP"] == pytest.approx(per_class[category_id], abs=1e-12)
    for category_id, values in known.get("bbox_per_category_computed_here_with_pycocotools", {}).items():
        ours = metrics["per_class"][annotations.classes[annotations.category_ids.index(int(category_id))]]
        assert {key: ours[key] for key in values} == pytest.approx(values, abs=1e-12)


def test_edge_cases_of_detectron2(metric_fixtures: Path, tmp_path: Path) -> None:
    root = metric_fixtures / "detectron2_edge"
    ground, results = (json.loads((root / name).read_text()) for name in ("gt.json", "dt.json"))
    known = json.loads((root / "expected.json").read_text())
    expected = {key: None if known["full"][key] == -1 else known["full"][key] for key in KEYS}
    metrics = coco_metrics(*read(tmp_path, ground, results))
    assert_equal(metrics, expected)
    assert_equal(metrics, oracle(ground, results)[0])
    metrics = coco_metrics(*read(tmp_path, ground | {"annotations": []}, results))
    assert set(known["empty_gt"].values()) == {-1}
    assert all(metrics[key] is None for key in KEYS)
    metrics = coco_metrics(*read(tmp_path, ground, []))
    assert [metrics[key] for key in KEYS] == [None if expected[key] is None else 0.0 for key in KEYS]


@pytest.mark.parametrize("seed", range(40))
def test_random_sets_equal_pycocotools(seed: int, tmp_path: Path) -> None:
    ground, results = random_set(seed)
    annotations, detections = read(tmp_path, ground, results)
    metrics = coco_metrics(annotations, detections)
    expected, per_class = oracle(ground, results)
    assert_equal(metrics, expected)
    for category_id, name in zip(annotations.category_ids, annotations.classes, strict=True):
        ours = metrics["per_class"][name]
        assert (ours["AP"] is None) == (per_class[category_id] is None)
        assert ours["AP"] == pytest.approx(per_class[category_id], abs=1e-12)
        real = [a for a in ground["annotations"] if a["category_id"] == category_id and not a["iscrowd"]]
        assert ours["num_objects"] == len(real)
