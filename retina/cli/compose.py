"""From the command line to settings and jobs: the only place, with sweep.py beside it, that knows Hydra.

`entry` turns a function of settings into a program that takes all of Hydra's overrides and flags. Faults that a user
can mend end in one line on stderr and exit code 2; `traceback=true` shows the traceback as well. Run folders, resume
and exit codes are the programs' own: Hydra writes nothing unless it is asked to (see QUIET). Programs that start
training runs of their own, such as the lab, use `launch` of retina/cli/sweep.py.
"""

import argparse
import functools
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import hydra
import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retina.cli.config_files import Interpolations
from retina.cli.data import DataConfig
from retina.cli.signals import StopRequest
from retina.cli.words import as_typed, read_mapping, text_keys, unconverted, unknown, unreadable
from retina.data.checks import DataReport, RecordsError
from retina.engine.config import TrainConfig, from_mapping
from retina.errors import ConfigError, DataError, RetinaError
from retina.evaluation.metrics import Scoring
from retina.files import advice
from retina.printing import quiet_end, say

PACKAGED = Path(__file__).parents[1] / "configs"
CONFIGS = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"
"""Within an installed package, else at the top of the repository."""
Settings = dict[str, Any]
T = TypeVar("T")

# what train.yaml and the files of data/ name in their `defaults`: so the classes alone say these values
ConfigStore.instance().store("_train", {"train": asdict(TrainConfig()), "eval": asdict(Scoring())})
ConfigStore.instance().store("_defaults", asdict(DataConfig(name=MISSING)), group="data")

QUIET = (
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.subdir=.",
)
"""Hydra's own settings, before the words of the user, which win: the programs write the logs and the folders."""


class Result(NamedTuple):
    """What a task may return instead of an exit code."""

    code: int = 0
    metric: float | None = None
    """What a sweep compares its jobs by."""


@dataclass(frozen=True)
class Program:
    """A command: what it does, and with which settings. Called, it runs the words of a command line and ends Python."""

    task: Callable[..., int | Result | None]
    config_name: str
    schema: type | None
    """A dataclass that the settings are made into before the task gets them."""
    default: Callable[[list[str]], list[str]]
    """From the words typed to those that are added before them."""
    check: Callable[[Settings], None]
    """Raises ConfigError for settings that the task would refuse, whatever the data."""

    @functools.cached_property
    def texts(self) -> frozenset[str]:
        """Keys whose values are taken as they are typed, beside retina.cli.words.TEXTS."""
        return frozenset(text_keys(self.schema) if self.schema else ())

    def run(self, settings: Settings) -> Result:
        value = self.task(from_mapping(self.schema, settings) if self.schema else settings)
        return value if isinstance(value, Result) else Result(value or 0)

    def refuse_wrong(self, settings: Settings) -> None:
        """Raises ConfigError for settings that `run` would refuse, whatever the data."""
        if self.schema:
            from_mapping(self.schema, settings)
        self.check(settings)

    def __call__(self, argv: Sequence[str] | None = None) -> NoReturn:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; ours do
        with _process_kept(quits_for_good=argv is None), quiet_end():
            sys.exit(_run(self, argv))


def entry(
    config_name: str,
    schema: type | None = None,
    *,
    default: Callable[[list[str]], list[str]] = lambda typed: [],
    check: Callable[[Settings], None] = lambda settings: None,
) -> Callable[[Callable[..., int | Result | None]], Program]:
    """Decorator: `task(settings)` under `configs/<config_name>.yaml` and the command line's overrides. See Program."""
    return functools.partial(Program, config_name=config_name, schema=schema, default=default, check=check)


def _run(program: Program, argv: Sequence[str] | None) -> int:
    """The exit code."""
    arguments = _parser(program).parse_intermixed_args(argv)
    settings: Settings = {}
    try:
        code = _dispatch(program, arguments, settings)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of what others print
        raise
    except (RetinaError, OSError) as fault:
        if settings.get("traceback"):
            traceback.print_exc()
        root = settings.get("data", {}).get("root") if isinstance(fault, DataError) else None
        report(unconverted(root) or fault if root else fault)
        return 2


