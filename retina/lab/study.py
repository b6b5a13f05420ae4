"""From a study file to training runs: which they are, what each is called, and the words that start it."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from retina.cli.compose import CONFIGS, Settings, compose, values_of
from retina.engine.config import from_mapping
from retina.errors import ConfigError

STUDIES = CONFIGS / "studies"
EVERY_RUN = ("train.save_every=0.25", "train.keep_checkpoints=1", "train.pictures=0")
"""Weaker than all other words."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; several, where `set` lists values: `optimizer.lr=0.01,0.02`."""

    label: str
    experiment: str | None = None
    """A file of configs/experiment: what it says itself, not what it begins with, are the row's first words."""
    set: list[str] | None = None
    """Words for tools/train.py; null where a row only has published numbers, or an experiment's words are enough."""
    published: dict[str, Any] = field(default_factory=dict)
    """In percent, by metric; `ms` is the time of an image."""
    image_scale: float = 1.0
    """Factor on data.short_side and data.long_side."""
    data: dict[str, list[str]] = field(default_factory=dict)
    """More words for one data set, by its name."""

    def __post_init__(self) -> None:
        if not 0 < self.image_scale < float("inf"):
            raise ConfigError(f"{self.label}: image_scale: {self.image_scale} is not allowed - give a factor above 0")


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
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.settings["runs"], self.settings["name"])


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
        raise ConfigError(f"study: {name}: no such study - choose one of {known}, or give a YAML file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as fault:
        raise ConfigError(f"{file}: {' '.join(str(fault).split())} - correct this file") from None
    try:
        study = from_mapping(Study, values, "study")
        rows = [from_mapping(Row, row, f"study.rows.{i}") for i, row in enumerate(study.rows)]
    except ConfigError as fault:
        raise ConfigError(f"{file}: {fault}") from None
    if len({row.label for row in rows}) < len(rows) or not rows:
        raise ConfigError(f"{file}: rows: none, or two of one label - give each row a label of its own")
    return file.stem, replace(study, rows=rows)


def plan(
    name: str,
    study: Study,
    words: Sequence[str],
    seeds: Sequence[int],
    *,
    budget: str | None,
    cumulative: bool,
    runs: str,
    into: str | None,
) -> tuple[str, list[Line]]:
    """The study's name with that of the data (or `into`), and its lines. Raises ConfigError for wrong settings of any.

    words: what was typed for tools/train.py. They win over what the study says of all rows, and a row over them."""
    data, start = data_words(words)
    name = into or f"{name}-{data}"
    base = [
        *EVERY_RUN,
        *start,
        *([f"model.weights={backbone_file(runs)}"] if start and data in known_data() else []),
        *study.base,
        *study.data.get(data, []),
        *(w for w in words if not w.startswith("data=")),
    ]
    if budget is not None:
        base.append(f"train.length={budget}")
    lines: list[Line] = []
    before: list[str] = []
    for row in study.rows:
        if row.experiment is None and row.set is None:
            lines.append(Line(row.label, row.label, row.published, []))
            continue
        own = [*before, *_words_of_experiment(row.experiment), *(row.set or []), *row.data.get(data, [])]
        before = own if cumulative else []
        lines += _lines(row, [*base, *own], seeds, runs=f"{runs}/{name}")
    names = [job.folder for line in lines for job in line.jobs]
    if twice := {str(folder) for folder in names if names.count(folder) > 1}:
        raise ConfigError(f"study: two runs would be in {min(twice)} - give the rows labels that differ in letters")
    return name, lines


def _words_of_experiment(name: str | None) -> list[str]:
    """The file's choices of groups, and its values one by one. Raises ConfigError if there is none of that name."""
    if name is None:
        return []
    file = CONFIGS / "experiment" / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"study: experiment: {name}: no such file in {file.parent} - correct the name")
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    choices = [choice for choice in values.pop("defaults", []) if isinstance(choice, dict)]
    groups = [f"{key.removeprefix('override /')}={value}" for choice in choices for key, value in choice.items()]
    return [*groups, *(f"{key}={json.dumps(value)}" for key, value in _leaves(values))]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_data() -> dict[str, list[str]]:
    """configs/studies/_data.yaml: words by the name of the data, and those of the run that makes the backbone."""
    known: dict[str, list[str]] = yaml.safe_load((STUDIES / "_data.yaml").read_text(encoding="utf-8"))
    return known


def backbone_file(runs: str) -> Path:
    return Path(runs, "backbone", "best.safetensors")


def backbone_run(lines: Sequence[Line], runs: str) -> list[Job]:
    """The run whose backbone the others start from, where one does: the place of ImageNet's weights."""
    file = backbone_file(runs)
    if not any(job.settings["model"]["weights"] == str(file) for line in lines for job in line.jobs):
        return []
    words = [*EVERY_RUN, *known_data()["_backbone"], f"runs={runs}", f"name={file.parent.name}"]
    settings = compose("train", words)
    return [Job(words, settings, settings["train"]["seed"])]


def data_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the data that the words choose, and the words that every run then begins with."""
    known = known_data()
    chosen = [word.removeprefix("data=") for word in words if word.startswith("data=")]
    recipes = [word.removeprefix("experiment=") for word in words if word.startswith("experiment=")]
    if recipes and not chosen:
        return recipes[-1], []
    data = chosen[-1] if chosen else "shapes"
    return data, known.get(data, [f"data={data}", "experiment=paper"])


def _lines(row: Row, words: Sequence[str], seeds: Sequence[int], *, runs: str) -> list[Line]:
    choices = [values_of(word) for word in words]
    swept = [position for position, of_one in enumerate(choices) if len(of_one) > 1]
    lines = []
    for chosen in itertools.product(*choices):
        told = [word.partition("=") for word in (chosen[position] for position in swept)]
        label = ", ".join([row.label, *(f"{key.rpartition('.')[2]} {value}" for key, _, value in told)])
        settings, own = compose("train", chosen), list(chosen)
        if row.image_scale != 1:
            sides = ("short_side", "long_side")
            own += [f"data.{side}={round(settings['data'][side] * row.image_scale)}" for side in sides]
            settings = compose("train", own)
        # scored once, at the end: the best of several evaluations would be a matter of luck, and of how many they are
        train = settings["train"] | {"eval_every": settings["train"]["length"]}
        stem = re.sub(r"[^a-zA-Z0-9.+-]+", "_", label).strip("_.")
        jobs = []
        for seed in seeds:
            name = f"{stem}-seed{seed}"
            last = [f"train.eval_every={train['eval_every']}", f"train.seed={seed}", f"runs={runs}", f"name={name}"]
            its = settings | {"train": train | {"seed": seed}, "runs": runs, "name": name}
            jobs.append(Job(_last_of_each([*own, *last]), its, seed))
        lines.append(Line(label, row.label, row.published, jobs))
    return lines


def _last_of_each(words: Sequence[str]) -> list[str]:
    """Without words that a later one of the same key overrules."""
    last: dict[str, str] = {}
    for word in words:
        key = word.partition("=")[0]
        last.pop(key, None)
        last[key] = word
    return list(last.values())
