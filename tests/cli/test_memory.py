"""What is said of memory and time before the first step."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faults import refused
from retina.cli.assemble import assemble
from retina.cli.compose import compose
from retina.cli.memory import describe_duration, in_memory, largest_canvas, on_meta
from retina.data.annotations import Annotations
from retina.data.coco import read_coco
from retina.data.shapes import write_shapes
from retina.engine import probe
from retina.engine.checkpointer import TrainState
from retina.engine.logging import RunLogger
from retina.engine.optim import build_optimizer

CPU = torch.device("cpu")
SMALL = ("model.backbone=resnet18", "model.fpn_channels=16", "model.head_convs=1", "data.short_side=64")
SMALL += ("data.long_side=96", "train.batch_size=2", "train.device=cpu", "train.pictures=0", "trackers=[]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_shapes(folder / "shapes", num_train=4, num_val=2, image_size=(64, 96))
    return folder


@pytest.fixture
def images(place: Path) -> Annotations:
    return read_coco(place / "shapes/annotations/instances_train.json", place / "shapes/train")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A machine with so many bytes left."""
    return lambda size: monkeypatch.setattr(probe, "free_bytes", lambda device: int(size))


def test_too_large_a_step_is_divided_or_what_to_give_is_told(
    images: Annotations, little_memory: Callable[[float], None]
) -> None:
    """16 images of 800 x 1333 need some 10 GB with ResNet-18 and a thin head. Nothing is allocated here."""
    settings = compose("train", ["data=coco", "data.root=shapes", *SMALL[:3]])
    check = functools.partial(in_memory, settings, images, CPU, RunLogger())
    little_memory(4.8e9)
    (choice,) = check(may_choose=True)
    assert choice.key == "train.accumulate"
    assert choice.value == 4
    with refused("too-little-memory", "train.batch_size", f"train.accumulate={choice.value}"):
        check(may_choose=False)
    little_memory(3e8)
    with refused("too-little-memory", "data.short_side"):
        check(may_choose=True)
    little_memory(500e9)
    assert check(may_choose=True) == []
    crop = {"_target_": "albumentations.RandomCrop", "height": 64, "width": 64}
    little_memory(3e8)
    other = settings | {"augment": settings["augment"] | {"crop": crop}}
    assert in_memory(other, images, CPU, RunLogger(), may_choose=False) == [], "its images may be smaller"


def test_what_is_uncertain_is_warned_of(
    images: Annotations, little_memory: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    settings = compose("train", ["data=coco", "data.root=shapes", *SMALL])
    canvas = (2, *largest_canvas(settings, images))
    most = int((images.offsets[1:] - images.offsets[:-1]).max())
    need = probe.step_bytes(on_meta(settings, images), canvas, objects=most, precision="fp32")
    for free, warned in ((2 * need, False), (need / 1.1, True)):
        little_memory(free)
        caplog.clear()
        assert in_memory(settings, images, CPU, RunLogger(), may_choose=False) == []
        assert ("data.short_side" in caplog.text) == warned


def test_frozen_stages_of_weights_are_counted(images: Annotations) -> None:
    """They need less memory. No weights are read here."""
    settings = compose("train", ["data=coco", "data.root=shapes", *SMALL, "model.weights=DEFAULT"])
    assert not any(p.requires_grad for p in on_meta(settings, images).backbone.stem.parameters())
    settings["model"]["frozen_stages"] = 0
    assert all(p.requires_grad for p in on_meta(settings, images).backbone.stem.parameters())


def test_a_plain_run_that_does_not_fit_is_refused_in_one_line(place: Path) -> None:
    """In a process that has three gigabytes left, as with `ulimit -v`."""
    words = ["data=coco", "data.root=shapes", "name=large", "train.batch_size=16", "data.short_side=640"]
    words += ["model.backbone=resnet18", "model.weights=null", "train.device=cpu", "auto=false"]
    code = (
        "import resource, sys, torch; from pathlib import Path; from retina.cli.train import main\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 10**9,) * 2); sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], cwd=place, capture_output=True, text=True, timeout=1000)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith("error[too-little-memory]: train.batch_size: 16 images")
    assert "train.accumulate=" in line


def test_a_plain_run_tells_its_time_before_and_after_ten_steps(
    place: Path, tool: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    words = ("data=coco", "data.root=shapes", *SMALL, "name=plain", "auto=false", "train.eval_every=null")
    words += ("train.length=11",)
    assert tool("train", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    (before,) = (i for i, line in enumerate(lines) if "on this CPU" in line)
    (after,) = (i for i, line in enumerate(lines) if line.startswith("after 10 steps: "))
    assert before < after
    assert "budget=1h" in lines[after]


def test_long_runs_are_told_what_would_make_them_shorter(images: Annotations) -> None:
    settings = compose("train", ["data=coco", "data.root=shapes", *SMALL])
    made = assemble(settings, train=images, val=images, device=CPU, recorder=RunLogger(), start=None)
    state = TrainState(
        made.model, build_optimizer(made.recipe.optimizer, made.model), made.config, made.recipe.schedule
    )
    describe = functools.partial(describe_duration, settings, images, state, advice="shorter with less")
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    assert "shorter" not in describe(steps=1)
    assert "shorter" in describe(steps=10**9)
    assert all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters())