def _parser(program: Program) -> argparse.ArgumentParser:
    """Hydra's flags. Ends Python in one line for a flag that does not exist."""
    parser = argparse.ArgumentParser(
        description=sys.modules[program.task.__module__].__doc__,
        epilog=f"Settings and what they mean: configs/{program.config_name}.yaml and the folders beside it. "
        "Hydra's own flags, launchers and sweepers work too: --hydra-help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _unknown_flag  # type: ignore[method-assign]
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="settings to change, in Hydra's syntax")
    add("-c", "--cfg", choices=["job", "hydra", "all"], help="print the settings and do nothing")
    add("--resolve", action="store_true", help="with --cfg: follow ${references}")
    add("-p", "--package", help="with --cfg: only this section")
    add("-m", "--multirun", action="store_true", help="run once for each of key=value1,value2")
    add("-cd", "--config-dir", help="a folder of your own configs, laid out like ours")
    add("-cn", "--config-name", help="a config of your own instead of ours")
    add("-cp", "--config-path", help="a folder of configs instead of ours")
    add("-i", "--info", nargs="?", const="all", help="print what Hydra knows: all, defaults, searchpath, plugins, ...")
    add("-sc", "--shell-completion", action="store_true", help="with install=bash: complete keys in the shell")
    add("--hydra-help", action="store_true", help="Hydra's own help")
    return parser


def _unknown_flag(message: str) -> NoReturn:
    say(f"error: {message} - see --help", error=True)
    sys.exit(2)


