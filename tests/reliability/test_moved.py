"""A run folder that is moved, deleted or replaced while the run goes on."""

import shutil
import sys
from pathlib import Path
from signal import SIGTERM

import pytest

from chaos import runs
from chaos.runs import Life, command, saved_step, send, wait_for, write_data
from programs import Program
from retina.engine.checkpoint import newest_valid
from retina.files import Place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found by Linux's /proc")


@pytest.mark.parametrize(
    "fault",
    ["moved", "replaced", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("deleted", "there again"))],
)
def test_a_folder_that_is_not_there_any_more_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(
        runs, "start", lambda words, folder, log, env: Program(*words[1:], cwd=folder, output=log, **env)
    )
    write_data(tmp_path)
    run, aside = tmp_path / "runs" / "tiny", tmp_path / "runs" / "other"
    with Life(command("runs", train__length=100_000, train__eval_every=50), folder=tmp_path) as life:
        assert wait_for(lambda: saved_step(run) >= 50 or not life.alive())
        run.rename(aside)
        saved = saved_step(aside)
        if fault == "deleted":
            shutil.rmtree(aside)
        if fault == "replaced":
            theirs = run / "checkpoints" / ".step_00000001.tmp" / "file"
            theirs.parent.mkdir(parents=True)
            for file in (theirs, run / "best.safetensors", run / "curves.png"):
                file.write_text("theirs")
        assert wait_for(lambda: "could not be written" in life.said() or not life.alive())
        if fault == "there again":
            aside.rename(run)
            assert wait_for(lambda: saved_step(run) > saved or not life.alive())
        send(life.process.pid, SIGTERM)
        assert life.wait() == (143 if fault == "there again" else 2), life.said()
        assert life.said().count("was moved or deleted") <= 4, "said once for each file, not at each attempt"
        assert ("error[not-written]: " in life.said().splitlines()[-1]) == (fault != "there again")
    assert "Traceback" not in life.said()
    if fault in ("moved", "deleted"):
        assert not run.exists()
    if fault == "replaced":
        assert [file.read_text() for file in run.rglob("*") if file.is_file()] == ["theirs"] * 3
    if fault != "deleted":
        folder = run if fault == "there again" else aside
        newest, faults = newest_valid(folder / "checkpoints")
        assert newest is not None
        assert not faults
        assert saved_step(folder) >= saved


def test_a_place_is_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    place = Place(folder)
    place.check()  # it may be made yet
    folder.mkdir()
    place.check()
    folder.rmdir()
    folder.mkdir()  # many file systems give it the number of the first
    with pytest.raises(FileNotFoundError):
        place.check()
