"""Trains a study: a table of runs that differ in one thing at a time, such as the paper's Table 1, on your own data.

python tools/lab.py ablate study=gamma
python tools/lab.py ablate study=alpha data=bccd seeds=[0,1] budget=10ep
python tools/lab.py ablate study=anchors data=coco data.root=DIR model.backbone=resnet18 train.length=5000
python tools/lab.py ablate study=mine.yaml experiment=bccd data.root=data/bccd

Words that are no settings of this command are those of tools/train.py, for every run. Every run is a tools/train.py of
its own; what is finished is not repeated, and the same command goes on after a kill. The table is written again after
every run.
"""

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from retina.cli.compose import Settings, entry, typed
from retina.errors import ConfigError, RetinaError
from retina.files import write_whole
from retina.lab.checks import check_lines
from retina.lab.jobs import finished, refuse_others, run_all
from retina.lab.study import backbone_run, plan, read_study
from retina.lab.table import comma_separated, markdown, measure


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
        good = all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**32 for s in self.seeds)
        if not self.seeds or not good or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: {self.seeds} is not allowed - give whole numbers of 0 or more, as in [0,1,2]")
        if self.into is not None and (not Path(self.into).name or Path(self.into).name != self.into):
            raise ConfigError(f"into: {self.into} is no name of a folder - give one")


OWN = tuple(field.name for field in fields(AblateConfig))
NOT_FOR_ALL = {
    "name": "every run has its own - give into=NAME for the study",
    "train.seed": "every run has its own - give seeds=[0,1,2]",
    "overwrite": "would train again what is finished, every time - give into=NAME for a new study",
}
"""Words of tools/train.py that make no sense for all runs, and why."""


def main(argv: Sequence[str], *, command: str = "ablate", given: Sequence[str] = ()) -> int:
    """`given` are words that `command` stands for."""
    keys = [word.lstrip("+~").partition("=")[0] for word in argv]
    own = [word for word, key in zip(argv, keys, strict=True) if key in OWN or word.startswith("-")]
    words = [word for word, key in zip(argv, keys, strict=True) if key not in OWN and not word.startswith("-")]

    @entry("lab_ablate")
    def task(settings: Settings) -> int:
        config = typed(AblateConfig, settings)
        for key, reason in NOT_FOR_ALL.items():
            if key in keys:
                raise ConfigError(f"{key}: {reason}")
        for key in keys:  # of one word, so that a slip in "seeds" is not taken for train.seed
            if near := difflib.get_close_matches(key, OWN, n=1, cutoff=0.75) if key not in OWN else []:
                raise ConfigError(f"{key}: no such key - did you mean {near[0]}?")
        return ablate(config, words, shlex.join(["python", "tools/lab.py", command, *argv]))

    task([*given, *own])


def ablate(config: AblateConfig, words: Sequence[str], command: str) -> int:
    name, study = read_study(config.study)
    cumulative = study.cumulative if config.cumulative is None else config.cumulative
    budget = None if config.budget is None else str(config.budget)
    name, lines = plan(
        name, study, words, config.seeds, budget=budget, cumulative=cumulative, runs=config.runs, into=config.into
    )
    check_lines(lines)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    refuse_to_overwrite(output / f"{name}.md", f"# {name}: ")
    refuse_to_overwrite(output / f"{name}.csv", "label,row,")
    faults: dict[Path, str] = {}

    def write(speed: dict[str, float] | None) -> None:
        measured = [measure([job for job in line.jobs if finished(job)]) for line in lines]
        text = markdown(name, study, lines, measured, seeds=config.seeds, command=command, faults=faults, speed=speed)
        write_whole(output / f"{name}.md", text.encode())
        write_whole(output / f"{name}.csv", comma_separated(lines, measured, speed=speed).encode())

    # seed by seed, so that a table of all rows is there early
    jobs = backbone_run(lines, config.runs)
    jobs += [line.jobs[i] for i in range(len(config.seeds)) for line in lines if line.jobs]
    refuse_others(jobs)
    run_all(jobs, faults, lambda: write({} if study.speed else None))
    speed = None
    if study.speed:
        from retina.lab.speed import time_inference  # loads torch

        speed = time_inference(lines)
    write(speed)
    print(f"written: {output}/{name}.md, {name}.csv")
    if faults:
        folder, fault = next(iter(faults.items()))
        raise RetinaError(f"{len(faults)} of {len(jobs)} runs failed, as {folder.name} did: {fault}")
    return 0


def refuse_to_overwrite(file: Path, begin: str) -> None:
    """Raises ConfigError for a file that is there and is no table of this study."""
    if file.is_symlink() or (file.exists() and not file.read_bytes().startswith(begin.encode())):
        raise ConfigError(f"output: {file} is there already and is no table of this study - choose another folder")