@contextmanager
def _process_kept(*, quits_for_good: bool) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM end the process at once, with status 128 + n, also where it waits for other
    processes. After it the signal handlers are as they were, unless `quits_for_good`, while Python shuts down; and so
    is the root logger, which Hydra's `--info` lets print everything. Outside the main thread, which alone may set
    handlers, signals are left alone."""
    root = logging.getLogger()
    log_handlers, level = list(root.handlers), root.level
    request = StopRequest(quits=lambda: True) if threading.current_thread() is threading.main_thread() else None
    if request:
        request.__enter__()
    try:
        yield
    finally:
        root.handlers[:] = log_handlers
        root.setLevel(level)
        if request and not quits_for_good:
            request.__exit__(None, None, None)


def _dispatch(program: Program, arguments: argparse.Namespace, settings: Settings) -> int:
    """Does what the command line asks for. `settings` gets those of the job, for those who handle its faults."""
    name = arguments.config_name or program.config_name
    sweep = arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides
    added = [] if arguments.config_name else program.default(arguments.overrides)
    words = [*added, *(as_typed(word, program.texts, sweep=sweep) for word in arguments.overrides)]
    with app(arguments.config_dir, arguments.config_path) as engine:
        if sweep:
            from retina.cli.sweep import run_sweep

            return run_sweep(engine, program, name, words)
        if not (arguments.cfg or arguments.info or arguments.shell_completion or arguments.hydra_help):
            return _run_one(engine, program, name, words, added, settings)
        with one_line(name, words):
            if arguments.cfg:
                engine.show_cfg(name, words, arguments.cfg, arguments.package, arguments.resolve)
            elif arguments.info:
                engine.show_info(arguments.info, config_name=name, overrides=words)
            elif arguments.shell_completion:
                engine.shell_completion(config_name=name, overrides=arguments.overrides)
            else:
                engine.hydra_help(config_name=name, args_parser=get_args_parser(), args=arguments)
    return 0


def _run_one(engine: Hydra, program: Program, name: str, words: list[str], added: list[str], settings: Settings) -> int:
    outcome: list[Any] = []

    def job(config: DictConfig) -> None:
        try:
            settings.update(settings_of(config, program.config_name))
            if added and os.environ.get("RANK", "0") == "0":
                say(f"{' '.join(added)}, because the command names no experiment=...")
            outcome.append(program.run(settings))
        except Exception as fault:  # Hydra would write a line of its own
            outcome.append(fault)

    with one_line(name, words):
        engine.run(name, job, [*QUIET, *words, "hydra.mode=RUN"])
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return int(outcome[0].code)


@contextmanager
def app(config_dir: str | None = None, config_path: str | None = None) -> Iterator[Hydra]:
    """Hydra with our configs, or those in `config_path` instead, and before them those in `config_dir`."""
    for folder in filter(None, (config_dir, config_path)):
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder}: no such folder - correct --config-dir", code="no-config-dir")
    search_path = create_config_search_path(str(Path(config_path or CONFIGS).resolve()))
    if config_dir:
        source = f"file://{Path(config_dir).resolve()}"
        search_path.prepend("command-line", source, anchor=SearchPathQuery(provider="schema"))
    current = GlobalHydra.instance()
    outer = current.hydra  # of a job that composes settings itself
    current.clear()
    hydra.version.setbase("1.3")
    Interpolations.spent = 0
    try:
        yield Hydra.create_main_hydra2("retina", search_path)
    finally:
        current.hydra = outer


def compose(config_name: str, overrides: Sequence[str]) -> Settings:
    """Resolved settings as plain dicts. Raises ConfigError naming the key at fault and the nearest that exists."""
    words = [as_typed(word) for word in overrides]
    with app(), one_line(config_name, words):
        return settings_of(hydra.compose(config_name, words), config_name)


def default_settings() -> Settings:
    """Within a job: its settings if its command had chosen the same groups and given no value."""
    if not (HydraConfig.initialized() and GlobalHydra.instance().is_initialized()):
        return {}  # a launcher has taken the job to another process
    job = HydraConfig.get()
    groups = [f"{group}={name or 'null'}" for group, name in job.runtime.choices.items() if "/" not in str(group)]
    return settings_of(hydra.compose(job.job.config_name, groups), "train")


def settings_of(config: DictConfig, config_name: str) -> Settings:
    """The job's own settings, resolved. Raises ConfigError for missing ones and for unknown keys at the top."""
    Interpolations.spent = 0
    try:
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        missing = sorted(OmegaConf.missing_keys(config))
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as fault:
        raise _wrong_value(fault) from None
    if missing:
        raise ConfigError("; ".join(f"{key}: missing - give {key}=..." for key in missing), code="missing-setting")
    assert isinstance(values, dict)
    settings = {str(key): value for key, value in values.items()}
    known = _top_keys(config_name)
    for key in settings:
        if key not in known:
            raise unknown(key, "", known)
    if isinstance(settings.get("remap"), str):
        settings["remap"] = read_mapping(settings["remap"])
    return settings


@functools.cache
def _top_keys(config_name: str) -> list[str]:
    """The sections and settings that a command has, from its YAML file."""
    content = yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text(encoding="utf-8"))
    keys = [key for key in content if key != "defaults"]
    for default in content.get("defaults", []):
        keys += default if isinstance(default, dict) else [] if default.startswith("_") else _top_keys(default)
    return keys


def typed_keys() -> frozenset[str]:
    """Keys that the command of the running job gives; a group stands for all of its section, except `data`, which says
    where things lie, and `model`, which stands for what its own file says: `model=tood` is a head, no ResNet-50."""
    if not HydraConfig.initialized():
        return frozenset()
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    keys = {override.key_or_group for override in overrides} - {"data", "experiment"}
    if "model" in keys and GlobalHydra.instance().is_initialized():
        name = HydraConfig.get().runtime.choices["model"]
        file = GlobalHydra.instance().config_loader().repository.load_config(f"model/{name}")  # type: ignore[attr-defined]
        if file is not None:
            keys = (keys - {"model"}) | {f"model.{key}" for key in file.config}
    return frozenset(keys)


