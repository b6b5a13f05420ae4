"""From a study file to training runs: which they are, what each is called, and the words that start it."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from retina.cli.compose import CONFIGS, Settings, compose, values_of
from retina.cli.config_files import refuse_bomb
from retina.cli.run_folder import WORDS, Difference, compare, read_settings
from retina.engine.config import from_mapping
from retina.errors import ConfigError
from retina.files import read_plain
from retina.tracking.trackers import flatten

STUDIES = CONFIGS / "studies"
EVERY_RUN = ("train.save_every=0.25", "train.keep_checkpoints=1", "train.pictures=0")
"""Weaker than all other words."""
ONE_SCORE = "train.eval_every=${train.length}"
"""Stronger than all other words, because the best of several evaluations would be a matter of luck."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; several, where `set` lists values: `optimizer.lr=0.01,0.02`."""

    label: str
    experiment: str | None = None
    """A file of configs/experiment: what it says itself, not what it begins with, are the row's first words."""
    set: list[str] | None = None
    """Words for tools/train.py; null where a row only has published numbers, or an experiment's words are enough."""
    published: dict[str, Any] = field(default_factory=dict)
    """From 0 to 1, by metric; `ms` is the time of an image."""
    image_scale: float = 1.0
    """Factor on data.short_side and data.long_side."""
    data: dict[str, list[str]] = field(default_factory=dict)
    """More words for one data set, by its name."""

    def __post_init__(self) -> None:
        if not 0 < self.image_scale < float("inf"):
            problem = f"{self.image_scale} is not allowed - give a factor above 0"
            raise ConfigError(problem, code="out-of-range", key="image_scale")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A file of configs/studies/."""

    title: str
    rows: list[Any]
    paper: str = ""
    """Where the published numbers come from."""
    base: list[str] = field(default_factory=list)
    """Words of all rows."""
    data: dict[str, list[str]] = field(default_factory=dict)
    """Words of all rows for one data set, by its name."""
    cumulative: bool = False
    """Whether a row adds to those before it."""
    speed: bool = False
    """Whether inference is timed."""


class Job(NamedTuple):
    """One training run."""

    words: list[str]
    settings: Settings

    @property
    def folder(self) -> Path:
        return Path(self.settings["runs"], self.settings["name"])

    def differences(self, before: Settings) -> list[Difference]:
        """From the settings of a run that is there. What an earlier version did not know, has its default."""
        groups = [word for word in self.words if (CONFIGS / word.partition("=")[0]).is_dir()]
        return compare(before, self.settings, lambda: compose("train", groups))

    def finished(self) -> bool:
        """Whether tools/train.py has said so in the run's log, and the run is of these very settings."""
        try:
            before = read_settings(self.folder / "config.yaml")
            log = read_plain(self.folder / "log.txt").decode()
        except (ConfigError, OSError, ValueError):
            return False
        same = all(difference.key in WORDS for difference in self.differences(before))
        _, finished, later = log.rpartition(" finished at step ")
        return same and bool(finished) and " resumed at step " not in later


class Line(NamedTuple):
    """A line of the table."""

    label: str
    row: str
    """Label of the row that it is of; a row with several lines has a best one."""
    published: Mapping[str, Any]
    jobs: list[Job]
    """One per seed; none where there are only published numbers."""


