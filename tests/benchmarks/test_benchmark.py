"""The benchmark's clock and table, and that every measure runs on tiny inputs with its sides found equal. The times of
such a run mean nothing, and none is asserted."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.syncs import Operations
from retina.lab.clock import Bench, Row, Times, cost, speedup, table

FAST = ("focal", "losses", "matching", "coco_eval", "loader", "packs", "infer", "annotations")
SLOW = ("postprocess", "inference", "step", "memory", "loop", "scaling")


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


def test_the_ways_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    bench = Bench(device=torch.device("cpu"), rounds=3)
    times = bench.time({"ours": lambda: calls.append("a"), "reference": lambda: calls.append("b")}, warmup=2)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert [len(one.seconds) for one in times.values()] == [3, 3]


def test_ratios_and_verdicts() -> None:
    times = {"ours": Times([2.0, 1.0, 4.0]), "reference": Times([8.0, 6.0, 3.0])}
    fast = speedup("a", times, must=2, goal=4)
    assert (fast.ratio, fast.ratio_of_minima, fast.verdict) == (3.0, 3.0, "must")
    dear = cost("b", times, must=0.5, goal=0.1)
    assert (dear.ratio, dear.ratio_of_minima, dear.verdict) == (1 / 3, 1 / 3, "must")
    assert speedup("c", times, must=3.5, goal=4).verdict == "missed"
    assert cost("d", times, must=0.3, goal=0.1).verdict == "missed"
    assert cost("e", times, must=0.5, goal=0.4).verdict == "goal"
    absolute = Row(measure="f", ours=5, reference=None, unit="s", ratio=5, must=None, goal=None)
    assert absolute.verdict == "-"
    lines = table([fast, dear, absolute]).splitlines()
    assert lines[2] == "| a | 2000 ms | 6000 ms | 3 (3) | >= 2 | >= 4 | must |"
    assert lines[4] == "| f | 5 s |  | 5 |  |  | - |"


def test_operations_that_wait_are_counted() -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    with Operations() as operations:
        x + 1
        x[torch.tensor([0, 2])]
        torch.where(x > 0, x, 0)
    assert operations.waiting == 0
    assert operations.total >= 3
    with Operations() as operations:
        x[x > 0]
        x.nonzero()
        x.sum().item()
        x.masked_select(x > 0)
        x.unique()
        x[x > 0] = torch.tensor([1.0, 2.0])
    assert operations.waiting >= 6


def measure(load: Callable[[str], ModuleType], folder: Path, *names: str) -> list[dict[str, object]]:
    output = folder / "out" / "benchmark.json"
    load("benchmark").main([*names, "--quick", "--rounds", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["machine"]["torch"] == torch.__version__
    rows: list[dict[str, object]] = result["rows"]
    assert rows
    assert all(isinstance(row["ratio"], float) for row in rows)
    return rows


@pytest.mark.parametrize("name", FAST)
def test_measure(name: str, load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    measure(load, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_measure(name: str, load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    measure(load, tmp_path, name)


def test_a_step_waits_for_nothing(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Counted, so this row is as true here as anywhere."""
    rows = measure(load, tmp_path, "syncs")
    assert {row["verdict"] for row in rows} <= {"goal", "-"}


def test_the_counter_sees_what_waits() -> None:
    from benchmarks.syncs import count

    values = torch.tensor([1.0, 2.0, 3.0])

    def step() -> None:
        assert values[1].item() == 2
        assert len(values[values > 1]) == 2
        assert len(values.nonzero()) == 3
        values[values > 2] = 3

    assert count(step).waiting == 4
    assert count(lambda: values + values.sum()).waiting == 0


def test_unknown_measures_are_named(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("benchmark").main(["fokal"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert all(name in told for name in ("fokal", "focal", "matching", "scaling"))


def test_the_frontier_is_drawn_from_its_table(tmp_path: Path) -> None:
    from benchmarks.frontier import main

    table = tmp_path / "points.csv"
    table.write_text("detector,backbone,fpn_channels,train_cpu_s,AP\nsmall,,,10,0.5\n")
    main(["--table", str(table), "--output", str(tmp_path / "points.png")])
    assert (tmp_path / "points.png").read_bytes().startswith(b"\x89PNG")
