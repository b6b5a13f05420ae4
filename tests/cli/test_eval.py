"""Scores of a run, of bare weights and of a results file: the right numbers, in the right place, over any processes."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import retina
from commands import Capture, Tool, one_line
from retina.errors import ConfigError
from retina.model.weights import load_detector, save_detector
from tiny import PREPROCESSING

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def strict(file: Path) -> Any:
    """JSON without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {file}")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def data(trained_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny images with every second of the untrained detector's best findings for ground truth: it is right about
    half of the time."""
    root = tmp_path_factory.mktemp("found")
    shutil.copytree(tiny_data, root, dirs_exist_ok=True)
    file = root / "annotations" / "instances_val.json"
    truth = json.loads(file.read_text())
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    detector = retina.load(trained_run, device="cpu")
    images = [root / "val" / image["file_name"] for image in truth["images"]]
    truth["annotations"] = []
    for image, found in zip(truth["images"], detector.predict(images), strict=True):
        wide = (found.boxes[:, 2:] - found.boxes[:, :2] > 3).all(dim=1)
        for (x1, y1, x2, y2), label in list(zip(found.boxes[wide].tolist(), found.labels[wide].tolist(), strict=True))[
            :12:2
        ]:
            record = {"category_id": ids[detector.classes[label]], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            truth["annotations"].append(record | {"image_id": image["id"]})
    file.write_text(json.dumps(truth))
    return root


@pytest.fixture
def run(trained_run: Path, data: Path, tmp_path: Path) -> Path:
    """A run folder to write into, whose settings name that ground truth."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").hardlink_to(trained_run / "best.safetensors")
    settings = yaml.safe_load((trained_run / "config.yaml").read_text())
    settings["data"]["root"] = str(data)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run"


