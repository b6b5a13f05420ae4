"""What a run does about a disk without room: a limit on the size of files makes writes fail as a full disk does."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from retina.engine.checkpoint import Progress, newest_valid
from retina.engine.checkpointer import BEST, Keeper
from retina.engine.logging import RunLogger
from retina.engine.meter import Meter
from retina.errors import CheckpointError
from retina.model.weights import DetectorCard, read_card


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    torch.manual_seed(0)
    model = nn.Linear(200, 20)
    return Keeper(
        tmp_path,
        keep=2,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ema=None,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        meter=Meter(1),
        card=DetectorCard(model={}, classes=["a"], category_ids=[1], preprocessing={}, postprocess={}),
        logger=RunLogger(tmp_path, active=False),
    )


def test_no_room_for_a_checkpoint_keeps_the_one_before_and_is_tried_again(keeper: Keeper, tmp_path: Path) -> None:
    keeper.save(Progress(step=1))
    with files_up_to(8000):
        keeper.save(Progress(step=2))
    assert list(keeper.missing) == ["checkpoint"]
    assert newest_valid(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "step_00000001", [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    with pytest.raises(CheckpointError, match=r"the last checkpoint could not be written \(File too large\)"):
        keeper.check()
    keeper.save(Progress(step=3))
    keeper.check()
    assert newest_valid(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / "step_00000003"


def test_no_room_for_the_best_weights_keeps_those_before(keeper: Keeper, tmp_path: Path) -> None:
    keeper.save_best(1, {"AP": 0.1})
    with files_up_to(8000):
        keeper.save_best(2, {"AP": 0.2})
    assert read_card(tmp_path / BEST).step == 1
    assert [path.name for path in tmp_path.iterdir()] == [BEST]
    with pytest.raises(CheckpointError, match=r"the last best\.safetensors could not be written"):
        keeper.check()


def test_weights_that_are_no_numbers_are_never_kept(keeper: Keeper, tmp_path: Path) -> None:
    keeper.save(Progress(step=1))
    with torch.no_grad():
        keeper.model.bias[3] = float("nan")
    with pytest.raises(CheckpointError, match="bias"):
        keeper.save(Progress(step=2))
    with pytest.raises(CheckpointError, match="bias"):
        keeper.save_best(2, {})
    assert newest_valid(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / "step_00000001"
    assert not (tmp_path / BEST).exists()
