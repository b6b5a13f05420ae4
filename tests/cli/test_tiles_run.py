"""A data set of small objects in large images, in tiles from the doctor to detections."""

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

import retina
from commands import Capture, refused_by_tool
from outputs import images_found
from retina.data.windows import Tiling

Tool = Callable[..., int]
WORDS = ("data=coco", "data.root=set", "data.short_side=64", "data.long_side=64", "model.levels=[3,4]")
WORDS += ("model.fpn_channels=16", "model.head_convs=1", "train.batch_size=4", "train.device=cpu", "trackers=[]")
WORDS += ("train.length=2", "train.eval_every=2", "train.save_every=1", "train.pictures=0", "auto=false")
WORDS += ("model.backbone=resnet18_half", "model.prior=0.3", "data.num_workers=0")
TILES = ("data.tile=[96,96]", "data.tile_overlap=0.3", "data.tile_empty=0.2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 300 x 400 pixels with objects of 10."""
    folder = tmp_path_factory.mktemp("tiles")
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 2)):
        (folder / "set" / split).mkdir(parents=True)
        annotations = []
        for i in range(count):
            image = generator.integers(60, 120, (300, 400, 3), dtype=np.uint8)
            for x, y in generator.integers(0, 290, (12, 2)).tolist():
                image[y : y + 10, x : x + 10] = 250
                annotations.append({"image_id": i, "category_id": 1, "bbox": [x, y, 10, 10]})
            Image.fromarray(image).save(folder / "set" / split / f"{i}.png")
        images = [{"id": i, "file_name": f"{i}.png", "width": 400, "height": 300} for i in range(count)]
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "patch"}]}
        (folder / "set" / "annotations").mkdir(exist_ok=True)
        (folder / "set" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def train(place: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> Tool:
    monkeypatch.chdir(place)
    return functools.partial(tool, "train")


def test_one_setting_serves_training_evaluation_and_inference(train: Tool, tool: Tool, capsys: Capture) -> None:
    assert train("name=tiled", *WORDS, *TILES) == 0
    detector = retina.load("runs/tiled", device="cpu")
    assert detector.tiling == Tiling((96, 96), 0.3)

    shutil.copytree("runs/tiled", "runs/again")
    shutil.rmtree("runs/again/checkpoints/step_00000002")
    assert train("name=again", *WORDS, *TILES) == 0
    ours, theirs = (load_file(f"runs/{name}/best.safetensors") for name in ("tiled", "again"))
    assert all((ours[key] == theirs[key]).all() for key in ours), "resumed with the same crops"

    assert tool("eval", "checkpoint=runs/tiled", "device=cpu", "pictures=0", "report=false") == 0
    found = json.loads(Path("runs/tiled/eval/detections.json").read_text())
    per_image = [sum(one["image_id"] == i for one in found) for i in range(2)]
    (expected, _) = detector.predict(["set/val/0.png", "set/val/1.png"], score_threshold=0.05)
    assert per_image[0] == len(expected.scores) > 0, "evaluation finds what prediction does"
    boxes = np.array([one["bbox"] for one in found if one["image_id"] == 0])
    np.testing.assert_allclose(np.sort(boxes[:, 0]), np.sort(expected.boxes[:, 0].numpy()), atol=0.1)
    assert (boxes[:, 0] > 100).any(), "in pixels of the image"

    words = ["checkpoint=runs/tiled", "source=set/val", "pictures=false", "device=cpu", "score_threshold=0.05"]
    assert tool("infer", *words, "output=in_tiles") == 0
    assert tool("infer", *words, "output=whole", "tile=false") == 0
    tiled, whole = (images_found(Path(name)) for name in ("in_tiles", "whole"))
    assert len(tiled[0]["boxes"]) == len(expected.scores)
    (untiled,) = detector.in_tiles(None).predict("set/val/0.png", score_threshold=0.05)
    assert len(whole[0]["boxes"]) == len(untiled.scores)


def test_tiles_are_chosen_once_and_told_beforehand(train: Tool, tool: Tool, capsys: Capture) -> None:
    assert tool("doctor", *WORDS[:4], "plots=false", "decode=false") == 0
    assert "data.tile=[64, 64]" in capsys.readouterr().out
    assert train("name=auto", *WORDS, "data.tile=auto", "train.eval_every=null", "train.length=1") == 0
    assert yaml.safe_load(Path("runs/auto/config.yaml").read_text())["data"]["tile"] == [64, 64]
    assert train("name=auto", *WORDS, "data.tile=auto", "train.eval_every=null", "train.length=2") == 0
    assert "objects" in capsys.readouterr().out
    assert tool("lab", "anchors", *WORDS[:5], "data.tile=auto", "images=2") == 0
    counted = json.loads(Path("out/anchors/anchors.json").read_text())
    assert any("tiles of [64, 64]" in note for note in counted["notes"])


def test_the_automatic_recipe_knows_the_tile(train: Tool) -> None:
    """Objects of 10 pixels in tiles of 96 want the largest size, which is twice that of what is seen."""
    words = ["data=coco", "data.root=set", "trackers=[]", "train.device=cpu", "data.tile=[96,96]", "train.batch_size=2"]
    words += ["train.length=1", "train.eval_every=null", "train.pictures=0", "model.fpn_channels=16"]
    assert train("name=recipe", *words) == 0
    data = yaml.safe_load(Path("runs/recipe/config.yaml").read_text())["data"]
    assert (data["short_side"], data["long_side"]) == (192, 192)


@pytest.mark.parametrize(
    ("word", "code", "key"),
    [
        ("data.tile=[1000,1000]", "tile-too-large", "data.tile"),
        ("data.tile=[4,4]", "out-of-range", "data.tile"),
        ("data.tile=large", "out-of-range", "data.tile"),
        ("data.tile_empty=1.0", "out-of-range", "data.tile_empty"),
    ],
)
def test_tiles_that_cannot_be_are_one_line(train: Tool, capsys: Capture, word: str, code: str, key: str) -> None:
    assert train("name=wrong", *WORDS, word) == 2
    refused_by_tool(capsys, code, key)


def test_a_tiff_beyond_the_limit_is_read_by_parts(
    tool: Tool, trained_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    tifffile = pytest.importorskip("tifffile", reason="extra tiff")
    array = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    tifffile.imwrite(tmp_path / "photos" / "a.tif", array, photometric="rgb", tile=(64, 64))
    Image.fromarray(array).save(tmp_path / "photos" / "b.png")
    words = [f"checkpoint={trained_run}", f"source={tmp_path / 'photos'}", f"output={tmp_path / 'out'}", "device=cpu"]
    assert tool("infer", *words, "tile=[96,96]", "max_pixels=20000", "precision=fp32") == 3, "the PNG is too large"
    assert "b.png" in capsys.readouterr().err
    (record,) = images_found(tmp_path / "out")
    assert (record["file_name"], record["width"], record["height"]) == ("a.tif", 400, 300)
    detector = retina.load(trained_run, device="cpu", precision="fp32").in_tiles(Tiling((96, 96)))
    (expected,) = detector.predict(array, score_threshold=0.3)
    assert len(record["boxes"]) == len(expected.scores) > 50
    np.testing.assert_allclose(record["boxes"], expected.boxes.numpy(), atol=1e-3)
    with Image.open(tmp_path / "out" / record["picture"]) as picture:
        assert picture.width / picture.height == pytest.approx(133 / 100, abs=0.01), "drawn on a third of its pixels"
