"""pycocotools is the oracle: all twelve numbers within 1e-12, and what it gets wrong by our own definition."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from faults import refused
from ranks import in_processes
from retina.data.coco import Annotations, read_coco
from retina.data.sampler import eval_shard
from retina.errors import DataError
from retina.evaluation.cross_check import pycocotools_metrics
from retina.evaluation.evaluate import DetectionCollector
from retina.evaluation.metrics import DetectionArrays, Scoring, coco_metrics
from retina.evaluation.results import read_results
from retina.types import Detections

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
    """Sparse category ids, images out of order, crowds, score ties, shifted boxes, empty images and classes."""
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
                # With all digits in use xyxy cannot give back w to the last bit: put no IoU on a threshold there.
                step = rng.normal(0, 4, 4) if decimals is None else rng.choice([0, 1, 3, near["bbox"][2] / 3], 4)
                shift = step * rng.choice([-1, 0, 1], 4)
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


@pytest.mark.parametrize("seed", [*range(60), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(60, 200))])
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


def untied_set(seed: int) -> tuple[Ground, Results]:
    """A random set without equal scores."""
    ground, results = random_set(seed)
    for record, place in zip(results, np.random.default_rng(seed).permutation(len(results)), strict=True):
        record["score"] = float(place + 1) / (len(results) + 1)
    return ground, results


def renumbered(ground: Ground, results: Results, rng: np.random.Generator) -> tuple[Ground, Results]:
    """The same set under other ids, of annotations from 0 on; its images, categories and results in another order."""
    images = dict(zip((i["id"] for i in ground["images"]), rng.permutation(1000).tolist(), strict=False))
    categories = dict(zip((c["id"] for c in ground["categories"]), rng.permutation(90).tolist(), strict=False))

    def moved(record: dict[str, Any]) -> dict[str, Any]:
        ids = {"image_id": images[record["image_id"]], "category_id": categories[record["category_id"]]}
        return record | ids

    numbers = rng.permutation(len(ground["annotations"])).tolist()
    other = {
        "images": [image | {"id": images[image["id"]]} for image in ground["images"]],
        "categories": [category | {"id": categories[category["id"]]} for category in ground["categories"]],
        "annotations": [moved(a) | {"id": n} for a, n in zip(ground["annotations"], numbers, strict=True)],
    }
    shuffled = {key: [other[key][i] for i in rng.permutation(len(other[key]))] for key in ("images", "categories")}
    return other | shuffled, [moved(results[i]) for i in rng.permutation(len(results))]


@pytest.mark.parametrize("seed", range(30))
def test_ids_and_orders_mean_nothing_without_ties(seed: int, tmp_path: Path) -> None:
    ground, results = untied_set(seed)
    metrics = coco_metrics(*read(tmp_path, ground, results))
    other = coco_metrics(*read(tmp_path, *renumbered(ground, results, np.random.default_rng(seed))))
    assert_equal(other, metrics)  # a mean over classes in another order may round differently
    assert other["per_class"] == metrics["per_class"]


def small_set() -> tuple[Ground, Results]:
    return untied_set(3)


def detections_by_image(detections: DetectionArrays, num_images: int) -> list[Detections]:
    rows = [np.flatnonzero(detections.indices == index) for index in range(num_images)]
    boxes, scores, labels = map(torch.from_numpy, detections[1:])
    # float32, as models have it
    return [Detections(boxes[row].float(), scores[row].float(), labels[row]) for row in rows]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_and_repeated_images_mean_nothing(world_size: int, tmp_path: Path) -> None:
    sets = []
    for seed in range(10):
        annotations, detections = read(tmp_path, *untied_set(seed))
        sets.append((annotations, detections_by_image(detections, len(annotations))))

    def task(rank: int) -> None:
        found = []
        for annotations, by_image in sets:
            rng = np.random.default_rng(rank)
            collector = DetectionCollector()
            for order in (eval_shard(len(annotations), rank, world_size), rng.integers(0, len(annotations), 3)):
                mixed = rng.permutation(order)  # then three that this process or another has already had
                collector.add(torch.from_numpy(mixed), [by_image[index] for index in mixed])
            found.append(coco_metrics(annotations, collector.gather()))
        if rank == 0:  # where all detections are
            (tmp_path / "found.json").write_text(json.dumps(found))

    assert in_processes(task, tmp_path, world_size) == [0] * world_size
    expected = []
    for annotations, by_image in sets:
        collector = DetectionCollector()
        collector.add(torch.arange(len(annotations)), by_image)
        expected.append(coco_metrics(annotations, collector.gather()))
    assert any(metrics["AP"] for metrics in expected)
    assert json.loads((tmp_path / "found.json").read_text()) == expected


def test_equal_scores_rank_by_image_id_and_then_by_order(tmp_path: Path) -> None:
    ground, results = random_set(3)
    for record in results:
        record["score"] = 0.5
    metrics = coco_metrics(*read(tmp_path, ground, results))
    assert_equal(metrics, oracle(ground, results)[0])
    backwards = coco_metrics(*read(tmp_path, ground, results[::-1]))
    assert_equal(backwards, oracle(ground, results[::-1])[0])
    assert backwards["AP"] != metrics["AP"]


def one_image(boxes: list[list[float]], **extra: Any) -> Ground:
    return {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}],
        "categories": [{"id": 3, "name": "cell"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 3, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0} | extra
            for i, bbox in enumerate(boxes)
        ],
    }


def results_of(boxes: list[list[float]], scores: list[float]) -> Results:
    return [
        {"image_id": 1, "category_id": 3, "bbox": bbox, "score": score}
        for bbox, score in zip(boxes, scores, strict=True)
    ]


def test_annotation_id_zero_is_an_object_like_any_other(tmp_path: Path) -> None:
    boxes = [[10.0, 10.0, 50.0, 50.0], [200.0, 200.0, 50.0, 50.0]]
    ground, results = one_image(boxes), results_of(boxes, [0.9, 0.8])
    metrics = coco_metrics(*read(tmp_path, ground, results))
    assert metrics["AP"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["per_class"]["cell"]["num_objects"] == 2
    assert oracle(ground, results)[0]["AP"] < 0.5


def test_area_and_iou_exactly_on_the_limit_survive_the_rounding_of_corners(tmp_path: Path) -> None:
    x = 32.4
    assert (x + 32.0) - x > 32.0
    ground = one_image([[x, x, 32.0, 32.0], [2.2, 300.0, 13.4, 20.0]])
    results = results_of([[x, 0.3, 32.0, 32.0], [x, x, 32.0, 32.0], [2.2, 300.0, 6.7, 20.0]], [0.9, 0.8, 0.7])
    metrics = coco_metrics(*read(tmp_path, ground, results))
    ground["annotations"][0]["id"] = 9
    assert_equal(metrics, oracle(ground, results)[0])


def test_only_the_best_hundred_of_an_image_and_class_count(tmp_path: Path) -> None:
    target = [100.0, 100.0, 50.0, 50.0]
    ground = one_image([target])
    clutter = [[300.0 + i, 300.0, 20.0, 20.0] for i in range(100)]
    scores = [0.9 - i * 1e-3 for i in range(100)]
    late = coco_metrics(*read(tmp_path, ground, results_of([*clutter, target], [*scores, 0.1])))
    assert late["AP"] == late["AR100"] == 0.0
    early = coco_metrics(*read(tmp_path, ground, results_of([*clutter, target], [*scores, 0.99])))
    assert early["AP"] == pytest.approx(1.0, abs=1e-12)
    assert early["AR1"] == pytest.approx(1.0, abs=1e-12)


def test_a_crowd_region_takes_any_number_of_detections(tmp_path: Path) -> None:
    ground = one_image([[0.0, 0.0, 20.0, 20.0], [100.0, 100.0, 300.0, 300.0]])
    ground["annotations"][1]["iscrowd"] = 1
    inside = [[150.0, 150.0, 40.0, 40.0], [200.0, 200.0, 40.0, 40.0]]
    results = results_of([*inside, [0.0, 0.0, 20.0, 20.0]], [0.9, 0.8, 0.7])
    assert coco_metrics(*read(tmp_path, ground, results))["AP"] == pytest.approx(1.0, abs=1e-12)
    ground["annotations"].pop()
    assert coco_metrics(*read(tmp_path, ground, results))["AP"] == pytest.approx(1 / 3, abs=1e-12)


def test_no_detections_give_zero_and_no_objects_give_none(tmp_path: Path) -> None:
    ground = one_image([[10.0, 10.0, 20.0, 20.0]])
    ground["categories"].append({"id": 4, "name": "nothing"})
    metrics = coco_metrics(*read(tmp_path, ground, []))
    for values in (metrics, metrics["per_class"]["cell"]):
        assert values["AP"] == values["APs"] == values["AR1"] == 0.0
        assert values["APl"] is None
    assert {metrics["per_class"]["nothing"][key] for key in KEYS} == {None}
    assert metrics["per_class"]["nothing"]["num_objects"] == 0
    ground["annotations"] = []
    metrics = coco_metrics(*read(tmp_path, ground, results_of([[10.0, 10.0, 20.0, 20.0]], [0.5])))
    assert {metrics[key] for key in KEYS} == {None}


def test_order_of_given_classes_only_renames_labels(tmp_path: Path) -> None:
    ground, results = small_set()
    annotations, _ = read(tmp_path, ground, results)
    classes = [*annotations.classes[::-1], "unknown to the file"]
    other = read_coco(tmp_path / "gt.json", tmp_path, classes=classes)
    metrics, expected = (coco_metrics(one, read_results(tmp_path / "dt.json", one)) for one in (other, annotations))
    assert_equal(metrics, expected)
    assert metrics["per_class"].pop("unknown to the file")["AP"] is None
    assert metrics["per_class"] == expected["per_class"]


@pytest.mark.parametrize(("field", "value"), [("scores", np.nan), ("scores", np.inf), ("boxes", np.nan)])
def test_detections_that_are_not_numbers_are_counted(tmp_path: Path, field: str, value: float) -> None:
    boxes = [[10.0, 10.0, 20.0, 20.0]] * 3
    annotations, detections = read(tmp_path, one_image(boxes), results_of(boxes, [0.1, 0.2, 0.3]))
    getattr(detections, field)[1:] = value
    with pytest.raises(DataError, match=r"gt.json: detections: 2 of 3 have") as error:
        coco_metrics(annotations, detections)
    assert "\n" not in str(error.value)


def test_rows_of_no_image_or_class_are_a_programming_error(tmp_path: Path) -> None:
    boxes = [[10.0, 10.0, 20.0, 20.0]]
    annotations, detections = read(tmp_path, one_image(boxes), results_of(boxes, [0.5]))
    with pytest.raises(ValueError, match="indices"):
        coco_metrics(annotations, detections._replace(indices=np.array([1])))
    with pytest.raises(ValueError, match="labels"):
        coco_metrics(annotations, detections._replace(labels=np.array([-1])))


@pytest.mark.parametrize("scoring", [Scoring(max_dets=11), Scoring(max_dets=300), Scoring(areas=[10, 200.5])])
def test_other_limits_are_pycocotools_own(tmp_path: Path, scoring: Scoring) -> None:
    """Sixty objects of two classes in each of three images, and three times as many detections as that."""
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 400, (3, 120, 2)).round(1)
    sides = generator.uniform(5, 240, (3, 120, 2)).round(1)
    boxes = np.concatenate([corners, sides], axis=2).tolist()
    ground: Ground = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 640} for i in range(3)],
        "categories": [{"id": k, "name": str(k)} for k in range(2)],
        "annotations": [
            {
                "id": 1 + 120 * i + n,
                "image_id": i,
                "category_id": n % 2,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i in range(3)
            for n, box in enumerate(boxes[i])
        ],
    }
    results: Results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": (np.array(a["bbox"]) + generator.normal(0, spread, 4)).clip(0.1).round(1).tolist(),
            "score": float(generator.uniform()),
        }
        for a in ground["annotations"]
        for spread in (0.5, 3, 10)
    ]
    metrics = coco_metrics(*read(tmp_path, ground, results), scoring)
    expected = pycocotools_metrics(tmp_path / "gt.json", results, scoring)
    assert [*metrics][:-1] == [*expected]
    assert [*expected][8] == f"AR{scoring.max_dets}"
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, abs=1e-12), key
    usual = coco_metrics(*read(tmp_path, ground, results))
    assert any(metrics[key] != usual[key] for key in ("AP", "APs", "APl"))


@pytest.mark.parametrize("wrong", [{"max_dets": 10}, {"areas": [96, 32]}, {"areas": [32]}, {"areas": [0, "x"]}])
def test_wrong_limits_are_refused(wrong: dict[str, Any]) -> None:
    with refused("out-of-range", next(iter(wrong))):
        Scoring(**wrong)
