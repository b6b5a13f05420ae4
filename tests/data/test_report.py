"""Reports: complete on file, readable on screen."""

import json
from pathlib import Path

import pytest

from retina.data.checks import DataReport, brief


def test_few_lines_are_all_shown() -> None:
    report = DataReport(faults=[f"a.json: image {i}: bad - mend it" for i in range(20)], warnings=["a.json: odd - see"])
    assert report.lines() == [*report.faults, "warning: a.json: odd - see"]
    assert DataReport().lines() == []


def test_of_many_lines_no_kind_crowds_out_another() -> None:
    faults = [f"a.json: image {i}: bad - rename it to '{i}.jpg'" for i in range(1000)]
    faults[500] = "a.json: image 7: rare - buy another"
    lines = DataReport(faults=faults).lines(limit=4)
    assert lines == [faults[0], f"{faults[1]} (and 997 more like it)", faults[500]]


def test_more_kinds_than_lines() -> None:
    faults = [f"a.json: image 1: bad - remedy {'x' * (i + 1)}" for i in range(30)]
    lines = DataReport(faults=faults).lines(limit=5)
    assert lines == [*faults[:5], "and 25 more"]


def test_terminals_are_not_spoken_to(tmp_path: Path) -> None:
    report = DataReport(
        faults=["a.json: image 1 (\x1b[31m\n.jpg): bad - mend it"] * 30, warnings=["b\x07.json: odd - see"]
    )
    assert all(line.isprintable() for line in report.lines())
    report.write(tmp_path / "new" / "report.json")
    assert b"\x1b" not in (tmp_path / "new" / "report.json").read_bytes()
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    assert (found["num_faults"], found["num_warnings"], found["healthy"]) == (30, 1, False)
    assert found["faults"][0] == r"a.json: image 1 (\x1b[31m\n.jpg): bad - mend it"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        DataReport().write(tmp_path / "report.json")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_values_are_cut_to_what_is_needed() -> None:
    assert brief([1, 2.5, "x"]) == "[1, 2.5, 'x']"
    assert len(brief("x" * 10_000)) < 100
    nested: list[object] = []
    for _ in range(10_000):
        nested = [nested]
    assert len(brief(nested)) < 100
    assert len(brief([10**4000] * 1000)) < 400
