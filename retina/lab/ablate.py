"""Trains a study: a table of runs that differ in one thing at a time, such as the paper's Table 1, on your own data.

python tools/lab.py ablate study=gamma
python tools/lab.py ablate study=alpha data=bccd seeds=[0,1] budget=10ep
python tools/lab.py ablate study=anchors data=coco data.root=DIR model.backbone=resnet18 train.length=5000
python tools/lab.py ablate study=mine.yaml experiment=bccd data.root=data/bccd hydra/launcher=joblib
python tools/lab.py ladder        # ablate study=ladder: from the paper's recipe to today's, one step added at a time

Words that are no settings of this command are those of tools/train.py, for every run. The runs are the jobs of one of
Hydra's launchers; what is finished is not repeated, and the same command goes on after a kill. The table is written
again after every run.
"""

import difflib
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from retina.cli import train
from retina.cli.compose import Settings, entry
from retina.cli.data import DataConfig, load_split
from retina.cli.run_folder import HARMLESS, holds_work, read_settings
from retina.cli.sweep import launch
from retina.engine.config import from_mapping
from retina.errors import ConfigError, RetinaError
from retina.files import make_folder, read_plain, write_whole
from retina.lab.study import Job, Line, backbone_run, plan, read_study
from retina.lab.table import comma_separated, markdown, measure
from retina.printing import say


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
            problem = f"{self.seeds} is not allowed - give whole numbers of 0 or more, as in [0,1,2]"
            raise ConfigError(problem, code="out-of-range", key="seeds")
        if self.into is not None and (not Path(self.into).name or Path(self.into).name != self.into):
            raise ConfigError(f"{self.into} is no name of a folder - give one", code="wrong-value", key="into")


OWN = tuple(field.name for field in fields(AblateConfig))
NOT_FOR_ALL = {
    "name": "every run has its own - give into=NAME for the study",
    "train.seed": "every run has its own - give seeds=[0,1,2]",
    "overwrite": "would train again what is finished, every time - give into=NAME for a new study",
}
"""Words of tools/train.py that make no sense for all runs, and why."""


def main(argv: Sequence[str]) -> NoReturn:
    settings_words: list[str] = []
    train_words: list[str] = []
    hydra_words: list[str] = []
    for word in argv:
        key = key_of(word)
        if key in OWN or word.startswith("-"):
            settings_words.append(word)
        elif key.startswith(("hydra/", "hydra.")) and key != "hydra.searchpath":
            hydra_words.append(word)
        else:
            train_words.append(word)

    @entry("lab_ablate")
    def task(settings: Settings) -> None:
        config = from_mapping(AblateConfig, settings)
        for key in map(key_of, train_words):
            if key in NOT_FOR_ALL:
                raise ConfigError(NOT_FOR_ALL[key], code="not-allowed", key=key)
            # of one word, so that a slip in "seeds" is not taken for train.seed
            if near := difflib.get_close_matches(key, OWN, n=1, cutoff=0.75):
                raise ConfigError(f"no such key - did you mean {near[0]}?", code="unknown-key", key=key)
        ablate(config, train_words, hydra_words, shlex.join(["python", "tools/lab.py", "ablate", *argv]))

    task(settings_words)


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def ablate(config: AblateConfig, words: Sequence[str], hydra_words: Sequence[str], command: str) -> None:
    """Trains what is not finished and writes the table. Raises RetinaError when a run failed."""
    name, study = read_study(config.study)
    cumulative = study.cumulative if config.cumulative is None else config.cumulative
    if config.budget is not None:
        words = [*words, f"train.length={config.budget}"]
    name, lines = plan(name, study, words, config.seeds, cumulative=cumulative, runs=config.runs, into=config.into)
    # seed by seed, so that a table of all rows is there early
    batches = [[line.jobs[i] for line in lines if line.jobs] for i in range(len(config.seeds))]
    batches = [backbone_run(lines, config.runs), *batches]
    check(lines)
    for job in (job for batch in batches for job in batch):
        refuse_another_run(job)
    output = Path(config.output)
    make_folder(output)
    refuse_to_overwrite(output / f"{name}.md", f"# {name}: ")
    refuse_to_overwrite(output / f"{name}.csv", "label,row,")
    faults: dict[Path, str] = {}

    def write(speed: Mapping[str, float] = {}) -> None:
        measured = measure(lines)
        text = markdown(name, study, measured, seeds=config.seeds, command=command, faults=faults, speed=speed)
        write_whole(output / f"{name}.md", text.encode())
        write_whole(output / f"{name}.csv", comma_separated(measured, speed).encode())

    train_all(batches, hydra_words, faults, write)
    if study.speed:
        from retina.lab.speed import time_inference  # loads torch

        write(time_inference(lines))
    else:
        write()
    say(f"written: {output}/{name}.md, {name}.csv")
    if faults:
        folder, fault = next(iter(faults.items()))
        problem = f"{len(faults)} of {sum(map(len, batches))} runs failed, as {folder.name} did: {fault}"
        raise RetinaError(problem, code="runs-failed")


