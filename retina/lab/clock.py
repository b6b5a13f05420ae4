"""Two ways of doing the same thing, timed side by side in one process, and the line that says which is faster.

On a CPU: one thread and the CPU time of the process, since wall time on a shared machine measures the neighbours. On
CUDA: device events. The ways take turns within each round, after a warm-up that also takes compilation out.
"""

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torchvision


class Times(NamedTuple):
    """Seconds of each round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how thoroughly to measure."""

    device: torch.device
    rounds: int = 7
    quick: bool = False
    """Tiny inputs, to see that a measure runs and its sides are equal; its times mean nothing."""

    def time(self, ways: Mapping[str, Callable[[], object]], *, warmup: int = 2) -> dict[str, Times]:
        """Calls every way `warmup` times, then `rounds` rounds of one call each."""
        for way in ways.values():
            for _ in range(warmup):
                way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        gc.collect()
        gc.disable()
        try:
            for _ in range(self.rounds):
                for name, way in ways.items():
                    seconds[name].append(self._once(way))
        finally:
            gc.enable()
        return {name: Times(values) for name, values in seconds.items()}

    def _once(self, way: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            way()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        started = time.process_time()
        way()
        return time.process_time() - started


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured ratio and the bars it is held against."""

    measure: str
    ours: float
    reference: float | None = None
    """None where a bar is absolute; then `ratio` is `ours` itself."""
    unit: str = ""
    ratio: float
    must: float | None = None
    """None: reported only."""
    goal: float | None = None
    lower_is_better: bool = False
    ratio_of_minima: float | None = None
    """The same ratio from the fastest round of each way, where the rest is from the medians."""

    @property
    def verdict(self) -> str:
        for name, bar in (("goal", self.goal), ("must", self.must)):
            if bar is not None and (self.ratio <= bar if self.lower_is_better else self.ratio >= bar):
                return name
        return "missed" if self.must is not None else "-"


def absolute(measure: str, value: float, unit: str = "", *, lower_is_better: bool = True, **bars: float | None) -> Row:
    """A value that is held against bars of its own, without a reference. `bars`: must, goal and ratio_of_minima."""
    return Row(measure=measure, ours=value, unit=unit, ratio=value, lower_is_better=lower_is_better, **bars)


def speedup(measure: str, times: Mapping[str, Times], *, must: float | None = None, goal: float | None = None) -> Row:
    """How many times faster `ours` is than `reference`."""
    row = cost(measure, times, must=must, goal=goal)
    ratio, ratio_of_minima = 1 / row.ratio, times["reference"].minimum / times["ours"].minimum
    return replace(row, ratio=ratio, ratio_of_minima=ratio_of_minima, lower_is_better=False)


def cost(measure: str, times: Mapping[str, Times], *, must: float | None = None, goal: float | None = None) -> Row:
    """What `ours` costs in units of `reference`."""
    ours, reference = times["ours"], times["reference"]
    return Row(
        measure=measure,
        ours=ours.median * 1000,
        reference=reference.median * 1000,
        unit="ms",
        ratio=ours.median / reference.median,
        ratio_of_minima=ours.minimum / reference.minimum,
        must=must,
        goal=goal,
        lower_is_better=True,
    )


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes by which the peak resident memory of this process rises above where it stood before `work` (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, which ru_maxrss cannot
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    file = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    described = {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
    }
    return described | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def table(rows: list[Row]) -> str:
    """Markdown, one line per row."""
    lines = [
        "| measure | ours | reference | ratio (fastest round) | must | goal | verdict |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        sign = "<=" if row.lower_is_better else ">="
        bars = [f"{sign} {bar:g}" if bar is not None else "" for bar in (row.must, row.goal)]
        reference = f"{row.reference:.4g} {row.unit}" if row.reference is not None else ""
        fastest = f" ({row.ratio_of_minima:.3g})" if row.ratio_of_minima is not None else ""
        lines.append(
            f"| {row.measure} | {row.ours:.4g} {row.unit} | {reference} | {row.ratio:.3g}{fastest} "
            f"| {bars[0]} | {bars[1]} | {row.verdict} |"
        )
    return "\n".join(lines)
