"""Several jobs of one command: all are composed and checked before the first starts, each has a folder of its own,
and one that fails does not stop the others. Hydra's sweeper chooses the jobs and its launcher starts them.

Sweeps of the command line are `run_sweep`; programs that know their jobs, such as the lab, call `launch`."""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from retina.cli.compose import QUIET, Program, Settings, app, one_line, report, settings_of
from retina.cli.words import as_typed, unquoted
from retina.errors import ConfigError, RetinaError, plain
from retina.files import make_folder
from retina.printing import say


class Job(NamedTuple):
    """A job that was composed and checked."""

    words: list[str]
    settings: Settings

    @property
    def folder(self) -> str:
        """Where it writes, which no other job may have."""
        if "name" in self.settings:
            return f"{self.settings['runs']}/{self.settings['name']}"
        return str(self.settings.get("output") or self.settings.get("checkpoint") or "")


class Outcome(NamedTuple):
    """What became of a job."""

    job: Job
    metric: float | None
    """The best value of the metric that the settings name; None for a job that failed or measured nothing."""
    fault: str
    """In one line; empty for a job that finished."""


@dataclass(frozen=True)
class _Task:
    """What a launcher calls, maybe in another process."""

    program: Program
    parent: int = field(default_factory=os.getpid)

    def __call__(self, config: DictConfig) -> float | None:
        result = self.program.run(settings_of(config, self.program.config_name))
        if result.code >= 128 and os.getpid() == self.parent:  # a signal is for the whole sweep
            sys.exit(result.code)
        if result.code:
            raise RetinaError(f"ended with exit code {result.code}", code="exit-code")
        return result.metric