def train_all(
    batches: Sequence[Sequence[Job]], hydra_words: Sequence[str], faults: dict[Path, str], write: Callable[[], None]
) -> None:
    """Trains what is not finished, each batch after the one before it. A run that fails goes to `faults`, by its
    folder, and the others go on. `write` is called after each run. A signal ends the run, which saves, and this
    process."""
    waiting = [[job for job in batch if not job.finished()] for batch in batches]
    jobs, left = sum(map(len, batches)), sum(map(len, waiting))
    say(f"{jobs} runs, {jobs - left} of them finished")
    started, done = time.monotonic(), 0
    for batch in filter(None, waiting):
        for job, outcome in zip(batch, launch(train.main, [job.words for job in batch], hydra_words), strict=True):
            done, left = done + 1, left - 1
            if outcome.fault:
                faults[job.folder] = outcome.fault
            write()
            rest = timedelta(seconds=round((time.monotonic() - started) / done * left))
            say(f"{job.folder.name}: {outcome.fault or 'finished'}; {left} runs left, about {rest}")


def check(lines: Sequence[Line]) -> None:
    """Raises ConfigError that names the first line whose runs cannot be made, or whose annotations are not there."""
    read: list[Settings] = []
    for line in lines:
        if all(job.finished() for job in line.jobs):
            continue
        settings = line.jobs[0].settings
        data = {key: value for key, value in settings["data"].items() if key not in ("short_side", "long_side")}
        try:
            train.check(settings)
            config = from_mapping(DataConfig, settings["data"], "data")
            if data not in read and not (config.prepare and config.root):  # else the run makes its data set itself
                load_split(config, "val", classes=load_split(config, "train").classes)
        except RetinaError as fault:
            raise ConfigError(f"{line.label}: {fault}", code=fault.code) from None
        read.append(data)


def refuse_another_run(job: Job) -> None:
    """Raises ConfigError where a run of other settings is in the place of this one."""
    file = job.folder / "config.yaml"
    if file.is_file() and holds_work(job.folder):
        grave = [one for one in job.differences(read_settings(file)) if one.key not in HARMLESS]
        if grave:
            fix = "give into=NAME for a new study, repeat its settings, or remove that folder"
            raise ConfigError(f"{job.folder}: holds another run: {grave[0]} - {fix}", code="other-run")


def refuse_to_overwrite(file: Path, begin: str) -> None:
    """Raises ConfigError for a file that is there and is no table of this study."""
    if os.path.lexists(file) and not (file.is_file() and read_plain(file).startswith(begin.encode())):
        problem = f"{file} is there already and is no table of this study - choose another folder"
        raise ConfigError(problem, code="output-taken", key="output")