def read_study(name: str) -> tuple[str, Study]:
    """Its short name and content: of configs/studies/<name>.yaml, or any file that ends so. Raises ConfigError."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in STUDIES.glob("[!_]*.yaml")))
        problem = f"{name}: no such study - choose one of {known}, or give a YAML file"
        raise ConfigError(problem, code="no-such-option", key="study")
    try:
        refuse_bomb(file, content := file.read_bytes())
        values = yaml.safe_load(content)
        study = from_mapping(Study, values, "study")
        rows = [from_mapping(Row, row, f"study.rows.{i}") for i, row in enumerate(study.rows)]
    except ConfigError as fault:
        raise ConfigError(f"{file}: {fault}", code=fault.code) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as fault:
        problem = f"{file}: {' '.join(str(fault).split())} - correct this file"
        raise ConfigError(problem, code="unreadable-file") from None
    if len({row.label for row in rows}) < len(rows) or not rows:
        problem = f"{file}: rows: none, or two of one label - give each row a label of its own"
        raise ConfigError(problem, code="same-name")
    return file.stem, replace(study, rows=rows)


def plan(
    name: str,
    study: Study,
    words: Sequence[str],
    seeds: Sequence[int],
    *,
    cumulative: bool,
    runs: str,
    into: str | None,
) -> tuple[str, list[Line]]:
    """The study's name with that of the data (or `into`), and its lines. Raises ConfigError for wrong settings of any.

    words: what was typed for tools/train.py. They win over what the study says of all rows, and a row over them."""
    data, start = data_words(words)
    name = into or f"{name}-{data}"
    if start and data in known_data():
        start = [*start, f"model.weights={backbone_file(runs)}"]
    typed = [word for word in words if not word.startswith("data=")]
    base = [*EVERY_RUN, *start, *study.base, *study.data.get(data, []), *typed]
    lines: list[Line] = []
    before: list[str] = []
    for row in study.rows:
        if row.experiment is None and row.set is None:
            lines.append(Line(row.label, row.label, row.published, []))
            continue
        changes = [*before, *_words_of_experiment(row.experiment), *(row.set or []), *row.data.get(data, [])]
        before = changes if cumulative else []
        lines += _lines(row, [*base, *changes, ONE_SCORE, f"runs={runs}/{name}"], seeds)
    folders = [job.folder for line in lines for job in line.jobs]
    if twice := {str(folder) for folder in folders if folders.count(folder) > 1}:
        problem = f"two runs would be in {min(twice)} - give the rows labels that differ in letters"
        raise ConfigError(problem, code="shared-folder", key="study")
    return name, lines


def _lines(row: Row, words: Sequence[str], seeds: Sequence[int]) -> list[Line]:
    last = {word.partition("=")[0]: place for place, word in enumerate(words)}
    choices = [values_of(words[place]) for place in sorted(last.values())]  # without what a later word overrules
    lines = []
    for chosen in map(list, itertools.product(*choices)):
        swept = [word.partition("=") for word, values in zip(chosen, choices, strict=True) if len(values) > 1]
        label = ", ".join([row.label, *(f"{key.rpartition('.')[2]} {value}" for key, _, value in swept)])
        settings = compose("train", chosen)
        if row.image_scale != 1:
            sides = {f"data.{side}": settings["data"][side] for side in ("short_side", "long_side")}
            chosen = [word for word in chosen if word.partition("=")[0] not in sides]
            chosen += [f"{key}={round(side * row.image_scale)}" for key, side in sides.items()]
            settings = compose("train", chosen)
        stem = re.sub(r"[^a-zA-Z0-9.+-]+", "_", label).strip("_.")
        jobs = []
        for seed in seeds:
            name = f"{stem}-seed{seed}"
            job_settings = settings | {"train": settings["train"] | {"seed": seed}, "name": name}
            jobs.append(Job([*chosen, f"train.seed={seed}", f"name={name}"], job_settings))
        lines.append(Line(label, row.label, row.published, jobs))
    return lines


def _words_of_experiment(name: str | None) -> list[str]:
    """The file's choices of groups, and its values one by one. Raises ConfigError if there is none of that name."""
    if name is None:
        return []
    file = CONFIGS / "experiment" / f"{name}.yaml"
    if not file.is_file():
        problem = f"experiment: {name}: no such file in {file.parent} - correct the name"
        raise ConfigError(problem, code="no-such-option", key="study")
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    choices = [choice for choice in values.pop("defaults", []) if isinstance(choice, dict)]
    groups = [f"{key.removeprefix('override /')}={value}" for choice in choices for key, value in choice.items()]
    return [*groups, *(f"{key}={json.dumps(value)}" for key, value in flatten(values).items())]


def known_data() -> dict[str, list[str]]:
    """configs/studies/_data.yaml: words by the name of the data, and those of the run that makes the backbone."""
    known: dict[str, list[str]] = yaml.safe_load((STUDIES / "_data.yaml").read_text(encoding="utf-8"))
    return known


def data_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the data that the words choose, and the words that every run then begins with."""
    chosen = [word.removeprefix("data=") for word in words if word.startswith("data=")]
    recipes = [word.removeprefix("experiment=") for word in words if word.startswith("experiment=")]
    if recipes and not chosen:
        return recipes[-1], []
    data = chosen[-1] if chosen else "shapes"
    return data, known_data().get(data, [f"data={data}", "experiment=paper"])


def backbone_file(runs: str) -> Path:
    return Path(runs, "backbone", "best.safetensors")


def backbone_run(lines: Sequence[Line], runs: str) -> list[Job]:
    """The run whose backbone the others start from, where one does: the place of ImageNet's weights."""
    file = backbone_file(runs)
    if not any(job.settings["model"]["weights"] == str(file) for line in lines for job in line.jobs):
        return []
    words = [*EVERY_RUN, *known_data()["_backbone"], f"runs={runs}", f"name={file.parent.name}"]
    return [Job(words, compose("train", words))]
