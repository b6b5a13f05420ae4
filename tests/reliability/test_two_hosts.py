"""Two hosts that lose a rank and torchrun; `make chaos` kills every part of both."""

import sys
from pathlib import Path

import pytest

from chaos.hosts import hosts_fail, why_not
from chaos.runs import write_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")


@pytest.mark.slow
def test_a_rank_and_an_agent_killed_on_one_of_two_hosts(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    write_data(tmp_path)
    outcome = hosts_fail(tmp_path, victims=("rank 1", "agent 1"))
    assert outcome.ok, outcome.notes
