"""What a run does about a disk without room: a limit on the size of files makes writes fail as a full disk does."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from faults import refused
from retina.engine.checkpoint import newest_valid
from retina.engine.checkpointer import BEST, Checkpointer, TrainState
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
def checkpointer(tmp_path: Path) -> Checkpointer:
    torch.manual_seed(0)
    model = nn.Linear(200, 20)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    card = DetectorCard(model={}, classes=["a"], category_ids=[1], preprocessing={}, postprocess={})
    return Checkpointer(tmp_path, state, card=card)


def save(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.state.progress.step = step
    checkpointer.save()


def test_no_room_for_a_checkpoint_keeps_the_one_before_and_is_tried_again(
    checkpointer: Checkpointer, tmp_path: Path
) -> None:
    save(checkpointer, 1)
    with files_up_to(8000):
        save(checkpointer, 2)
    assert list(checkpointer.missing) == ["checkpoint"]
    assert newest_valid(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "step_00000001", [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    with refused("not-written", tmp_path, "checkpoint", "File too large", kind=CheckpointError):
        checkpointer.check()
    save(checkpointer, 3)
    checkpointer.check()
    assert newest_valid(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / "step_00000003"


def test_no_room_for_the_best_weights_keeps_those_before(checkpointer: Checkpointer, tmp_path: Path) -> None:
    checkpointer.state.progress.step = 1
    checkpointer.save_best({"AP": 0.1})
    checkpointer.state.progress.step = 2
    with files_up_to(8000):
        checkpointer.save_best({"AP": 0.2})
    assert read_card(tmp_path / BEST).step == 1
    assert [path.name for path in tmp_path.iterdir()] == [BEST]
    with refused("not-written", BEST, kind=CheckpointError):
        checkpointer.check()


def test_weights_that_are_no_numbers_are_never_saved(checkpointer: Checkpointer, tmp_path: Path) -> None:
    save(checkpointer, 1)
    with torch.no_grad():
        checkpointer.state.model.bias[3] = float("nan")
    with refused("not-finite", "bias", kind=CheckpointError):
        save(checkpointer, 2)
    with refused("not-finite", "bias", kind=CheckpointError):
        checkpointer.save_best({})
    assert newest_valid(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / "step_00000001"
    assert not (tmp_path / BEST).exists()


def test_the_same_state_is_written_once(checkpointer: Checkpointer, tmp_path: Path) -> None:
    save(checkpointer, 1)
    folder = tmp_path / "checkpoints" / "step_00000001"
    before = folder.stat().st_ino
    save(checkpointer, 1)
    assert folder.stat().st_ino == before
    checkpointer.state.progress.evaluated = 1
    save(checkpointer, 1)
    assert folder.stat().st_ino != before
