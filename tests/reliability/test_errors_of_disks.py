"""File systems that fail or lack something, as the kernel says it: real errors of real system calls."""

import errno
import fcntl
from pathlib import Path

import pytest
import torch
from torch import nn

from children import with_failing_calls
from commands import Tool
from faults import refused
from outputs import images_found
from retina.cli.run_folder import open_run
from retina.engine.checkpoint import newest_valid
from retina.engine.checkpointer import BEST, Checkpointer, TrainState
from retina.engine.config import TrainConfig
from retina.errors import CheckpointError, ConfigError

Captured = pytest.CaptureFixture[str]

NAMES = {
    errno.EIO: "the disk fails",
    errno.EROFS: "mount the disk for writing",
    errno.ESTALE: "mount the network disk anew",
    errno.EEXIST: "move what is in the way",
    errno.EDQUOT: "make room within your quota",
    errno.ENOSPC: "make room",
    errno.ENODEV: "choose another disk",
}
"""What is advised against each."""


LOCKS = {"argument": 1, "value": fcntl.F_SETLK}
"""Of fcntl, the calls that lock."""


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_training_works_on_a_file_system_without_locks(code: int, tmp_path: Path) -> None:
    def task() -> None:
        (note,) = open_run(tmp_path / "run", {"name": "run"}, overwrite=False).notes
        assert "no locks" in note

    assert with_failing_calls(task, "fcntl", code, **LOCKS) == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_inference_works_on_a_file_system_without_locks(
    code: int, tool: Tool, trained_run: Path, tiny_data: Path, tmp_path: Path, capfd: Captured
) -> None:
    def task() -> None:
        assert tool("infer", *infer_words(trained_run, tiny_data, tmp_path)) == 0

    assert with_failing_calls(task, "fcntl", code, **LOCKS) == 0
    assert len(images_found(tmp_path / "out")) == 1
    assert "no locks" in capfd.readouterr().err


def infer_words(run: Path, data: Path, folder: Path) -> list[str]:
    image = min((data / "val").iterdir())
    return [f"checkpoint={run}", f"source={image}", f"output={folder}/out", "device=cpu", "pictures=false"]


@pytest.mark.parametrize("call", ["fsync", "write"])
@pytest.mark.parametrize(("code", "advice"), NAMES.items())
def test_what_a_disk_says_is_named_and_training_stops_after_a_while(
    call: str, code: int, advice: str, tmp_path: Path, capfd: Captured
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    checkpointer = Checkpointer(tmp_path, state)
    checkpointer.save()
    first = tmp_path / "checkpoints" / "step_00000000"

    def task() -> None:
        state.progress.step = 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", None)  # writes fail there too
            checkpointer.save()
            checkpointer.save_best({})
        for what in ("checkpoint", BEST):
            assert advice in checkpointer.missing[what], checkpointer.missing
        assert newest_valid(first.parent) == (first, [])
        state.config = TrainConfig(max_unsaved_minutes=0.0)
        for save in (checkpointer.save, lambda: checkpointer.save_best({})):
            with refused("nothing-saved", tmp_path, advice, "max_unsaved_minutes", kind=CheckpointError):
                save()

    assert with_failing_calls(task, call, code) == 0
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert not (tmp_path / BEST).exists()


@pytest.mark.parametrize(("code", "advice"), NAMES.items())
def test_what_a_disk_says_at_the_start_is_one_line(code: int, advice: str, tmp_path: Path) -> None:
    def task() -> None:
        with refused("not-written", tmp_path / "run", advice, kind=ConfigError):
            open_run(tmp_path / "run", {"name": "run"}, overwrite=False)

    assert with_failing_calls(task, "fsync", code) == 0


@pytest.mark.parametrize("code", [errno.EIO])
def test_inference_that_cannot_write_ends_in_one_line(
    code: int, tool: Tool, trained_run: Path, tiny_data: Path, tmp_path: Path, capfd: Captured
) -> None:
    def task() -> None:
        assert tool("infer", *infer_words(trained_run, tiny_data, tmp_path)) == 2

    assert with_failing_calls(task, "fsync", code) == 0
    said = capfd.readouterr().err
    assert said.startswith("error"), said
    assert said.count("\n") == 1
    assert NAMES[code] in said
    assert not (tmp_path / "out" / "detections.json").exists()
