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
from retina.engine.config import TrainConfig
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
        checkpointer.check(finished=False)
    save(checkpointer, 3)
    checkpointer.check(finished=False)
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
        checkpointer.check(finished=False)


def test_best_weights_that_are_owed_survive_the_process(checkpointer: Checkpointer, tmp_path: Path) -> None:
    (tmp_path / BEST / "in the way").mkdir(parents=True)
    checkpointer.state.progress.step = 1
    checkpointer.save_best({"AP": 0.1})
    for step in (2, 3, 4):  # the weights of step 1 are rotated away
        with torch.no_grad():
            checkpointer.state.model.bias.fill_(step)
        save(checkpointer, step)
    with refused("not-written", BEST, "in the way", kind=CheckpointError):
        checkpointer.check(finished=False)
    assert (tmp_path / BEST / "in the way").is_dir()

    again = Checkpointer(tmp_path, checkpointer.state, card=checkpointer.card)
    again.restore()
    with refused("not-written", BEST, kind=CheckpointError):
        again.check(finished=True)
    (tmp_path / BEST / "in the way").rmdir()
    (tmp_path / BEST).rmdir()
    save(again, 4)  # saved already, but for what is owed
    again.check(finished=True)
    assert read_card(tmp_path / BEST).step == 1
    save(again, 5)
    names = [path.name for path in (tmp_path / "checkpoints" / "step_00000005").iterdir()]
    assert BEST not in names, "nothing is owed any more"


def test_best_weights_owed_by_an_earlier_process_are_written_at_once(
    checkpointer: Checkpointer, tmp_path: Path
) -> None:
    (tmp_path / BEST / "in the way").mkdir(parents=True)
    checkpointer.save_best({})
    save(checkpointer, 1)
    (tmp_path / BEST / "in the way").rmdir()
    (tmp_path / BEST).rmdir()
    Checkpointer(tmp_path, checkpointer.state).restore()
    assert read_card(tmp_path / BEST).step == 0


def test_a_finished_run_without_its_best_weights_is_not_called_finished(
    checkpointer: Checkpointer, tmp_path: Path
) -> None:
    save(checkpointer, 1)
    checkpointer.check(finished=False)
    with refused("no-best", tmp_path / BEST, kind=CheckpointError):
        checkpointer.check(finished=True)


def test_the_run_stops_when_nothing_could_be_saved_for_too_long(checkpointer: Checkpointer, tmp_path: Path) -> None:
    checkpointer.state.config = TrainConfig(max_unsaved_minutes=0.0)
    (tmp_path / "checkpoints").write_text("mine")
    with refused("nothing-saved", tmp_path, "max_unsaved_minutes", "no folder", "in the way", kind=CheckpointError):
        save(checkpointer, 1)
    assert (tmp_path / "checkpoints").read_text() == "mine"


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
