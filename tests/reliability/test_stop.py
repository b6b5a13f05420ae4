"""A few of the signals that `make chaos` sends, and what a loader worker that hangs makes of them."""

import sys
import time
from pathlib import Path
from signal import SIGINT, SIGSTOP, SIGTERM, Signals

import pytest

from chaos import runs
from chaos.runs import Life, command, saved_step, send, wait_for, write_data
from chaos.signals import Trial, second_interrupt, signals_stop, steps_said
from programs import Program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found by Linux's /proc")


@pytest.fixture(autouse=True)
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick tests fork their programs; the slow ones and `make chaos` start them as a user does."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(
            runs, "start", lambda words, folder, log, env: Program(*words[1:], cwd=folder, output=log, **env)
        )


@pytest.mark.parametrize(
    "instants",
    [
        {"evaluation": SIGTERM, "step": SIGINT},
        pytest.param({"start-up": SIGTERM, "checkpoint": SIGINT}, marks=pytest.mark.slow),
    ],
    ids=",".join,
)
def test_signals_lose_nothing_and_give_their_exit_status(tmp_path: Path, instants: dict[str, Signals]) -> None:
    write_data(tmp_path)
    trials = [Trial(number, instant, "process") for instant, number in instants.items()]
    outcome = signals_stop(tmp_path, trials=trials)
    assert outcome.ok, outcome.notes


def test_a_second_interrupt_quits_at_once(tmp_path: Path) -> None:
    write_data(tmp_path)
    outcome = second_interrupt(tmp_path)
    assert outcome.ok, outcome.notes


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(tmp_path: Path) -> None:
    write_data(tmp_path)
    outcome = signals_stop(tmp_path, trials=[Trial(SIGTERM, "step", "rank 1")], ranks=2)
    assert outcome.ok, outcome.notes


@pytest.mark.slow
def test_a_signal_ends_a_compilation(tmp_path: Path) -> None:
    write_data(tmp_path)
    with Life(command("compiled", train__compile="true"), folder=tmp_path) as life:
        assert wait_for(lambda: "lr  " in life.said() or not life.alive())
        time.sleep(2)
        send(life.process.pid, SIGTERM)
        assert life.wait() == 143, life.said()
        assert saved_step(tmp_path / "compiled" / "tiny") == 0


@pytest.mark.parametrize(("number", "status"), [(SIGTERM, 143), (SIGINT, 130), (None, 2)])
def test_a_loader_worker_that_hangs_costs_nothing(tmp_path: Path, number: Signals | None, status: int) -> None:
    """Stopped, as by a dead mount: a signal is heeded, and without one the data time out."""
    write_data(tmp_path)
    patience = {"data__timeout": 600 if number else 1}
    changes = {"data__num_workers": 1, "train__log_every": 1, "train__save_every": 1000, "train__length": 5000}
    with Life(command("stuck", **changes | patience, train__eval_every="null"), folder=tmp_path) as life:
        assert wait_for(lambda: steps_said(life) >= 2 or not life.alive())
        (worker,) = set(life.members()) - {life.process.pid}
        send(worker, SIGSTOP)
        if number:
            said = ""
            while said != (said := life.said()):  # what was read before has been learned: now it waits
                time.sleep(1)
            send(life.process.pid, number)
        assert life.wait() == status, life.said()
        steps = steps_said(life)
        assert saved_step(tmp_path / "stuck" / "tiny") == steps
        assert ("error[data-timeout]: data.timeout: " in life.said()) == (number is None)
    with Life(command("stuck", **changes, train__eval_every="null"), folder=tmp_path) as life:
        assert wait_for(lambda: steps_said(life) > steps or not life.alive())
        assert life.alive(), life.said()
