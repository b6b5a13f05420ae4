"""Every YAML composes and makes what it describes, and every command in a header can be typed."""

import functools
import inspect
import itertools
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retina.cli.build import build, check_arguments
from retina.cli.compose import CONFIGS, compose, values_of
from retina.cli.data import DataConfig
from retina.cli.train import shapes_by_default
from retina.data.transforms import Pipeline, Sample
from retina.engine.config import TrainConfig, from_mapping, to_steps
from retina.engine.optim import build_optimizer
from retina.evaluation.metrics import Scoring
from retina.inference import check_postprocess
from retina.lab.ablate import OWN
from retina.losses.detection import DetectionLoss
from retina.model.retinanet import RetinaNet, retinanet

FILES = sorted(file.relative_to(CONFIGS) for file in CONFIGS.rglob("*.yaml"))
GROUPS = ("augment", "data", "experiment", "loss", "model", "optimizer", "schedule")
OPTIONS = [f"{f.parent}={f.stem}" for f in FILES if f.parts[0] in GROUPS and not f.stem.startswith("_")]
FLOATS = ("anchor_sizes", "anchor_scales", "anchor_ratios", "mean", "std")


@functools.cache
def settings_of(tool: str, *words: str) -> dict[str, Any]:
    """Composed once for all tests, which only read it."""
    return compose(tool, words)


def header(file: Path) -> str:
    lines = (CONFIGS / file).read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def commands(text: str) -> list[list[str]]:
    """Tool and overrides of every command line in a text."""
    found = re.findall(r"(?:python|torchrun [^\n]*?) tools/(\w+)\.py([^\n]*)", text)
    typed = [[tool, *shlex.split(words.partition("  #")[0])] for tool, words in found]
    typed = [[word for word in words if word not in ("--cfg", "job", "-m")] for words in typed]
    return [_of_the_lab(words[1:]) if words[0] == "lab" else words for words in typed]


def _of_the_lab(words: list[str]) -> list[str]:
    """Of a study only its own settings; those of its runs are looked at in test_lab_ablate."""
    name, *words = words
    if name not in ("ablate", "ladder"):
        return [f"lab_{name}", *words]
    own = [word for word in words if word.partition("=")[0] in OWN]
    return ["lab_ablate", *(["study=ladder"] if name == "ladder" else []), *own]


def test_defaults_are_those_of_the_classes() -> None:
    settings = compose("train", ["data=coco"])
    assert settings["train"] == asdict(TrainConfig())
    assert settings["data"] == asdict(DataConfig(name="coco"))
    assert settings["eval"] == asdict(Scoring())
    parameters = inspect.signature(retinanet).parameters
    section = compose("train", ["model=retinanet"])["model"]
    assert section == {name: json.loads(json.dumps(parameters[name].default)) for name in section}


def test_folders_are_the_groups() -> None:
    assert {file.parts[0] for file in FILES if len(file.parts) == 2} == {*GROUPS, "studies"}
    programs = [
        "audit",
        "compare",
        "convert",
        "doctor",
        "eval",
        "export",
        "import_weights",
        "infer",
        "pack",
        "train",
        "tune_thresholds",
        "verify",
    ]
    assert [f.stem for f in FILES if len(f.parts) == 1 and not f.stem.startswith("lab_")] == programs
    assert len(OPTIONS) > 15


def test_the_paper_s_recipe_is_what_the_paper_says() -> None:
    """arXiv 1708.02002, sections 3.3 and 4; it stays whatever the defaults become."""
    settings = compose("train", ["experiment=paper", "data=coco"])
    model, loss, optimizer = settings["model"], settings["loss"], settings["optimizer"]
    assert (model["backbone"], model["levels"], model["fpn_channels"]) == ("resnet50", [3, 4, 5, 6, 7], 256)
    assert (model["neck"], model["p6_from"], model["head_convs"], model["head_norm"]) == ("fpn", "c5", 4, None)
    assert (model["anchor_sizes"], model["anchor_ratios"]) == (None, [0.5, 1.0, 2.0])
    assert model["anchor_scales"] == pytest.approx([1, 2 ** (1 / 3), 2 ** (2 / 3)], abs=1e-12)
    assert (model["head_quality"], model["box_bins"], model["prior"]) == (False, None, 0.01)
    assert {key: loss["classification"][key] for key in ("alpha", "gamma")} == {"alpha": 0.25, "gamma": 2.0}
    assert [loss["assigner"][key] for key in ("positive_iou", "negative_iou", "low_quality")] == [0.5, 0.4, True]
    assert (loss["box_loss"]["_target_"], loss["box_weight"]) == ("retina.losses.boxes.smooth_l1", 1.0)
    assert (loss["box_weighting"], model["head_scales"]) == (None, False)
    assert (optimizer["_target_"], optimizer["lr"], optimizer["momentum"]) == ("torch.optim.SGD", 0.01, 0.9)
    assert (optimizer["weight_decay"], settings["train"]["lr_batch_size"]) == (1e-4, 16)
    assert (settings["train"]["clip_norm"], settings["train"]["ema"]) == (None, None)
    assert list(settings["augment"]) == ["flip", "resize"]


