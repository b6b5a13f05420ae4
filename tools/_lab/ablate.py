"""Trains a study: a table of runs that differ in one thing at a time, such as the paper's Table 1, on your own data.

python tools/lab.py ablate study=gamma
python tools/lab.py ablate study=alpha data=bccd seeds=[0,1] budget=10ep
python tools/lab.py ablate study=anchors data=coco data.root=DIR model.backbone=resnet18 train.length=5000
python tools/lab.py ablate study=mine.yaml experiment=bccd data.root=data/bccd

Words that are no settings of this command are those of tools/train.py, for every run. Every run is a tools/train.py of
its own; what is finished is not repeated, and the same command goes on after a kill. The table is written again after
every run.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from _compose import Settings, entry, typed

from _lab.jobs import finished, run_all
from _lab.speed import time_inference
from _lab.study import plan, read_study
from _lab.table import comma_separated, markdown, measure
from retina.errors import ConfigError, RetinaError
from retina.files import write_whole


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """configs/lab_ablate.yaml says what each is."""

    study: str
    seeds: list[int]
    budget: int | str | None
    cumulative: bool | None
    into: str | None
    runs: str
    output: str
    traceback: bool

    def __post_init__(self) -> None:
        good = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in self.seeds)
        if not self.seeds or not good or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: {self.seeds} is not allowed - give different whole numbers, as in [0,1,2]")
        if self.into is not None and (not Path(self.into).name or Path(self.into).name != self.into):
            raise ConfigError(f"into: {self.into} is no name of a folder - give one")


OWN = tuple(field.name for field in fields(AblateConfig))
ONE_BY_ONE = {"name": "into", "train.seed": "seeds", "overwrite": "another into"}
"""Words of tools/train.py that would make all runs one, and what to give instead."""


def main(argv: Sequence[str], command: str = "ablate") -> int:
    keys = [word.lstrip("+~").partition("=")[0] for word in argv]
    own = [word for word, key in zip(argv, keys, strict=True) if key in OWN or word.startswith("-")]
    words = [word for word, key in zip(argv, keys, strict=True) if key not in OWN and not word.startswith("-")]

    @entry("lab_ablate")
    def task(settings: Settings) -> int:
        config = typed(AblateConfig, settings)
        for key in ONE_BY_ONE:
            if key in keys:
                raise ConfigError(f"{key}: is different in every run - give {ONE_BY_ONE[key]}=...")
        return ablate(config, words, shlex.join(["python", "tools/lab.py", command, *argv]))

    task(own)


def ablate(config: AblateConfig, words: Sequence[str], command: str) -> int:
    name, study = read_study(config.study)
    cumulative = study.cumulative if config.cumulative is None else config.cumulative
    budget = None if config.budget is None else str(config.budget)
    name, lines = plan(
        name, study, words, config.seeds, budget=budget, cumulative=cumulative, runs=config.runs, into=config.into
    )
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    faults: dict[Path, str] = {}

    def write(speed: dict[str, float]) -> None:
        measured = [measure([job for job in line.jobs if finished(job)]) for line in lines]
        text = markdown(name, study, lines, measured, seeds=config.seeds, command=command, faults=faults, speed=speed)
        write_whole(output / f"{name}.md", text.encode())
        write_whole(output / f"{name}.csv", comma_separated(lines, measured, speed=speed).encode())

    # seed by seed, so that a table of all rows is there early
    jobs = [line.jobs[i] for i in range(len(config.seeds)) for line in lines if line.jobs]
    run_all(jobs, faults, lambda: write({}))
    write(time_inference(lines) if study.speed else {})
    print(f"written: {output}/{name}.md, {name}.csv")
    if faults:
        folder, fault = next(iter(faults.items()))
        raise RetinaError(f"{len(faults)} of {len(jobs)} runs failed, as {folder.name} did: {fault}")
    return 0
