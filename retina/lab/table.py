"""The table of a study, as Markdown and CSV: mean and spread over seeds, published numbers, and the commands."""

import csv
import io
import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median_high, stdev
from typing import Any, NamedTuple

from retina.errors import RetinaError
from retina.files import read_plain
from retina.lab.study import Job, Line, Study
from retina.schema import parse_json

METRICS = ("AP", "AP50", "AP75")


class Measured(NamedTuple):
    """A line of the table and what its finished runs say, one value per run."""

    line: Line
    metrics: dict[str, list[float]]
    """From 0 to 1. `rarest` is the AP of the class with the fewest objects."""
    milliseconds: list[float]
    """Of training, per image."""
    rarest: str
    """Name of that class and its share of all objects."""
    best: bool | None = None
    """Whether it has the highest mean AP of its row; None where it is the only line of the row."""

    @property
    def published(self) -> Mapping[str, Any]:
        """The published numbers stand once for each row."""
        return self.line.published if self.best is not False else {}


def measure(lines: Sequence[Line]) -> list[Measured]:
    """Reads the records of the runs that have been evaluated at their last step."""
    measured = []
    for _, row in itertools.groupby(map(_measure_line, lines), lambda one: one.line.row):
        group = list(row)
        scored = [one for one in group if one.metrics["AP"]]
        best = max(scored, key=lambda one: (mean(one.metrics["AP"]), one.line.label), default=None)
        measured += [one._replace(best=one is best) for one in group] if len(group) > 1 else group
    return measured


def _measure_line(line: Line) -> Measured:
    measured = Measured(line, {name: [] for name in (*METRICS, "rarest")}, [], "")
    for job in line.jobs:
        records = _read_records(job.folder / "metrics.jsonl") if job.finished() else []
        scores = [record for record in records if record["kind"] == "val"]
        speeds = [record["images_per_second"] for record in records if record["kind"] == "train"]
        if not scores or not speeds:
            continue
        rarest, of_class = min(scores[-1]["per_class"].items(), key=lambda item: item[1]["num_objects"] or 1e9)
        objects = sum(one["num_objects"] for one in scores[-1]["per_class"].values())
        for name, value in {**scores[-1], "rarest": of_class["AP"]}.items():
            if name in measured.metrics:
                measured.metrics[name].append(value or 0.0)
        measured.milliseconds.append(1000 / median_high(speeds))
        measured = measured._replace(rarest=f"{rarest}, {of_class['num_objects'] / max(objects, 1):.0%}")
    return measured


def _read_records(file: Path) -> list[dict[str, Any]]:
    """Of a finished run; none where there is no file. Raises RetinaError for a damaged one."""
    try:
        return [parse_json(line) for line in read_plain(file).splitlines()] if file.is_file() else []
    except (OSError, ValueError, RecursionError) as fault:
        problem = f"{file}: is not what this program writes ({fault!r:.100}) - restore it from a copy"
        raise RetinaError(problem, code="damaged-records") from None


def markdown(
    name: str,
    study: Study,
    measured: Sequence[Measured],
    *,
    seeds: Sequence[int],
    command: str,
    faults: Mapping[Path, str],
    speed: Mapping[str, float],
) -> str:
    """`faults` of runs that failed, by their folders; `speed` of inference in ms per image, by labels."""
    rarest = next((one.rarest for one in measured if one.rarest), "rarest class")
    columns = ["setting", "runs", *METRICS, f"AP of {rarest}", "training, ms per image", "published AP"]
    if study.speed:
        columns[-1:] = ["inference, ms per image", "published AP", "published ms"]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for one in measured:
        cells = [f"**{one.line.label}**" if one.best else one.line.label]
        cells += [f"{len(one.milliseconds)} of {len(one.line.jobs)}" if one.line.jobs else ""]
        cells += [_spread(values) for values in one.metrics.values()]
        cells += [f"{mean(one.milliseconds):.1f}" if one.milliseconds else ""]
        cells += [_number(speed.get(one.line.label), 1)] if study.speed else []
        cells += [_number(one.published.get("AP"))]
        rows.append([*cells, _number(one.published.get("ms"))] if study.speed else cells)
    parts = [f"# {name}: {study.title}", _preamble(study, measured, seeds)]
    parts += ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    if faults:
        parts += ["Failed:", "\n".join(f"- {folder.name}: {fault}" for folder, fault in faults.items())]
    parts += ["The table again, after the runs that it still lacks:", f"```\n{command}\n```"]
    commands = [_train_command(one.line.jobs[0]) for one in measured if one.line.jobs]
    parts += ["One of the runs of each line:", "\n".join(["```", *commands, "```"])]
    return "\n\n".join(parts) + "\n"


def _preamble(study: Study, measured: Sequence[Measured], seeds: Sequence[int]) -> str:
    several = len(seeds) > 1
    over = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if several else f"seed {seeds[0]}"
    sentences = [f"Metrics from 0 to 1, on the validation split at the end of training, {over}."]
    done, jobs = sum(len(one.milliseconds) for one in measured), sum(len(one.line.jobs) for one in measured)
    if done < jobs:
        sentences += [f"{done} of {jobs} runs so far."]
    if any(one.best for one in measured):
        sentences += ["Of several lines of one row, the best by mean AP is bold (chosen on the same data)."]
    if study.speed:
        sentences += ["Inference is that of one thread on a CPU, or of the GPU."]
    if study.paper:
        sentences += [f"Published, for orientation: COCO, {study.paper}."]
    return " ".join(sentences)


def _spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{mean(values):.3f}"


def _number(value: object, places: int = 3) -> str:
    """Whole numbers have no places."""
    return "" if value is None else f"{value:.{places}f}" if isinstance(value, float) else str(value)


def _train_command(job: Job) -> str:
    return shlex.join(["python", "tools/train.py", *job.words])


def comma_separated(measured: Sequence[Measured], speed: Mapping[str, float]) -> str:
    """A record per line of the table, with the values of all seeds; published numbers in columns of their own."""
    published = sorted({key for one in measured for key in one.line.published})
    rows = []
    for one in measured:
        line = one.line
        row: dict[str, object] = {"label": line.label, "row": line.row}
        row["best_of_row"] = "" if one.best is None else int(one.best)
        for name, values in one.metrics.items():
            row[name] = f"{mean(values):.6f}" if values else ""
            row[f"{name}_std"] = f"{stdev(values):.6f}" if len(values) > 1 else ""
            row[f"{name}_runs"] = " ".join(f"{value:.6f}" for value in values)
        row["train_ms"] = f"{mean(one.milliseconds):.3f}" if one.milliseconds else ""
        row["inference_ms"] = speed.get(line.label, "")
        row |= {f"published_{key}": _number(line.published.get(key)) for key in published}
        rows.append(row | {"command": _train_command(line.jobs[0]) if line.jobs else ""})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
