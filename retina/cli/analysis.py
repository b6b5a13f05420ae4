"""`analysis.json` and `report.html` beside the metrics of an evaluation. Beside the road."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.files import read_plain, write_whole
from retina.printing import say
from retina.schema import parse_json

if TYPE_CHECKING:
    from retina.data.annotations import Annotations
    from retina.evaluation.metrics import DetectionArrays, Scoring


def write_analysis(
    output: Path,
    annotations: "Annotations",
    detections: "DetectionArrays",
    metrics: dict[str, Any],
    scoring: "Scoring",
    *,
    facts: Sequence[tuple[str, str]],
    point: dict[str, Any] | None = None,
    run: Path | None = None,
) -> None:
    """Writes both files and prints what they say in a few sentences.

    point: the operating point of the weights.
    run: the folder of the run, for its settings, records and warnings."""
    from retina.evaluation.analysis import analyze, describe
    from retina.report.evaluation import Origin, write_report

    analysis = analyze(annotations, detections, metrics, point=point, scoring=scoring)
    text = json.dumps(analysis.values, indent=1, allow_nan=False) + "\n"
    write_whole(output / "analysis.json", text.encode())
    name = run.resolve().name if run else output.resolve().name
    hashes = [(f"SHA-256 of {what}", digest(Path(file))) for what, file in facts if Path(file).is_file()]
    origin = Origin(
        title=f"Evaluation of {name}",
        command=" ".join(Path(word).name if number == 0 else word for number, word in enumerate(sys.argv)),
        facts=[*facts, *hashes, *environment(run)],
        settings=read_text(run / "config.yaml") if run else "",
        warnings=data_warnings(output, run),
        records=records_of(run / "metrics.jsonl") if run else [],
    )
    write_report(output / "report.html", analysis, metrics, origin)
    say("", *describe(analysis.values), f"report: {output / 'report.html'}")


def digest(file: Path) -> str:
    return hashlib.sha256(read_plain(file)).hexdigest()


def read_text(file: Path) -> str:
    """What a file of a run says; nothing where it cannot be read."""
    try:
        return read_plain(file).decode(errors="replace")
    except OSError:
        return ""


def read_json(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return None


def records_of(file: Path) -> list[dict[str, Any]]:
    """The records of a run; lines that are none are left out."""
    records = [read_json(line) for line in read_text(file).splitlines()]
    return [record for record in records if isinstance(record, dict) and type(record.get("step")) is int]


def environment(run: Path | None) -> list[tuple[str, str]]:
    """Versions, commit and device of the training run."""
    values = read_json(read_text(run / "environment.json")) if run else None
    if not isinstance(values, dict):
        return []
    return [(f"trained with: {key}", str(value)) for key, value in values.items() if isinstance(value, (str, int))]


def data_warnings(output: Path, run: Path | None) -> list[str]:
    """What was found in the data when it was read for training and for this evaluation."""
    lines = []
    for folder in filter(None, (run, output)):
        values = read_json(read_text(folder / "data_report.json"))
        for key in ("faults", "warnings"):
            found = values.get(key) if isinstance(values, dict) else None
            lines += [line for line in found if isinstance(line, str)] if isinstance(found, list) else []
    return list(dict.fromkeys(lines))
