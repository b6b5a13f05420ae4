"""The lab's door: which experiments there are, and what a wrong one is told."""

from types import ModuleType
from typing import Any

import pytest

from commands import Capture, Tool, one_line


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "nothing to do - choose one of curves, distribution, ablate, ladder, anchors"),
        (["curve"], "curve - did you mean curves? There are curves, distribution, ablate, ladder, anchors"),
        (["xyz", "study=gamma"], "xyz - choose one of curves, distribution, ablate, ladder, anchors"),
    ],
)
def test_a_wrong_experiment_is_one_line(tool: Tool, capsys: Capture, words: list[str], wanted: str) -> None:
    assert tool("lab", *words) == 2
    assert one_line(capsys) == f"error: {wanted}"


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
