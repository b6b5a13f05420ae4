"""The table of a study, as Markdown and CSV: mean and spread over seeds, published numbers, and the commands."""

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from retina.lab.study import Job, Line, Study

METRICS = ("AP", "AP50", "AP75")


class Measured(NamedTuple):
    """What the finished runs of a line say, one value per run."""

    metrics: dict[str, list[float]]
    """From 0 to 1. `rarest` is the AP of the class with the fewest objects."""
    milliseconds: list[float]
    """Of training, per image."""
    rarest: str
    """Name of that class and its share of all objects."""

    @property
    def num_runs(self) -> int:
        return len(self.milliseconds)


def measure(jobs: Sequence[Job]) -> Measured:
    """Reads the records of the runs that have been evaluated at their last step."""
    found = Measured({name: [] for name in (*METRICS, "rarest")}, [], "")
    for job in jobs:
        records = read_records(job.folder / "metrics.jsonl")
        scores = [record for record in records if record["kind"] == "val"]
        speeds = [record["images_per_second"] for record in records if record["kind"] == "train"]
        if not scores or not speeds:
            continue
        rarest, of_class = min(scores[-1]["per_class"].items(), key=lambda item: item[1]["num_objects"] or 1e9)
        objects = sum(one["num_objects"] for one in scores[-1]["per_class"].values())
        values = {name: scores[-1][name] for name in METRICS} | {"rarest": of_class["AP"]}
        for name, value in values.items():
            found.metrics[name].append(value or 0.0)
        found.milliseconds.append(1000 / sorted(speeds)[len(speeds) // 2])
        found = found._replace(rarest=f"{rarest}, {of_class['num_objects'] / max(objects, 1):.0%}")
    return found


def read_records(file: Path) -> list[dict[str, Any]]:
    """Of a run; a half-written last one is left out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{mean(values):.3f}"


def best_lines(lines: Sequence[Line], measured: Sequence[Measured]) -> set[str]:
    """Labels of the lines with the highest mean AP among those of their row, where it has several."""
    best: set[str] = set()
    for row in {line.row for line in lines}:
        of_row = [(m.metrics["AP"], line) for line, m in zip(lines, measured, strict=True) if line.row == row]
        scored = [(mean(values), line.label) for values, line in of_row if values]
        if len(of_row) > 1 and scored:
            best.add(max(scored)[1])
    return best


def markdown(
    name: str,
    study: Study,
    lines: Sequence[Line],
    measured: Sequence[Measured],
    *,
    seeds: Sequence[int],
    command: str,
    faults: Mapping[Path, str],
    speed: Mapping[str, float] | None,
) -> str:
    """`faults` of runs that failed, by their folders; `speed` of inference by labels, None where none is told."""
    best = best_lines(lines, measured)
    rarest = next((one.rarest for one in measured if one.rarest), "rarest class")
    columns = ["setting", "runs", *METRICS, f"AP of {rarest}", "training, ms per image"]
    columns += ["inference, ms per image"] if speed is not None else []
    columns += ["published AP", *(["published ms"] if speed is not None else [])]
    rows = [
        _cells(line, of_line, best, lines, speed if study.speed else None)
        for line, of_line in zip(lines, measured, strict=True)
    ]
    table = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    parts = [f"# {name}: {study.title}", _preamble(study, lines, measured, seeds, best)]
    parts += ["\n".join(f"| {' | '.join(row)} |" for row in table)]
    if faults:
        parts += ["Failed:", "\n".join(f"- {folder.name}: {fault}" for folder, fault in faults.items())]
    parts += ["The table again, after the runs that it still lacks:", f"```\n{command}\n```"]
    commands = [train_command(line.jobs[0]) for line in lines if line.jobs]
    parts += ["One of the runs of each line:", "\n".join(["```", *commands, "```"])]
    return "\n\n".join(parts) + "\n"


def _preamble(
    study: Study, lines: Sequence[Line], measured: Sequence[Measured], seeds: Sequence[int], best: set[str]
) -> str:
    several = len(seeds) > 1
    over = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if several else f"seed {seeds[0]}"
    sentences = [f"Metrics from 0 to 1, on the validation split at the end of training, {over}."]
    if (done := sum(one.num_runs for one in measured)) < (jobs := sum(len(line.jobs) for line in lines)):
        sentences += [f"{done} of {jobs} runs so far."]
    if best:
        sentences += ["Of several lines of one row, the best by mean AP is bold (chosen on the same data)."]
    if study.speed:
        sentences += ["Inference is that of one thread on a CPU, or of the GPU."]
    if study.paper:
        sentences += [f"Published, for orientation: COCO, {study.paper}."]
    return " ".join(sentences)


def _cells(
    line: Line, measured: Measured, best: set[str], lines: Sequence[Line], speed: Mapping[str, float] | None
) -> list[str]:
    published = line.published if line.label in best or of_row(line, lines) == 1 else {}
    cells = [f"**{line.label}**" if line.label in best else line.label]
    cells += [f"{measured.num_runs} of {len(line.jobs)}" if line.jobs else ""]
    cells += [spread(measured.metrics[metric]) for metric in (*METRICS, "rarest")]
    cells += [f"{mean(measured.milliseconds):.1f}" if measured.num_runs else ""]
    cells += [] if speed is None else [f"{speed[line.label]:.1f}" if line.label in speed else ""]
    cells += [told(published.get("AP"))]
    return cells if speed is None else [*cells, told(published.get("ms"))]


def of_row(line: Line, lines: Sequence[Line]) -> int:
    return sum(other.row == line.row for other in lines)


def told(value: object) -> str:
    """AP has three places, whole milliseconds none."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def train_command(job: Job) -> str:
    return shlex.join(["python", "tools/train.py", *job.words])


def comma_separated(lines: Sequence[Line], measured: Sequence[Measured], *, speed: Mapping[str, float] | None) -> str:
    """A record per line of the table, with the values of all seeds; published numbers in columns of their own."""
    best = best_lines(lines, measured)
    published = sorted({key for line in lines for key in line.published})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    values = [f"{name}{part}" for name in (*METRICS, "rarest") for part in ("", "_std", "_runs")]
    writer.writerow(["label", "row", "best_of_row", *values, "train_ms", "inference_ms",
                     *(f"published_{key}" for key in published), "command"])  # fmt: skip
    for line, of_line in zip(lines, measured, strict=True):
        cells: list[object] = [line.label, line.row, int(line.label in best) if of_row(line, lines) > 1 else ""]
        for runs in of_line.metrics.values():
            cells += [f"{mean(runs):.6f}" if runs else "", f"{stdev(runs):.6f}" if len(runs) > 1 else ""]
            cells += [" ".join(f"{value:.6f}" for value in runs)]
        cells += [f"{mean(of_line.milliseconds):.3f}" if of_line.num_runs else "", (speed or {}).get(line.label, "")]
        cells += [told(line.published.get(key)) for key in published]
        writer.writerow([*cells, train_command(line.jobs[0]) if line.jobs else ""])
    return buffer.getvalue()
