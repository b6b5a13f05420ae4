"""A data set of four channels, whose objects only the last one shows, from training to detections."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from commands import refused_by_tool
from outputs import images_found
from retina.inference import Detector

Tool = Callable[..., int]
Capture = pytest.CaptureFixture[str]
WORDS = (
    "data=coco",
    "data.root=set",
    "data.channels=4",
    "data.short_side=64",
    "data.long_side=96",
    "model.levels=[3,4]",
)
WORDS += ("model.fpn_channels=16", "model.head_convs=1", "train.batch_size=4", "train.device=cpu", "trackers=[]")
WORDS += ("train.length=2", "train.eval_every=2", "train.save_every=1", "train.pictures=0", "auto=false")
WORDS += ("model.backbone=resnet18_half",)
LOW = ("score_threshold=0.001", "pictures=false", "device=cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("channels")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        (folder / "set" / split).mkdir(parents=True)
        places = generator.integers(4, 30, (count, 2)).tolist()
        for i, (x, y) in enumerate(places):
            image = generator.integers(60, 120, (64, 96, 4), dtype=np.uint8)
            image[y : y + 28, x : x + 28, 3] += 100
            Image.fromarray(image, "RGBA").save(folder / "set" / split / f"{i}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in range(count)],
            "annotations": [
                {"image_id": i, "category_id": 1, "bbox": [x, y, 28, 28]} for i, (x, y) in enumerate(places)
            ],
            "categories": [{"id": 1, "name": "patch"}],
        }
        (folder / "set" / "annotations").mkdir(exist_ok=True)
        (folder / "set" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def train(place: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> Tool:
    monkeypatch.chdir(place)
    return functools.partial(tool, "train")


def test_a_run_on_four_channels_goes_on_bit_for_bit_and_finds_the_same_everywhere(
    train: Tool, tool: Tool, place: Path, capsys: Capture
) -> None:
    assert train("name=four", *WORDS) == 0
    out = capsys.readouterr().out
    settings = yaml.safe_load(Path("runs/four/config.yaml").read_text())
    images = np.stack([np.asarray(Image.open(file)) for file in (place / "set/train").iterdir()])
    np.testing.assert_allclose(settings["model"]["mean"], images.mean(axis=(0, 1, 2)), atol=2)
    np.testing.assert_allclose(settings["model"]["std"], images.std(axis=(0, 1, 2)), atol=2)
    assert all(f"  model.{name} " in out for name in ("mean", "std"))

    last = Path("runs/four/checkpoints/step_00000002")
    whole = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    assert train("name=four", *WORDS) == 0
    assert "resumed at step 1" in capsys.readouterr().out
    again = load_file(last / "model.safetensors")
    assert all(again[key].equal(whole[key]) for key in whole)

    assert tool("eval", "checkpoint=runs/four", "device=cpu", "postprocess.score_threshold=0.001", "pictures=1") == 0
    assert tool("infer", "checkpoint=runs/four", "source=set/val", "output=out", *LOW) == 0
    records = {record["file_name"]: record for record in images_found(Path("out"))}
    results = json.loads(Path("runs/four/eval/detections.json").read_text())
    detector = Detector.load("runs/four", device="cpu")
    for i in range(2):
        file = f"set/val/{i}.png"
        with Image.open(file) as image:
            kinds = [file, image.copy(), np.asarray(image)]
        found = [one.scores for one in detector.predict(kinds, score_threshold=0.001)]
        for other in (records[f"{i}.png"]["scores"], [one["score"] for one in results if one["image_id"] == i]):
            found.append(found[0].new_tensor(other))
        assert len(found[0]) > 5
        for other in found[1:]:
            np.testing.assert_allclose(other, found[0], atol=1e-5)
    capsys.readouterr()
    assert tool("eval", "checkpoint=runs/four", "device=cpu", "data.channels=3") == 2
    refused_by_tool(capsys, "contradiction", "data.channels")


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("+augment.color._target_=retina.data.transforms.ColorJitter",), "contradiction", "augment.color"),
        (("model.mean=[1.0,2.0,3.0]", "model.std=[1.0,2.0,3.0]"), "contradiction", "model.mean"),
        (("data.channels=5",), "records", "8 of 8"),
        (("data.channels=0",), "out-of-range", "data.channels"),
    ],
)
def test_what_does_not_fit_the_channels_is_one_line(
    train: Tool, words: tuple[str, ...], code: str, named: str, capsys: Capture
) -> None:
    assert train("name=refused", *WORDS, *words) == 2
    refused_by_tool(capsys, code, named)


def test_grey_is_one_channel(train: Tool, capsys: Capture) -> None:
    """Of any image, and with any recipe."""
    assert train("name=grey", "experiment=paper", "train.eval_every=null", *WORDS, "data.channels=1") == 0
    settings = yaml.safe_load(Path("runs/grey/config.yaml").read_text())
    assert len(settings["model"]["mean"]) == 1
    assert settings["chosen"].keys() == {"model.mean", "model.std"}