def run_sweep(engine: Hydra, program: Program, config_name: str, words: list[str]) -> int:
    """The exit code: 0, or 2 where a job failed. Raises ConfigError before any job has started."""
    if os.environ.get("WORLD_SIZE", "1") != "1":  # the second job would wait for its processes to meet for ever
        raise ConfigError("not under torchrun - start the runs one by one", code="sweep-under-torchrun", key="-m")
    fixed = {}
    with one_line(config_name, words):
        for word, override in zip(words, OverridesParser.create().parse_overrides(words), strict=True):
            if not override.is_sweep_override():
                fixed[override.get_key_element()] = word
        settings = hydra.compose(config_name, list(fixed.values()))
        hydra_words = [*QUIET]
        if "name" in settings:  # the sweep's own folder, beside those of its jobs
            folder = f"{settings.runs}/{settings.name}__sweep"
            make_folder(Path(folder), within=Path(settings.runs))
            Path(folder, "multirun.yaml").unlink(missing_ok=True)  # Hydra would follow a link, and wait for a pipe
            hydra_words.append(as_typed(f"hydra.sweep.dir={folder}", ["hydra.sweep.dir"]))
        if "hydra/sweeper=optuna" in words:  # which otherwise looks for the smallest metric
            hydra_words.append("hydra.sweeper.direction=maximize")
        config = engine.compose_config(config_name, [*hydra_words, *words, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    callbacks = Callbacks(config)
    context = HydraContext(config_loader=engine.config_loader, callbacks=callbacks)
    callbacks.on_multirun_start(config=config, config_name=config_name)
    sweeper: Any = Plugins.instance().instantiate_sweeper(
        config=config, hydra_context=context, task_function=_Task(program)
    )
    outcomes: list[Outcome] = []
    grid = _is_basic(config.hydra.sweeper)

    def launch_checked(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """All at once or, with Hydra's own launcher, one by one, so that each is reported when it ends."""
        with one_line(config_name, words):
            jobs = [_compose_job(engine, config, program, overrides, fixed) for overrides in job_overrides]
        if grid:
            _refuse_shared([job.folder for job in jobs])
        returns = []
        for job, job_return in _launch(config, start, jobs, initial_job_idx):
            outcomes.append(_outcome(job, job_return))
            if grid:  # which would stop here; other sweepers want to know
                job_return.status = JobStatus.COMPLETED
            returns.append(job_return)
        return returns

    launcher = getattr(sweeper, "sweeper", sweeper).launcher  # plugins hold an inner sweeper that does the work
    start, launcher.launch = launcher.launch, launch_checked
    try:
        with one_line(config_name, words):
            sweeper.sweep(list(config.hydra.overrides.task))
    except Exception:  # with which some sweepers end over a failed job, which has been reported
        if not any(outcome.fault for outcome in outcomes):
            raise
    finally:
        say(*_table(outcomes))
    callbacks.on_multirun_end(config=config, config_name=config_name)
    return 2 if any(outcome.fault for outcome in outcomes) else 0


def _is_basic(section: DictConfig) -> bool:
    """Whether a sweeper or launcher is Hydra's own."""
    return str(section._target_).startswith("hydra._internal.core_plugins.basic_")


def _compose_job(
    engine: Hydra, config: DictConfig, program: Program, overrides: Sequence[str], fixed: dict[str, str]
) -> Job:
    """Raises ConfigError for settings that the command would refuse."""
    words = [fixed.get(word.partition("=")[0], word) for word in overrides]  # some sweepers drop the quotes
    swept = [word for word in words if word not in fixed.values()]
    job = _job(engine, config, program, words)
    settings = job.settings
    suffix = folder_suffix([word for word in swept if not word.startswith(("name=", "runs=", "output="))])
    key = "name" if "name" in settings else "output"
    if suffix and (key == "name" or (settings.get("output") and "." not in str(settings["output"]))):
        settings[key] = f"{settings[key]}__{suffix}"
        words.append(as_typed(f"{key}={settings[key]}", [key]))
    try:
        program.refuse_wrong(settings)
    except RetinaError as fault:
        fault.add_note(f"in the job {' '.join(swept)}")
        raise
    return job


def _job(engine: Hydra, config: DictConfig, program: Program, words: list[str]) -> Job:
    return Job(words, settings_of(engine.config_loader.load_sweep_config(config, words), program.config_name))


def folder_suffix(words: Sequence[str]) -> str:
    """A folder's name for what was swept, which says the values and is the same for the same words only.

    Letters and digits of all scripts and `._+-` are kept; where anything else is replaced, or the name is long, a hash
    of the words follows."""
    pairs = [(key.lstrip("+"), unquoted(value)) for key, _, value in (word.partition("=") for word in words)]
    text = "__".join(f"{key}-{value}" for key, value in pairs)
    name = "".join(c if c.isalnum() or c in "._+-" else "_" for c in text)
    if name != text.casefold() or len(os.fsencode(name)) > 120 or any("__" in value for _, value in pairs):
        short = os.fsencode(name)[:120].decode(errors="ignore")
        name = f"{short}-{hashlib.sha256(repr(pairs).encode()).hexdigest()[:8]}"
    return name


def _refuse_shared(folders: Sequence[str]) -> None:
    """Raises ConfigError for two jobs that would write to one folder."""
    names = [folder.casefold() for folder in folders]
    if twice := [folder for folder, name in zip(folders, names, strict=True) if folder and names.count(name) > 1]:
        fix = "list every value once, and give each job an output of its own"
        raise ConfigError(f"{twice[0]}: two jobs of this sweep would write there - {fix}", code="shared-folder")


def _launch(
    config: DictConfig, start: Callable[..., Sequence[JobReturn]], jobs: Sequence[Job], first: int
) -> Iterator[tuple[Job, JobReturn]]:
    batches = [[job] for job in jobs] if _is_basic(config.hydra.launcher) else [list(jobs)]
    for batch in batches:
        returns = start([job.words for job in batch], initial_job_idx=first)
        yield from zip(batch, returns, strict=True)
        first += len(batch)


def _outcome(job: Job, job_return: JobReturn) -> Outcome:
    if job_return.status is JobStatus.COMPLETED:
        return Outcome(job, job_return.return_value, "")
    fault = job_return._return_value  # its property writes a line of its own
    if isinstance(fault, BrokenPipeError):
        raise fault
    if not isinstance(fault, RetinaError | OSError) or job.settings.get("traceback"):
        traceback.print_exception(fault)
    if isinstance(fault, RetinaError | OSError):
        report(fault)
    line = str(fault) if isinstance(fault, RetinaError) else f"{type(fault).__name__}: {fault}"
    fault.__traceback__ = fault.__context__ = fault.__cause__ = None  # which would keep the model in memory
    return Outcome(job, None, plain(line.splitlines()[0]))


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    failed = sum(bool(outcome.fault) for outcome in outcomes)
    lines = [f"{len(outcomes)} jobs, {failed} failed:"] if outcomes else []
    for job, metric, fault in outcomes:
        name = job.settings.get("train", {}).get("best_metric", "")
        value = "" if metric is None else f"{name} {metric:.3f}"
        lines.append(plain(f"  {'failed' if fault else 'finished':<9} {value:<10} {job.folder}{fault and ': '}{fault}"))
    return lines


def launch(program: Program, jobs: Sequence[Sequence[str]], hydra_words: Sequence[str] = ()) -> Iterator[Outcome]:
    """Runs jobs, each given by its words, with the launcher that `hydra_words` choose; one that fails stops no other.

    With Hydra's own launcher every outcome comes when the job has ended, with others when all have. A signal ends the
    job, which saves, and this process. Raises ConfigError before the first job for one that cannot be composed."""
    hydra_words = [*QUIET, "hydra.sweep.dir=.", *hydra_words, "hydra.mode=MULTIRUN"]
    with app() as engine:
        with one_line(program.config_name, hydra_words):
            config = engine.compose_config(program.config_name, hydra_words, RunMode.MULTIRUN)
        composed = []
        for words in jobs:
            typed = [as_typed(word, program.texts) for word in words]
            with one_line(program.config_name, typed):
                composed.append(_job(engine, config, program, typed))
        _refuse_shared([job.folder for job in composed])
        context = HydraContext(config_loader=engine.config_loader, callbacks=Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=_Task(program), config=config
        )
        for job, job_return in _launch(config, launcher.launch, composed, 0):
            yield _outcome(job, job_return)
