"""A few of the signals that `make chaos` sends."""

import sys
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import pytest

from chaos import runs
from chaos.runs import write_data
from chaos.signals import Trial, second_interrupt, signals_stop
from programs import Program

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found by Linux's /proc"),
    pytest.mark.timeout(900),  # many starts of a program, on a machine that may be busy
]


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