def test_a_run_needs_nothing_retyped(tool: Tool, run: Path, capsys: Capture) -> None:
    assert tool("eval", f"checkpoint={run}", "pictures=3") == 0
    out, err = capsys.readouterr()
    assert err == ""
    metrics = strict(run / "eval" / "metrics.json")
    assert list(metrics) == [*KEYS, "per_class", "skipped_images"]
    assert metrics["APl"] is None
    assert metrics["skipped_images"] == 0
    assert 0.2 < metrics["AP50"] < 0.9
    assert sum(values["num_objects"] for values in metrics["per_class"].values()) == 30
    lines = out.splitlines()
    assert lines[0] == f"AP     {metrics['AP']:.3f}  IoU 0.50:0.95"
    assert [line.split()[0] for line in lines[14:19]] == list(metrics["per_class"])
    assert f"written: {run}/eval/metrics.json, detections.json, pictures/" in lines
    assert lines[-1] == f"report: {run}/eval/report.html"
    analysis = strict(run / "eval" / "analysis.json")
    assert analysis["intervals"]["overall"]["AP"][0] == pytest.approx(metrics["AP"], abs=1e-6)
    assert (run / "eval" / "report.html").read_text().count("data:image/jpeg") == 5

    results = strict(run / "eval" / "detections.json")
    names = {"category", "file_name", "width", "height"}  # beside COCO's keys
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", *names}
    assert {result["image_id"] for result in results} == {1, 2, 3, 4, 5}
    pictures = sorted((run / "eval" / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["1_000000.jpg", "3_000002.jpg", "5_000004.jpg"]
    with Image.open(pictures[0]) as picture:
        assert picture.width > 1.2 * picture.height or picture.width > 768

    # the results it wrote have the scores it told of
    words = [f"detections={run}/eval/detections.json", f"output={run}/again", *ground_truth(run)]
    assert tool("eval", *words) == 0
    again = strict(run / "again" / "metrics.json")
    assert all(again[key] == pytest.approx(metrics[key], abs=1e-12) for key in KEYS)
    assert {file.name for file in (run / "again").iterdir()} == {"metrics.json", "analysis.json", "report.html"}


def ground_truth(run: Path) -> list[str]:
    root = yaml.safe_load((run / "config.yaml").read_text())["data"]["root"]
    return ["data=coco", f"data.val.annotations={root}/annotations/instances_val.json"]


def test_two_processes_score_as_one(tool: Tool, run: Path, two_processes: Path) -> None:
    """Five images over two processes."""
    assert tool("eval", f"checkpoint={run}", "batch_size=1", "device=cpu") == 0
    one, two = run / "eval", two_processes / "eval"
    # on other threads, convolutions add up in another order
    ours, theirs = strict(one / "detections.json"), strict(two / "detections.json")
    assert [(r["image_id"], r["category_id"]) for r in ours] == [(r["image_id"], r["category_id"]) for r in theirs]
    assert [r["score"] for r in ours] == pytest.approx([r["score"] for r in theirs], abs=1e-5)
    scores = []
    for name, results in (("mine", one), ("other", two)):
        words = [f"detections={results}/detections.json", f"output={run.parent}/{name}", *ground_truth(run)]
        assert tool("eval", *words) == 0
        scores.append([strict(run.parent / name / "metrics.json")[key] for key in KEYS])
    assert scores[0] == [pytest.approx(score, abs=1e-9) for score in scores[1]]
    assert scores[0][0] > 0
    assert strict(two / "metrics.json").keys() == strict(one / "metrics.json").keys()
    assert sorted(p.name for p in one.rglob("*")) == sorted(p.name for p in two.rglob("*"))
    assert "IoU 0.50:0.95" in (two_processes / "out.txt").read_text()


@pytest.mark.parametrize(
    ("folder", "results", "key"),
    [
        ("cocoapi_val2014_fake100", "dt_bbox", "bbox"),
        ("review_coco_eval", "dt", "pycocotools_here"),
        ("detectron2_edge", "dt", "full"),
    ],
)
def test_a_results_file_scores_as_pycocotools_says(
    tool: Tool, metric_fixtures: Path, tmp_path: Path, folder: str, results: str, key: str
) -> None:
    place = metric_fixtures / folder
    output = tmp_path / "new" / "scores"
    words = [f"detections={place / results}.json", "data=coco", f"data.val.annotations={place}/gt.json"]
    assert tool("eval", *words, f"output={output}") == 0
    expected = json.loads((place / "expected.json").read_text())[key]
    metrics = strict(output / "metrics.json")
    for name in KEYS:
        assert metrics[name] == (None if expected[name] == -1 else pytest.approx(expected[name], abs=1e-9))


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A folder with `gt.json`, two images with objects of two classes, and `dt.json`, results for it."""
    boxes = {1: [10.0, 10.0, 50.0, 80.0], 2: [100.0, 40.0, 20.0, 20.0], 3: [30.5, 200.25, 90.0, 60.5]}
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in (139, 285)],
        "categories": [{"id": 1, "name": "person"}, {"id": 65, "name": "bed"}],
        "annotations": [
            {"id": n, "image_id": 139 if n < 3 else 285, "category_id": 65 if n == 2 else 1, "bbox": box}
            for n, box in boxes.items()
        ],
    }
    results = [
        {"image_id": 139, "category_id": 1, "bbox": [12.0, 11.0, 49.0, 78.0], "score": 0.9},
        {"image_id": 139, "category_id": 65, "bbox": boxes[2], "score": 0.7},
        {"image_id": 285, "category_id": 1, "bbox": [300.0, 10.0, 30.0, 30.0], "score": 0.4},
    ]
    place = tmp_path / "scored"
    place.mkdir()
    (place / "gt.json").write_text(json.dumps(truth))
    (place / "dt.json").write_text(json.dumps(results))
    return place


@pytest.mark.parametrize("image", [{}, {"file_name": "a.jpg"}, {"file_name": "a.jpg", "width": 1, "height": 1}])
def test_a_results_file_needs_nothing_of_images(
    tool: Tool, scored: Path, tmp_path: Path, image: dict[str, Any]
) -> None:
    """Neither names nor sizes: torchmetrics writes images of an id alone, others 1 x 1."""
    truth = json.loads((scored / "gt.json").read_text())
    truth["images"] = [{"id": record["id"]} | image for record in truth["images"]]
    (tmp_path / "bare.json").write_text(json.dumps(truth))
    words = [f"detections={scored}/dt.json", "data=coco"]
    for name, file in (("full", scored / "gt.json"), ("bare", tmp_path / "bare.json")):
        assert tool("eval", *words, f"data.val.annotations={file}", f"output={tmp_path}/{name}") == 0
    assert strict(tmp_path / "bare" / "metrics.json") == strict(tmp_path / "full" / "metrics.json")
    assert strict(tmp_path / "bare" / "metrics.json")["AP"] > 0


def test_empty_results_and_empty_ground_truth(tool: Tool, scored: Path, tmp_path: Path) -> None:
    truth = json.loads((scored / "gt.json").read_text())
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    words = [f"detections={tmp_path}/none.json", "data=coco", f"data.val.annotations={tmp_path}/gt.json"]
    assert tool("eval", *words, f"output={tmp_path}/a") == 0
    assert strict(tmp_path / "a" / "metrics.json")["AP"] == 0
    (tmp_path / "gt.json").write_text(json.dumps(truth | {"annotations": []}))
    assert tool("eval", *words, f"output={tmp_path}/b") == 0
    assert strict(tmp_path / "b" / "metrics.json")["AP"] is None


def test_a_missing_scorer_is_told_before_any_work(
    tool: Tool, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert tool("eval", f"checkpoint={run}", "scorer=pycocotools") == 2
    assert "error[missing-package]: scorer: " in capsys.readouterr().err
    assert not (run / "eval").exists()


def test_pycocotools_says_the_same(tool: Tool, scored: Path, run: Path, capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    (tmp_path / "none.json").write_text("[]")
    score = [f"detections={scored}/dt.json", "data=coco", f"data.val.annotations={scored}/gt.json"]
    for words in (score, [f"detections={tmp_path}/none.json", *score[1:]], [f"checkpoint={run}", "pictures=0"]):
        assert tool("eval", *words, f"output={tmp_path}/scores", "scorer=pycocotools", "report=false") == 0
        out = capsys.readouterr().out
        assert float(out.splitlines()[-1].rpartition(" ")[2]) < 1e-12
        assert "AR100 " in out.rpartition("difference\n")[2]


@pytest.fixture
def other_data(tiny_data: Path, tmp_path: Path) -> Path:
    """The same images with sparse category ids, and no triangles."""
    truth = json.loads((tiny_data / "annotations" / "instances_val.json").read_text())
    gone = {category["id"] for category in truth["categories"] if category["name"] == "triangle"}
    truth["categories"] = [category for category in truth["categories"] if category["id"] not in gone]
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] not in gone]
    for category in truth["categories"]:
        category["id"] = 1000 - 7 * category["id"]
    for annotation in truth["annotations"]:
        annotation["category_id"] = 1000 - 7 * annotation["category_id"]
    (tmp_path / "other" / "annotations").mkdir(parents=True)
    (tmp_path / "other" / "val").symlink_to(tiny_data / "val")
    (tmp_path / "other" / "annotations" / "instances_val.json").write_text(json.dumps(truth))
    return tmp_path / "other"


def test_bare_weights_on_data_with_ids_of_its_own(tool: Tool, run: Path, other_data: Path, capsys: Capture) -> None:
    weights = run.parent / "mine.safetensors"
    weights.hardlink_to(run / "best.safetensors")
    words = [f"checkpoint={weights}", "data=coco", f"data.root={other_data}", "data.num_workers=0", "pictures=0"]
    words += ["postprocess.max_detections=300", "postprocess.score_threshold=0.0"]  # finds something of every class
    assert tool("eval", *words, "output=" + str(run.parent / "scores")) == 0
    assert "of classes that" in capsys.readouterr().out  # triangles were found, but have no id there
    ids = {result["category_id"] for result in strict(run.parent / "scores" / "detections.json")}
    truth = strict(other_data / "annotations" / "instances_val.json")
    assert ids
    assert ids <= {category["id"] for category in truth["categories"]}
    assert not (run.parent / "scores" / "pictures").exists()
    assert strict(run.parent / "scores" / "metrics.json")["per_class"]["triangle"]["AP"] is None


def test_postprocess_can_differ_from_training(tool: Tool, run: Path) -> None:
    words = [f"checkpoint={run}", "pictures=0", "split=train"]
    assert tool("eval", *words, "postprocess.max_detections=2", "postprocess.score_threshold=0.0") == 0
    counts = [r["image_id"] for r in strict(run / "eval" / "detections.json")]
    assert [counts.count(image) for image in sorted(set(counts))] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"name": "shapes", "root": "r", "short_side": 64, "long_side": 96, "prepare": None}),
        ({"short_side": 80}, {"root": "r", "short_side": 80, "long_side": 96}),
        ({"prepare": {"a": 2}}, {"root": "r", "prepare": {"a": 2}, "allow_outside": False, "max_pixels": 100_000_000}),
        ({"root": "other"}, {"root": "other", "prepare": None, "val": (None, None), "num_workers": 7}),
        ({"val": {"annotations": "x.json"}}, {"root": "r", "val": ("x.json", "val_images")}),
        ({"name": "coco", "root": "c"}, {"root": "c", "prepare": None, "short_side": 64, "num_workers": 2}),
        ({"name": "coco", "root": None, "pad_multiple": 8}, {"root": None, "pad_multiple": 8, "long_side": 96}),
    ],
)
def test_which_data_is_scored(load: Callable[[str], ModuleType], given: Any, expected: dict[str, Any]) -> None:
    """The run's own, but for what was given; image sizes are the detector's whatever the data."""
    trained = {
        "name": "shapes",
        "root": "r",
        "short_side": 999,
        "num_workers": 7,
        "prepare": {"a": 1, "b": 3},  # a stranger may have written these three
        "allow_outside": True,
        "max_pixels": 1,
        "val": {"annotations": "val.json", "images": "val_images"},
    }
    data = load("data").data_of(trained, given, PREPROCESSING)
    found = {key: getattr(data, key) for key in expected}
    if "val" in expected:
        found["val"] = (data.val.annotations, data.val.images)
    assert found == expected


def test_unknown_keys_of_a_run(load: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ConfigError, match=r"data\.rot: no such key - did you mean data\.root\?"):
        load("data").data_of({}, {"name": "x", "rot": 3}, {})


def test_mistakes_are_one_line(tool: Tool, run: Path, other_data: Path, capsys: Capture) -> None:
    truth = other_data / "annotations" / "instances_val.json"
    document = json.loads(truth.read_text())
    document["categories"][0]["name"] = "spiral"
    (run.parent / "spiral.json").write_text(json.dumps(document))
    (run.parent / "results.json").write_text('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]')
    shutil.copy(run / "best.safetensors", run.parent / "cut.safetensors")
    with (run.parent / "cut.safetensors").open("r+b") as file:
        file.truncate(1000)
    checkpoint, results = f"checkpoint={run}", f"detections={run.parent}/results.json"
    for words, parts in [
        ([], ["checkpoint: give checkpoint="]),
        ([checkpoint, results], ["not both"]),
        ([checkpoint, "split=test"], ["split: 'test'"]),
        ([checkpoint, "batch_size=0"], ["batch_size: 0"]),
        ([checkpoint, "device=tpu7"], ["device: "]),
        ([checkpoint, "precision=int8"], ["precision: 'int8'"]),
        ([checkpoint, "postprocess.nms_iou=7.0"], ["postprocess: nms_iou must be in [0, 1]"]),
        ([checkpoint, "postprocess.max_detections=0"], ["postprocess: "]),
        ([checkpoint, "+postprocess.nms=1"], ["postprocess", "nms"]),
        ([checkpoint, f"data.root={run.parent}"], [str(run.parent), "instances_val.json"]),
        ([checkpoint, "data.val.annotations=no.json"], ["no.json: no such annotation file"]),
        ([checkpoint, f"data.val.annotations={run.parent}/spiral.json"], ["spiral"]),
        ([checkpoint, "data=coco"], ["data.root: missing"]),
        ([f"checkpoint={run.parent}/nowhere"], ["nowhere: no such file"]),
        ([f"checkpoint={other_data}"], ["has no best.safetensors"]),
        ([f"checkpoint={run.parent}/cut.safetensors"], ["cut.safetensors: cannot be read"]),
        ([results], ["output: missing"]),
        ([results, f"output={run.parent}/new"], ["data.root: missing"]),
        (
            [results, f"output={run.parent}/new", f"data.val.annotations={truth}"],
            ["category_id 1: is that of 1 result, but not in"],
        ),
        (["detections=no.json", f"output={run.parent}/new", f"data.val.annotations={truth}"], ["no.json: cannot be"]),
    ]:
        assert tool("eval", *words) == 2, words
        line = one_line(capsys)
        assert all(part in line for part in parts), (words, line)
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert files == ["best.safetensors", "config.yaml", "eval/data_report.json"]
    assert strict(run / "eval" / "data_report.json")["num_faults"] > 0
    assert not (run.parent / "new").exists()


def test_nothing_of_the_users_is_overwritten(tool: Tool, run: Path, scored: Path, capsys: Capture) -> None:
    score = [f"detections={scored}/dt.json", "data=coco", f"data.val.annotations={scored}/gt.json"]
    output = run.parent / "notes"
    output.mkdir()
    (output / "metrics.json").write_text('{"mine": 1}')
    for words in (score, [f"checkpoint={run}"]):
        assert tool("eval", *words, f"output={output}") == 2
        assert "holds other files" in one_line(capsys)
        assert tool("eval", *words, f"output={output}/metrics.json") == 2
        assert "cannot be written" in one_line(capsys)
    assert (output / "metrics.json").read_text() == '{"mine": 1}'
    (output / "metrics.json").unlink()
    assert tool("eval", *score, f"output={output}") == 0
    assert tool("eval", *score, f"output={output}") == 0  # an earlier evaluation may be replaced


@pytest.fixture
def fifty(data: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Fifty images, ten times the five, and the names of five that are no longer whole."""
    root = tmp_path / "fifty"
    truth = strict(data / "annotations" / "instances_val.json")
    images, objects, names = truth["images"], truth["annotations"], []
    truth["images"], truth["annotations"] = [], []
    (root / "val").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number in range(50):
        image = images[number % 5]
        names.append(f"{number:02}.jpg")
        shutil.copy(data / "val" / image["file_name"], root / "val" / names[-1])
        truth["images"].append(image | {"id": 100 + number, "file_name": names[-1]})
        own = [record for record in objects if record["image_id"] == image["id"]]
        truth["annotations"] += [record | {"image_id": 100 + number} for record in own]
    (root / "annotations" / "instances_val.json").write_text(json.dumps(truth))
    bad = [names[number] for number in (4, 5, 21, 30, 49)]
    for name in bad[:3]:
        file = root / "val" / name
        file.write_bytes(file.read_bytes()[:-400])  # its header is whole
    (root / "val" / bad[3]).write_bytes(b"")
    (root / "val" / bad[4]).write_text("no image")
    return root, bad


def test_images_that_cannot_be_read_are_listed_and_their_objects_missed(
    tool: Tool, run: Path, fifty: tuple[Path, list[str]], capsys: Capture
) -> None:
    root, bad = fifty
    model = [f"checkpoint={run}", "data=coco", f"data.root={root}", "data.num_workers=0", f"output={run.parent}/scores"]
    assert tool("eval", *model, "data.max_bad_fraction=0.1", "pictures=50") == 3
    out, err = capsys.readouterr()
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1].rpartition("/")[2] for line in skipped] == bad
    assert "IoU 0.50:0.95" in out
    metrics = strict(run.parent / "scores" / "metrics.json")
    assert metrics["skipped_images"] == 5
    assert sum(values["num_objects"] for values in metrics["per_class"].values()) == 300
    results = strict(run.parent / "scores" / "detections.json")
    assert {result["image_id"] for result in results} == {100 + n for n in range(50) if f"{n:02}.jpg" not in bad}
    assert len(list((run.parent / "scores" / "pictures").iterdir())) == 45

    # the same detections, and the ground truth of all fifty
    truth = [
        f"detections={run.parent}/scores/detections.json",
        f"data.val.annotations={root}/annotations/instances_val.json",
    ]
    assert tool("eval", "data=coco", *truth, f"output={run.parent}/again") == 0
    again = strict(run.parent / "again" / "metrics.json")
    assert [again[key] for key in KEYS] == [pytest.approx(metrics[key], abs=1e-12) for key in KEYS]
    assert 0.2 < again["AP50"] < 0.9

    capsys.readouterr()
    assert tool("eval", *model) == 2  # one in a hundred would be allowed
    assert "data.max_bad_fraction" in capsys.readouterr().err