def test_the_default_is_the_best_of_the_ladder() -> None:
    """docs/ladder.md, for data of one's own."""
    settings = compose("train", ["data=coco", "data.root=x"])
    model, loss = settings["model"], settings["loss"]
    assert (model["head_norm"], model["p6_from"], model["box_bins"]) == ("group", "c5", 17)
    assert (model["anchor_scales"], model["anchor_ratios"]) == ([2.0], [1.0])
    assert loss == compose("train", ["loss=gfl"])["loss"]
    assert (loss["box_weighting"], model["head_scales"]) == ("score", True)
    assert loss["box_loss"]["_target_"] == "retina.losses.boxes.giou"
    assert settings["optimizer"] == compose("train", ["optimizer=adamw"])["optimizer"]
    assert (settings["train"]["clip_norm"], list(settings["augment"])) == (10.0, ["flip", "resize"])


def _heads() -> list[list[str]]:
    """What may stand on a command line alone, or stands in a header: words whose model and loss fit each other."""
    alone = [[option] for option in OPTIONS if option.startswith(("data=", "experiment="))]
    typed = [words for file in FILES for tool, *words in commands(header(file)) if tool == "train"]
    return [*alone, *(shapes_by_default(words) + words for words in typed)]


@pytest.mark.parametrize("words", _heads(), ids=" ".join)
def test_loss_and_head_fit(words: list[str]) -> None:
    for chosen in itertools.product(*map(values_of, words)):
        settings = settings_of("train", *chosen)
        quality, bins = settings["model"]["head_quality"], settings["model"]["box_bins"]
        build(settings["loss"], "loss").check_head(quality=quality, bins=bins is not None)


@pytest.mark.parametrize("option", OPTIONS)
def test_everything_is_built(option: str) -> None:
    settings = settings_of("train", option)
    check_settings(settings)


def check_settings(settings: dict[str, Any]) -> None:
    train = from_mapping(TrainConfig, settings["train"], "train")
    data = from_mapping(DataConfig, settings["data"], "data")
    assert train.batch_size >= 1
    assert isinstance(build(settings["loss"], "loss"), DetectionLoss)
    check_postprocess({key: value for key, value in settings["postprocess"].items() if not key.startswith("_")})
    assert build(settings["postprocess"], "postprocess").func.__name__ == "postprocess"

    schedule = build(settings["schedule"], "schedule")
    total = to_steps(train.length, steps_per_epoch=100, total=None, key="train.length")
    factors = [schedule(step, total=total, steps_per_epoch=100) for step in (0, total // 2, total - 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[1] > max(factors[0], factors[2])

    optimizer = build_optimizer(build(settings["optimizer"], "optimizer"), torch.nn.Conv2d(1, 1, 1))
    assert optimizer.param_groups[0]["lr"] == settings["optimizer"]["lr"]

    transforms = {name: build(section, f"augment.{name}") for name, section in settings["augment"].items()}
    image = np.arange(60 * 90 * 3, dtype=np.uint8).reshape(60, 90, 3)
    box = np.array([[10, 10, 70, 50]], np.float32)
    sample = Sample(image, box, np.array([1]), np.array([False]), 0, (60, 90))
    out = Pipeline(transforms, min_size=data.min_size)(sample, 7)
    assert out.image.shape[0] <= data.long_side
    assert out.image.dtype == np.uint8

    check_arguments(retinanet, [*settings["model"], "num_classes"], "model")


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith(("model=", "experiment="))])
def test_models_are_built(option: str) -> None:
    """Without memory or weights: the shapes alone."""
    settings = settings_of("train", option)
    # YAML writes 32 for 32.0; only this test's type checks mind
    floats = {key: [float(x) for x in value] for key, value in settings["model"].items() if key in FLOATS and value}
    with torch.device("meta"):
        model = retinanet(**settings["model"] | floats | {"weights": None}, num_classes=3)
    assert isinstance(model, RetinaNet)
    assert len(model.strides) == len(settings["model"]["levels"])


@pytest.mark.parametrize("tool", ["eval", "infer"])
def test_other_tools_compose(tool: str) -> None:
    settings = compose(tool, ["checkpoint=x", *(["source=y"] if tool == "infer" else [])])
    assert settings["checkpoint"] == "x"
    assert "experiment" not in settings


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith("data=")])
def test_eval_takes_every_data_set_at_the_size_of_the_detector(option: str) -> None:
    data = compose("eval", [option])["data"]
    assert data["name"] == option.removeprefix("data=")
    assert (data["short_side"], data["long_side"], data["pad_multiple"]) == (None, None, None)
    assert compose("eval", [option, "data.short_side=64"])["data"]["short_side"] == 64


@pytest.mark.parametrize("file", FILES, ids=str)
def test_commands_in_headers_compose(file: Path) -> None:
    typed = commands(header(file))
    for tool, *words in typed:
        settings_of(tool, *(shapes_by_default(words) if tool == "train" else []), *words)
    if file.parts[0] == "experiment":
        choice = f"experiment={file.stem}"
        assert any(choice in words for words in typed) or file.stem == "shapes", "a header states the exact command"


@pytest.mark.parametrize("tool", ["train", "eval", "infer", "doctor", "convert", "export", "verify", "pack"])
def test_commands_in_help_compose(tool: str) -> None:
    text = (CONFIGS.parent / "retina" / "cli" / f"{tool}.py").read_text().split('"""')[1]
    assert commands(text)
    for name, *words in commands(text):
        assert name == tool
        settings_of(name, *(shapes_by_default(words) if name == "train" else []), *words)
