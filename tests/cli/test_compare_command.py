"""Results files and runs against each other, from the command line."""

import json
from pathlib import Path

import pytest

from commands import Capture, Tool, refused_by_tool
from scenes import random_scene, write_coco


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """`gt.json`, `dt.json` and `fewer.json`."""
    write_coco(*random_scene(0, crowds=False), tmp_path)
    everything = json.loads((tmp_path / "dt.json").read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(everything[::4]))
    return tmp_path


def test_results_files(tool: Tool, results: Path, capsys: Capture) -> None:
    words = [results / "fewer.json", results / "dt.json", f"data.val.annotations={results / 'gt.json'}", "data=coco"]
    assert tool("compare", *words, f"output={results / 'out'}") == 0
    out = capsys.readouterr().out
    assert out.startswith("dt.json is better than fewer.json by ")
    values = json.loads((results / "out" / "comparison.json").read_text())
    assert values["verdicts"] == [out.splitlines()[0]]
    assert values["results"][0]["overall"]["AP"]["low"] > 0
    page = (results / "out" / "comparison.html").read_text()
    assert "dt.json against fewer.json" in page
    assert "style=" not in page

    assert tool("compare", *words, f"output={results / 'out'}") == 0, "an earlier comparison is replaced"
    capsys.readouterr()
    (results / "mine").mkdir()
    (results / "mine" / "thesis.txt").write_text("x")
    assert tool("compare", *words, f"output={results / 'mine'}") == 2
    refused_by_tool(capsys, "output-taken", results / "mine")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few(tool: Tool, results: Path, capsys: Capture, count: int) -> None:
    assert tool("compare", *[results / "dt.json"] * count, f"output={results / 'out'}", "data=coco") == 2
    assert "sources" in capsys.readouterr().err


def test_a_run_that_was_not_evaluated(tool: Tool, trained_run: Path, results: Path, capsys: Capture) -> None:
    assert tool("compare", trained_run, results / "dt.json", f"output={results / 'out'}") == 2
    refused_by_tool(capsys, "not-evaluated", trained_run)
    assert not (results / "out").exists()