def values_of(word: str) -> list[str]:
    """The word once for each of the values that it lists, as in `key=1,2,3`."""
    with one_line("train", [word]):
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override():
            return [word]
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def report(fault: Exception) -> None:
    """One line on stderr; of many faulty records the first, and other things there are to tell, on stdout."""
    if isinstance(fault, OSError):
        where = fault.filename or "file system"
        say(f"error: {where}: {fault.strerror or fault} - {advice(fault)}", error=True)
        return
    faults = fault.faults if isinstance(fault, RecordsError) else []
    lines = DataReport(faults=faults).lines() if len(faults) > 1 else []
    say(*lines, *getattr(fault, "__notes__", ()), goes_on=True)
    code = f"[{fault.code}]" if isinstance(fault, RetinaError) and fault.code else ""
    say(f"error{code}: {fault}", error=True)


@contextmanager
def one_line(config_name: str, words: Sequence[str]) -> Iterator[None]:
    """Turns what Hydra says against the words or a YAML file into a ConfigError of one line."""
    try:
        yield
    except MissingConfigException as fault:
        group, _, option = str(fault.missing_cfg_file or "").replace("\\", "/").rpartition("/")
        options = [name for name in GlobalHydra.instance().config_loader().get_group_options(group) if name[0] != "_"]
        line = f"{group or '--config-name'}={option}: no such option - choose one of {', '.join(options)}"
        raise ConfigError(line, code="no-such-option") from None
    except OverrideParseException as fault:
        raise unreadable(fault.override, config_name) from None
    except HydraException as fault:
        raise _explain(fault, config_name, words) from None
    except OmegaConfBaseException as fault:
        raise _wrong_value(fault) from None
    except (yaml.YAMLError, ValueError, TypeError, AssertionError, RecursionError) as fault:  # tags of objects, say
        reason = " ".join(str(fault).split()) or "a list of defaults names no group"
        raise ConfigError(f"settings: {reason} - correct that override or YAML file", code="wrong-value") from None


def _wrong_value(fault: OmegaConfBaseException) -> ConfigError:
    line = f"{fault.full_key or 'settings'}: {_first_line(fault)} - correct this setting"
    return ConfigError(line, code="wrong-value")


def _first_line(fault: Exception) -> str:
    """What it says, or without words what it is."""
    return next(filter(None, str(fault).splitlines()), type(fault.__cause__ or fault).__name__)


def _explain(fault: HydraException, config_name: str, words: Sequence[str]) -> ConfigError:
    """Hydra's complaint as one line; of an unknown key, with the nearest that exists under the groups chosen."""
    text = str(fault)
    if ambiguous := re.search(r"Ambiguous value for argument '(.+)'", text):
        line = f"{ambiguous[1]}: several values - add -m to run them all, or write key=[1,2] or 'key=\"a,b\"'"
        return ConfigError(line, code="several-values")
    if present := re.search(r"An item is already at '([^']+)'", text):
        return ConfigError("exists already - leave out the +", code="exists", key=present[1])
    named = re.search(r"(?:Could not override|Could not delete from config\.|Could not delete) '([^']+)'", text)
    if not named:
        return ConfigError(f"{_first_line(fault)} - see configs/{config_name}.yaml", code="wrong-value")
    key = named[1].split("@")[0]
    groups = GlobalHydra.instance().config_loader().list_groups("")
    chosen = [word for word in words if word.partition("=")[0] in groups and word.partition("=")[0] != key]
    try:
        values = OmegaConf.to_container(hydra.compose(config_name, chosen), resolve=False)
    except (HydraException, OmegaConfBaseException):
        values = {}
    known = [*_keys(values), *groups]
    if key in known and (inside := re.search(r"full_key: (\S+)", str(fault.__cause__))):  # as in train={lenght: 3}
        key = inside[1]
    value = next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), "")
    takes_more = f"{key.rpartition('.')[0]}._target_" in known
    more = f" An argument that is not listed: +{key}=..." if takes_more else ""
    return unknown(key, value, known, more=more)


def _keys(values: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in values.items() if isinstance(values, dict) else ():
        keys += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return keys
