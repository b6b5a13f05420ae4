"""Compares detectors on the same images: is the difference more than luck, in which classes, on which images?

python tools/compare.py runs/a runs/b output=out/compared
python tools/compare.py RESULTS_A.json RESULTS_B.json data=coco data.root=DIR output=out/compared

A source is a run that tools/eval.py has scored, the folder that it wrote, or a COCO results file. The ground truth is
that of the first run, or what data=... says.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from retina.cli.compose import entry
from retina.cli.data import data_of, load_split
from retina.cli.run_folder import compare as compare_settings
from retina.cli.scoring import scoring_of, settings_of
from retina.errors import ConfigError, DataError, check, check_choice
from retina.files import make_folder, write_whole
from retina.printing import say

PAGE, VALUES = "comparison.html", "comparison.json"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """configs/compare.yaml says what each is."""

    sources: list[str]
    output: str
    split: str
    data: dict[str, Any]
    eval: dict[str, Any]
    traceback: bool

    def __post_init__(self) -> None:
        check(len(self.sources) >= 2, "sources", self.sources, "give two or more to compare")
        check_choice(self.split, ("train", "val"), "split")


@entry("compare", CompareConfig)
def program(config: CompareConfig) -> int:
    paths, output = [Path(source) for source in config.sources], Path(config.output)
    files = [results_of(path) for path in paths]
    runs = [run_of(path) for path in paths]
    settings = [settings_of(run) if run else {} for run in runs]
    data = data_of(settings[0].get("data", {}), config.data, {})
    open_folder(output)

    from retina.evaluation.compare import analyses_of, compare, verdict
    from retina.evaluation.results import read_results
    from retina.report.comparison import build_comparison

    scoring = scoring_of(settings[0], config.eval)
    try:
        annotations = load_split(data, config.split)
    except (ConfigError, DataError) as fault:
        if fault.code not in ("no-images", "missing-setting"):
            raise
        annotations = load_split(data, config.split, needs="ids")  # without pictures
    detections = [read_results(file, annotations) for file in files]
    names = distinct([path.name if path.name != "eval" else path.resolve().parent.name for path in paths])
    results = [compare(annotations, detections[0], other, scoring=scoring) for other in detections[1:]]
    analyses = analyses_of(annotations, detections, scoring)
    changes = [[str(one) for one in compare_settings(settings[0], other)] for other in settings[1:]]
    lines = [verdict(result, names[0], name) for name, result in zip(names[1:], results, strict=True)]
    values = {"sources": config.sources, "classes": list(annotations.classes), "verdicts": lines, "results": results}
    write_whole(output / VALUES, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
    command = " ".join(["compare.py", *config.sources])
    content = build_comparison(names, results, analyses, command=command, settings=changes, max_pixels=data.max_pixels)
    write_whole(output / PAGE, content)
    say(*lines, f"report: {output / PAGE}")
    return 0


def results_of(path: Path) -> Path:
    """The results file of a source. Raises ConfigError where there is none."""
    if path.is_dir():
        for file in (path / "eval" / "detections.json", path / "detections.json"):
            if file.is_file():
                return file
        fix = f"score it first: python tools/eval.py checkpoint={path}"
        raise ConfigError(f"{path}: has not been evaluated - {fix}", code="not-evaluated", key="sources")
    if path.suffix == ".safetensors":
        fix = f"python tools/eval.py checkpoint={path} output=DIR, then give DIR"
        raise ConfigError(f"{path}: are weights, not scored yet - {fix}", code="not-evaluated", key="sources")
    return path


def run_of(path: Path) -> Path | None:
    """The run that a source is of, if any."""
    return next((folder for folder in (path, path.parent) if (folder / "config.yaml").is_file()), None)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with their number where two are equal."""
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]


def open_folder(output: Path) -> None:
    """Makes it. Raises ConfigError for one that holds anything but an earlier comparison."""
    make_folder(output)
    if any(entry.name not in (PAGE, VALUES) for entry in output.iterdir()):
        raise ConfigError(f"{output} holds other files - choose another folder", code="output-taken", key="output")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Takes sources without a key."""
    words = list(sys.argv[1:] if argv is None else argv)
    sources = [word for word in words if not word.startswith("-") and "=" not in word]
    if sources:
        quoted = ",".join("'" + source.replace("\\", "\\\\").replace("'", "\\'") + "'" for source in sources)
        words = [word for word in words if word not in sources] + [f"sources=[{quoted}]"]
    if argv is None:
        sys.argv[1:] = words
        program()
    program(words)
