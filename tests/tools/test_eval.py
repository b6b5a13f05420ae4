"""Scores of a run, of bare weights and of a results file: the right numbers, in the right place, over any processes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from tiny import PREPROCESSING

from retina.errors import ConfigError

Tool = Callable[..., int]
Capture = pytest.CaptureFixture[str]
KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def strict(file: Path) -> Any:
    """JSON without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {file}")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the run folder to write into."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").hardlink_to(trained_run / "best.safetensors")
    shutil.copy(trained_run / "config.yaml", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_needs_nothing_retyped(tool: Tool, run: Path, capsys: Capture) -> None:
    assert tool("eval", f"checkpoint={run}", "pictures=3") == 0
    out, err = capsys.readouterr()
    assert err == ""
    metrics = strict(run / "eval" / "metrics.json")
    assert list(metrics) == [*KEYS, "per_class"]
    assert metrics["APl"] is None
    assert 0 <= metrics["AP50"] < 1
    lines = out.splitlines()
    assert lines[0] == f"AP     {100 * metrics['AP']:>5.1f}  IoU 0.50:0.95"
    assert [line.split()[0] for line in lines[14:19]] == list(metrics["per_class"])
    assert lines[-1] == f"written: {run}/eval/metrics.json, detections.json, pictures/"

    results = strict(run / "eval" / "detections.json")
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
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
    assert [file.name for file in (run / "again").iterdir()] == ["metrics.json"]


def ground_truth(run: Path) -> list[str]:
    root = next(line.split()[-1] for line in (run / "config.yaml").read_text().splitlines() if "root:" in line)
    return ["data=coco", f"data.val.annotations={root}/annotations/instances_val.json"]


def test_two_processes_score_as_one(tool: Tool, run: Path, two_processes: Path) -> None:
    """Five images over two processes."""
    assert tool("eval", f"checkpoint={run}", "batch_size=1", "device=cpu") == 0
    one, two = run / "eval", two_processes / "eval"
    # on other threads, convolutions add up in another order
    ours, theirs = strict(one / "detections.json"), strict(two / "detections.json")
    assert [(r["image_id"], r["category_id"]) for r in ours] == [(r["image_id"], r["category_id"]) for r in theirs]
    assert [r["score"] for r in ours] == pytest.approx([r["score"] for r in theirs], abs=1e-5)
    mine, other = strict(one / "metrics.json"), strict(two / "metrics.json")
    assert [mine[key] for key in KEYS] == [pytest.approx(other[key], abs=1e-9) for key in KEYS]
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


def test_empty_results_and_empty_ground_truth(tool: Tool, metric_fixtures: Path, tmp_path: Path) -> None:
    truth = json.loads((metric_fixtures / "detectron2_edge" / "gt.json").read_text())
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    words = [f"detections={tmp_path}/none.json", "data=coco", f"data.val.annotations={tmp_path}/gt.json"]
    assert tool("eval", *words, f"output={tmp_path}/a") == 0
    assert strict(tmp_path / "a" / "metrics.json")["AP"] == 0
    (tmp_path / "gt.json").write_text(json.dumps(truth | {"annotations": []}))
    assert tool("eval", *words, f"output={tmp_path}/b") == 0
    assert strict(tmp_path / "b" / "metrics.json")["AP"] is None


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
        ({}, {"name": "shapes", "root": "r", "short_side": 64, "long_side": 96, "prepare": {"a": 1}}),
        ({"short_side": 80}, {"root": "r", "short_side": 80, "long_side": 96}),
        ({"prepare": {"a": 2}}, {"root": "r", "prepare": {"a": 2, "b": 3}}),
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
        "prepare": {"a": 1, "b": 3},
        "val": {"annotations": "val.json", "images": "val_images"},
    }
    expected = {key: {"a": 1, "b": 3} if value == {"a": 1} else value for key, value in expected.items()}
    data = load("eval").data_of(trained, given, PREPROCESSING)
    found = {key: getattr(data, key) for key in expected}
    if "val" in expected:
        found["val"] = (data.val.annotations, data.val.images)
    assert found == expected


def test_unknown_keys_of_a_run(load: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ConfigError, match=r"data\.rot: no such key - did you mean data\.root\?"):
        load("eval").data_of({}, {"name": "x", "rot": 3}, {})


def one_line(capsys: Capture) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


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
        ([checkpoint, "split=test"], ["split: test"]),
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
        ([results, f"output={run.parent}/new", f"data.val.annotations={truth}"], ["category_id 1 is not in"]),
        (["detections=no.json", f"output={run.parent}/new", f"data.val.annotations={truth}"], ["no.json: cannot be"]),
    ]:
        assert tool("eval", *words) == 2, words
        line = one_line(capsys)
        assert all(part in line for part in parts), (words, line)
    assert sorted(path.name for path in run.iterdir()) == ["best.safetensors", "config.yaml"]
    assert not (run.parent / "new").exists()


def test_nothing_of_the_users_is_overwritten(tool: Tool, run: Path, metric_fixtures: Path, capsys: Capture) -> None:
    place = metric_fixtures / "detectron2_edge"
    score = [f"detections={place}/dt.json", "data=coco", f"data.val.annotations={place}/gt.json"]
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
