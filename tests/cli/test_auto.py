"""The automatic recipe as a user runs it, on a tiny data set."""

import contextlib
import functools
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from retina.cli.assemble import assemble
from retina.cli.auto import Command, planned, remembered
from retina.cli.compose import compose
from retina.cli.report import describe_end
from retina.cli.run_folder import write_settings
from retina.cli.train import added_words
from retina.data.coco import read_coco
from retina.data.shapes import write_shapes
from retina.engine.checkpointer import TrainState
from retina.engine.logging import RunLogger

Capture = pytest.CaptureFixture[str]
Tool = Callable[..., int]
SMALL = ("train.log_every=2", "train.pictures=0", "trackers=[]", "model.fpn_channels=32", "data.short_side=64")
SMALL += ("data.long_side=96", "model.head_convs=1", "train.batch_size=4", "train.device=cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    write_shapes(folder / "shapes", num_train=10, num_val=4, image_size=(64, 96))
    return folder


@pytest.fixture
def train(place: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> Tool:
    monkeypatch.chdir(place)
    return functools.partial(tool, "train", "data=coco", "data.root=shapes", *SMALL)


def settings_of(folder: Path) -> dict[str, object]:
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert isinstance(settings, dict)
    return settings


CUT = ("name=cut", "auto=true", "train.length=12", "train.eval_every=0.5", "train.save_every=0.5")


@pytest.fixture(scope="module")
def told(place: Path, tool: Tool) -> str:
    """What a run with chosen settings says, from its start to its end."""
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()) as out:
        assert tool("train", "data=coco", "data.root=shapes", *SMALL, *CUT) == 0
    return out.getvalue()


def test_a_recipe_is_told_and_recorded(told: str, place: Path) -> None:
    settings = settings_of(place / "runs/cut")
    chosen = settings["chosen"]
    assert isinstance(chosen, dict)
    assert chosen["model.backbone"] == settings["model"]["backbone"] == "resnet18_half"  # type: ignore[index]
    assert settings["model"]["weights"] is None, "no weights are wanted that would need a network"  # type: ignore[index]
    given = ("data.short_side", "model.fpn_channels", "train.batch_size", "train.length", "train.eval_every")
    assert not set(given) & chosen.keys()
    assert settings["data"]["short_side"] == 64  # type: ignore[index]
    assert all(f"\n  {key} " in told for key in chosen), "each is told, with a reason"
    assert "on this CPU" in told
    assert "after 10 steps: " in told


def test_a_model_group_gives_what_its_file_says_and_leaves_the_rest_open(train: Tool, place: Path) -> None:
    words = ("auto=true", "model=tood", "loss=tal", "train.length=1", "train.eval_every=null")
    assert train("name=tood", *words) == 0
    model = settings_of(place / "runs/tood")["model"]
    assert isinstance(model, dict)
    assert (model["head"], model["backbone"]) == ("task_aligned", "resnet18_half")


def test_nothing_is_chosen_with_an_experiment(train: Tool, place: Path) -> None:
    words = ("model.backbone=resnet18_half", "train.length=1", "train.eval_every=null")
    assert train("name=recipe", "experiment=paper", *words) == 0
    settings = settings_of(place / "runs/recipe")
    assert (settings["auto"], settings["chosen"]) == (False, {})


@pytest.mark.parametrize(
    ("typed", "added"),
    [
        (["data=coco"], ["auto=true"]),
        (["data=coco", "budget=1h"], ["auto=true"]),
        (["data=coco", "budget=1h", "auto=false"], []),
        (["data=coco", "budget=1h", "experiment=paper"], []),
        ([], ["experiment=shapes"]),
        (["budget=1h"], ["experiment=shapes"]),
    ],
)
def test_data_without_a_recipe_imply_auto(typed: list[str], added: list[str]) -> None:
    assert added_words(typed) == added


@pytest.mark.usefixtures("told")
def test_a_run_with_chosen_settings_goes_on_bit_for_bit(train: Tool, place: Path, capsys: Capture) -> None:
    folder = place / "runs/cut"
    settings, last = settings_of(folder), folder / "checkpoints/step_00000012"
    whole = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    assert train(*CUT) == 0
    assert "resumed at step 6" in capsys.readouterr().out
    assert settings_of(folder) == settings
    again = load_file(last / "model.safetensors")
    assert all(again[key].equal(whole[key]) for key in whole)


def test_a_run_that_began_without_auto_goes_on(train: Tool, place: Path, capsys: Capture) -> None:
    words = ("name=before", "model.backbone=resnet18_half", "train.length=2", "train.eval_every=null")
    assert train(*words, "auto=false") == 0
    before = settings_of(place / "runs/before")
    assert (before["auto"], before["chosen"]) == (False, {})
    assert train(*words) == 0
    assert "another setting: auto" in capsys.readouterr().out
    assert settings_of(place / "runs/before") == before | {"auto": True}


def test_a_budget_becomes_a_length_once(place: Path, tmp_path: Path) -> None:
    words = ["data=coco", f"data.root={place / 'shapes'}", *SMALL, "auto=true", "budget=10h"]
    typed = frozenset(word.partition("=")[0] for word in words) - {"data"}
    command = Command(compose("train", words), typed, time.monotonic())
    train, val = (
        read_coco(place / f"shapes/annotations/instances_{s}.json", place / "shapes" / s) for s in ("train", "val")
    )
    cpu = torch.device("cpu")
    recorder = RunLogger(None)
    start = functools.partial(assemble, train=train, val=val, device=cpu, recorder=recorder, start=None)
    settings = planned(command, train, cpu, start, recorder)
    assert settings["train"]["length"] == settings["chosen"]["train.length"]
    assert settings["train"]["length"] % 5 == 0, "the last of five evaluations falls on the end"

    write_settings(tmp_path, settings)
    assert remembered(tmp_path, command) == command.settings, "no run has begun"
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    assert remembered(tmp_path, command) == settings


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("budget=soon",), "out-of-range"),
        (("budget=0.001s",), "out-of-range"),
        (("budget=1h", "train.length=3"), "contradiction"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(
    train: Tool, words: tuple[str, ...], code: str, capsys: Capture
) -> None:
    assert train("name=refused", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error[{code}]: budget")
    assert err.count("\n") == 1


def test_only_a_run_whose_length_can_be_raised_is_told_to_raise_it() -> None:
    model = torch.nn.Conv2d(1, 1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    assert any("train.length" in line for line in describe_end(Path("run"), state, 0))
    state.progress.total = 100  # of a budget, beside which a length is refused
    assert not any("train.length" in line for line in describe_end(Path("run"), state, 0))