def test_two_processes_tell_of_all_the_bad_images(
    load: Callable[[str], ModuleType], run: Path, fifty: tuple[Path, list[str]]
) -> None:
    root, bad = fifty
    words = [f"checkpoint={run}", "data=coco", f"data.root={root}", "data.num_workers=0", "data.max_bad_fraction=0.1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def task(rank: int) -> None:
        os.environ.update(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        with (run.parent / f"{rank}.txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
            load("eval").main([*words, "device=cpu", "pictures=0"])

    processes = [get_context("fork").Process(target=task, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1000)
    assert [process.exitcode for process in processes] == [3, 3]
    lines = (run.parent / "0.txt").read_text().splitlines()
    skipped = [line for line in lines if line.startswith("skipped: ")]
    assert [line.split(": ")[1].rpartition("/")[2] for line in skipped] == bad
    assert (run.parent / "1.txt").read_text() == ""
    assert strict(run / "eval" / "metrics.json")["skipped_images"] == 5


def test_faults_of_a_results_file_are_all_listed(tool: Tool, run: Path, scored: Path, capsys: Capture) -> None:
    results = json.loads((scored / "dt.json").read_text())
    strange = [results[0] | {"image_id": 999_999}] * 3 + [
        results[0] | {"category_id": 77},
        results[0] | {"score": None},
    ]
    (run.parent / "dt.json").write_text(json.dumps([*results, *strange]).replace('"score": null', '"score": NaN'))
    words = [f"detections={run.parent}/dt.json", "data=coco", f"data.val.annotations={scored}/gt.json"]
    assert tool("eval", *words, f"output={run.parent}/new") == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "dt.json: result" in err
    assert "score holds nan" in err
    assert "(and 1 more)" in err  # results of a category that the data lack are left out
    assert "image_id 999999: is that of 3 results" in out
    assert not (run.parent / "new").exists()


def test_a_model_that_has_diverged_is_refused(tool: Tool, run: Path, capsys: Capture) -> None:
    model, card = load_detector(run / "best.safetensors", torch.device("cpu"))
    with torch.no_grad():
        model.head.box.predict.weight.fill_(3e38)  # finite by itself
    (run / "best.safetensors").unlink()
    save_detector(run / "best.safetensors", model.state_dict(), card)
    assert tool("eval", f"checkpoint={run}") == 2
    assert "predicted boxes have a score or side that is not a finite number - the model has" in one_line(capsys)
    assert not (run / "eval" / "metrics.json").exists()


def test_what_a_kill_left_is_swept_and_in_nobodys_way(tool: Tool, run: Path) -> None:
    (run / "eval").mkdir()
    ours = (".metrics.json.tmp", ".detections.json.tmp", ".detections.json.4711.tmp", ".report.html.tmp")
    for name in (*ours, ".analysis.json.tmp"):
        (run / "eval" / name).write_text("half")
    assert tool("eval", f"checkpoint={run}", "pictures=0", "report=false") == 0
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["detections.json", "metrics.json"]
