"""The lab's door: which experiments there are, and what a wrong one is told."""

from types import ModuleType
from typing import Any

import pytest

from commands import Capture, Tool, one_line


@pytest.mark.parametrize(
    ("words", "named"),
    [([], "nothing to do: "), (["curve"], "did you mean curves?"), (["xyz", "study=gamma"], "xyz: ")],
)
def test_a_wrong_experiment_is_one_line(tool: Tool, capsys: Capture, words: list[str], named: str) -> None:
    assert tool("lab", *words) == 2
    line = one_line(capsys)
    assert named in line
    assert "curves, distribution, ablate, ladder, anchors" in line


def test_help_names_them_all(tool: Tool, load: Any, capsys: Capture) -> None:
    assert tool("lab", "--help") == 0
    out = capsys.readouterr().out
    lab: ModuleType = load("lab")
    assert all(f"tools/lab.py {name}" in out for name in lab.EXPERIMENTS)


def test_every_experiment_has_help_of_its_own(tool: Tool, load: Any, capsys: Capture) -> None:
    for name in load("lab").EXPERIMENTS:
        assert tool("lab", name, "--help") == 0
        out = capsys.readouterr().out
        assert f"tools/lab.py {name}" in out or name == "ladder", name  # which is an ablation, and says that
