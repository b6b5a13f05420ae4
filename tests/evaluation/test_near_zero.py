"""The likeliest cause of a score near zero is named when it is planted, and nothing is said of a sound run."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands import Capture, Tool, refused_by_tool
from retina.data.annotations import Annotations
from retina.data.coco import read_coco
from retina.data.layouts import locate_split
from retina.data.shapes import write_shapes
from retina.evaluation.metrics import DetectionArrays
from retina.evaluation.near_zero import Evidence, likely_causes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("near_zero")
    write_shapes(root, num_train=24, num_val=8, image_size=[96, 128])
    return root


def split(root: Path, name: str) -> Annotations:
    return read_coco(*locate_split(root, name))


def learned(truth: Annotations, change: Callable[[np.ndarray], np.ndarray] = lambda boxes: boxes) -> DetectionArrays:
    """What a detector finds that has learnt the labels of `truth`, changed: each object some pixels beside its place,
    and as many boxes of low score anywhere."""
    generator = np.random.default_rng(0)
    images = np.repeat(np.arange(len(truth)), np.diff(truth.offsets))
    boxes = change(truth.boxes + generator.normal(0, 1, truth.boxes.shape))
    corner = generator.uniform(0, 60, (len(boxes), 2))
    anywhere = np.concatenate([corner, corner + generator.uniform(8, 30, corner.shape)], axis=1)
    scores = np.concatenate([generator.uniform(0.3, 0.9, len(boxes)), generator.uniform(0, 0.2, len(boxes))])
    labels = np.concatenate([truth.labels, truth.labels])
    return DetectionArrays(np.tile(images, 2), np.concatenate([boxes, anywhere]), scores, labels)


def evidence(root: Path, **changes: Any) -> Evidence:
    val = split(root, "val")
    sound = Evidence(
        train=split(root, "train"),
        val=val,
        detections=learned(val),
        anchors=np.array([[16.0, 16.0], [25.0, 25.0], [40.0, 40.0], [63.0, 63.0]]),
        sides=(96, 128),
        inputs=(0.3, 1.2),
        history=[{"lr": 0.001, "loss_classification": 0.5, "diagnosis": {"loss_over_prior": 0.9, "positives_p3": 70}}],
    )
    return sound._replace(**changes)


def permuted(detections: DetectionArrays, num_classes: int) -> DetectionArrays:
    return detections._replace(labels=(detections.labels + 1) % num_classes)


CAUSES: Mapping[str, tuple[Callable[[Path], Evidence], str]] = {
    "classes permuted": (lambda root: evidence(root, detections=permuted(learned(split(root, "val")), 5)), "classes"),
    "boxes of half the size": (
        lambda root: evidence(root, detections=learned(split(root, "val"), lambda boxes: boxes / 2)),
        "box-scale",
    ),
    "xyxy as xywh": (
        lambda root: evidence(
            root,
            detections=learned(
                split(root, "val"), lambda boxes: np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            ),
        ),
        "box-convention",
    ),
    "normalisation": (lambda root: evidence(root, inputs=(581.0, 186.0)), "normalisation"),
    "no normalisation": (lambda root: evidence(root, inputs=(-2.1, 0.01)), "normalisation"),
    "large anchors": (lambda root: evidence(root, anchors=8 * evidence(root).anchors), "anchors"),
    "high rate": (
        lambda root: evidence(root, history=[{"lr": 0.1, "diagnosis": {"loss_over_prior": 583.0}}]),
        "rate",
    ),
    "a loss that is not finite": (
        lambda root: evidence(root, history=[{"lr": 0.1, "loss_classification": None}]),
        "rate",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_planted_is_named_first(cause: str, place: Path) -> None:
    make, expected = CAUSES[cause]
    found = likely_causes(make(place))
    assert [one.cause for one in found] == [expected]
    assert found[0].check


def few(truth: Annotations) -> DetectionArrays:
    return DetectionArrays(*(values[:3] for values in learned(truth)))


def nothing(truth: Annotations) -> DetectionArrays:
    return DetectionArrays(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


def one_class(truth: Annotations) -> DetectionArrays:
    """All are taken for the most frequent class, as after the first steps."""
    detections = learned(truth)
    return detections._replace(labels=np.full_like(detections.labels, truth.class_counts().argmax()))


@pytest.mark.parametrize("detected", [learned, few, nothing, one_class])
def test_of_a_sound_run_nothing_is_said(detected: Callable[[Annotations], DetectionArrays], place: Path) -> None:
    assert likely_causes(evidence(place, detections=detected(split(place, "val")))) == []
    assert likely_causes(evidence(place, detections=detected(split(place, "val")), history=[])) == []


def test_images_that_were_enlarged_without_their_boxes(place: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        file, _ = locate_split(place, name)
        content = json.loads(Path(file).read_text())
        for image in content["images"]:
            image["width"], image["height"] = 2 * image["width"], 2 * image["height"]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / Path(file).name).write_text(json.dumps(content))
        (tmp_path / name).mkdir()
    assert [one.cause for one in likely_causes(evidence(tmp_path))] == ["box-scale"]


@pytest.fixture
def words(place: Path, tmp_path: Path) -> list[str]:
    settings = {
        "name": "run",
        "runs": tmp_path,
        "data.root": place,
        "data.prepare": "null",
        "data.short_side": 96,
        "data.long_side": 128,
        "data.num_workers": 0,
        "model.fpn_channels": 32,
        "model.head_convs": 1,
        "train.length": 3,
        "train.batch_size": 8,
        "train.precision": "fp32",
        "train.eval_every": 3,
        "train.log_every": 1,
        "train.pictures": 0,
    }
    return ["experiment=shapes", *(f"{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ([], None),
        (["model.mean=[0.485,0.456,0.406]", "model.std=[0.229,0.224,0.225]"], "model.mean"),
        (["model.anchor_sizes=[128.0,320.0]"], "model.anchor_sizes"),
        (["optimizer.lr=0.2", "schedule.warmup=1"], "optimizer.lr"),
    ],
)
def test_a_run_says_it_after_its_evaluation(
    changes: list[str], named: str | None, words: list[str], tool: Tool, capsys: Capture
) -> None:
    assert tool("train", *words, *changes) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "likeliest cause" in line]
    assert len(said) == (named is not None), said
    if named is not None:
        cause = said[0].split("likeliest cause")[1].split("; also")[0]
        assert named in cause


@pytest.mark.parametrize(
    ("factor", "code"),
    [(None, "box-convention"), (2.0, "records"), (0.5, "records")],
    ids=["xyxy", "larger", "smaller"],
)
def test_what_is_plain_before_training_is_refused(
    factor: float | None, code: str, words: list[str], place: Path, tmp_path: Path, tool: Tool, capsys: Capture
) -> None:
    """Boxes as [x1, y1, x2, y2], and images that were resized while the file still states their old size."""
    root = tmp_path / "data"
    for name in ("train", "val"):
        file, folder = locate_split(place, name)
        content = json.loads(Path(file).read_text())
        for annotation in content["annotations"] if factor is None else []:
            x, y, width, height = annotation["bbox"]
            annotation["bbox"] = [x, y, x + width, y + height]
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / Path(file).name).write_text(json.dumps(content))
        (root / name).mkdir()
        for image in sorted(Path(folder).iterdir()):
            with Image.open(image) as picture:
                scale = factor or 1.0
                resized = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            resized.save(root / name / image.name)
    assert tool("train", *words, f"data.root={root}") == 2
    refused_by_tool(capsys, code)
