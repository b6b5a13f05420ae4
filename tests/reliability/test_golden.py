"""Files of earlier versions, committed once, that every later version must read.

tests/golden/step_00000003 was written by `save_checkpoint(GOLDEN, PROGRESS, keep=1, **parts(3))`, best.safetensors by
`save_detector(GOLDEN / "best.safetensors", detector_state(), CARD)`, and best_without_hash.safetensors by the same call
before such files held their own hash. run_without_mark/config.yaml is of `experiment=shapes name=golden`, by a version
that wrote no mark into it and did not know `train.max_unsaved_minutes`. They are never written again: what replaces
them gets another name and a test of its own."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retina.cli.compose import compose
from retina.cli.data import merge
from retina.cli.run_folder import Opened, open_run, read_settings
from retina.engine.checkpoint import Progress, load_checkpoint, newest_valid
from retina.engine.checkpointer import Checkpointer, TrainState
from retina.engine.config import TrainConfig
from retina.engine.optim import ExponentialMovingAverage
from retina.interop.transfer import init_from
from retina.model.weights import DetectorCard, read_card

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "step_00000003"

PROGRESS = Progress(
    step=3,
    best=0.25,
    best_step=2,
    evaluated=2,
    evaluations_without_gain=1,
    scaler={"scale": 1024.0, "growth_tracker": 3},
    meter=[1.0, 0.5, 0.25, 7.0, 1.5],
    annotations="0123456789abcdef",
)
CARD = DetectorCard(
    model={"num_classes": 2, "backbone": "resnet18"},
    classes=["cat", "Hündchen"],
    category_ids=[7, 3],
    preprocessing={"short_side": 64, "long_side": 96},
    postprocess={"score_threshold": 0.05},
    step=3,
    metrics={"AP": 0.25, "APs": None},
)


def parts(steps: int) -> dict[str, Any]:
    """A model with parameters and buffers, after some updates; nothing in it depends on a random number generator."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) - number) / 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = ExponentialMovingAverage(model, 0.9)
    for step in range(steps):
        model(torch.arange(150.0).view(2, 3, 5, 5).remainder(7 + step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    return {"model": model, "optimizer": optimizer, "ema": ema}


def detector_state() -> dict[str, Tensor]:
    return {"weight": torch.arange(12.0).view(3, 4) / 8, "coarse": torch.ones(3).half(), "count": torch.tensor(5)}


def digest(tensors: dict[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def test_a_checkpoint_of_the_first_version_loads() -> None:
    assert newest_valid(GOLDEN) == (CHECKPOINT, [])
    fresh = parts(0)
    assert load_checkpoint(CHECKPOINT, **fresh) == PROGRESS
    optimizer = fresh["optimizer"].state_dict()["state"]
    moments = {f"{i}.{name}": value for i, state in optimizer.items() for name, value in state.items()}
    assert {
        "model": digest(fresh["model"].state_dict()),
        "ema": digest(fresh["ema"].model.state_dict()),
        "optimizer": digest(moments),
    } == {
        "model": "1bc0ee593e1da9440528697e149152215043c0123622cb2c483c546b245430b0",
        "ema": "0cf6b54c431c8168b3b3bc8adbcf4a3f6a3032ea31e5983c8b03c2c33057ad33",
        "optimizer": "407ada383379a61793fe0e2b0bf03ca8394d86915ac2e666a58b53b0664dacae",
    }


def test_a_run_of_an_earlier_version_goes_on_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoints" / CHECKPOINT.name)
    shutil.copy(GOLDEN / "run_without_mark" / "config.yaml", tmp_path)
    before = read_settings(tmp_path / "config.yaml")
    now = compose("train", ["experiment=shapes"])
    settings = merge(now, before) | {"name": tmp_path.name}
    assert settings["train"]["max_unsaved_minutes"] == now["train"]["max_unsaved_minutes"]
    opened = open_run(tmp_path, settings, overwrite=False, defaults=lambda: now)
    assert opened == Opened(True, [f"going on with another setting: name: golden there, {tmp_path.name} now"])
    fresh = parts(0)
    state = TrainState(fresh["model"], fresh["optimizer"], TrainConfig(ema=0.9))
    assert Checkpointer(tmp_path, state).restore(PROGRESS.annotations) == PROGRESS


@pytest.mark.parametrize("name", ["best.safetensors", "best_without_hash.safetensors"])
def test_weights_of_the_first_version_load(name: str) -> None:
    assert read_card(GOLDEN / name) == CARD
    model = nn.Module()
    for key, value in detector_state().items():
        model.register_buffer(key, torch.zeros_like(value))
    assert init_from(model, GOLDEN / name, classes=CARD.classes) == [
        f"init_from: 3 of 3 tensors are those of {GOLDEN / name}"
    ]
    assert digest(model.state_dict()) == "28de2b333f1511594f04f3fff2316333cf08fc842b52b185755f8f34c562c2af"


def test_they_are_small() -> None:
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert sum(file.stat().st_size for file in files) < 50_000
