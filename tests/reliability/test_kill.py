"""A few kills of what `make chaos` does a hundred of."""

import sys
from pathlib import Path

import pytest

from chaos import runs
from chaos.kill import kill_nine
from chaos.processes import loader_workers, ranks_change
from chaos.runs import write_data
from programs import Program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found by Linux's /proc")


@pytest.fixture(autouse=True)
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick tests fork their programs; the slow ones and `make chaos` start them as a user does."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(
            runs, "start", lambda words, folder, log, env: Program(*words[1:], cwd=folder, output=log, **env)
        )


@pytest.mark.parametrize(("kills", "length"), [(2, 12), pytest.param(4, 16, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_instants_arrives_at_the_same_bits(tmp_path: Path, kills: int, length: int) -> None:
    write_data(tmp_path)
    outcome = kill_nine(tmp_path, kills=kills, seed=3, train__length=length)
    assert outcome.tried >= kills
    assert outcome.ok, outcome.notes


@pytest.mark.slow
def test_two_ranks_killed_at_random_instants(tmp_path: Path) -> None:
    write_data(tmp_path)
    outcome = kill_nine(tmp_path, kills=3, ranks=2, seed=1)
    assert outcome.ok, outcome.notes


@pytest.mark.slow
def test_the_number_of_ranks_may_change(tmp_path: Path) -> None:
    write_data(tmp_path)
    outcome = ranks_change(tmp_path)
    assert outcome.ok, outcome.notes


@pytest.mark.slow
def test_the_number_of_loader_workers_changes_no_bit(tmp_path: Path) -> None:
    write_data(tmp_path)
    outcome = loader_workers(tmp_path)
    assert outcome.ok, outcome.notes
