"""From the command line to settings: the only place that knows Hydra.

`entry` turns a function of plain settings into a program with Hydra's overrides, `--cfg job` and `-m`. Faults a user
can mend end in one line on stderr and exit code 2; `traceback=true` shows the traceback as well.
Hydra composes; it neither starts the jobs nor writes a file, so run folders and exit codes are the tools' own.
"""

import argparse
import functools
import itertools
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retina.data.checks import DataReport, RecordsError
from retina.engine.config import from_mapping, unknown_key
from retina.engine.signals import SIGNALS, quit_at_once
from retina.errors import ConfigError, RetinaError, plain

PACKAGED = Path(__file__).parents[1] / "configs"
CONFIGS = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"
"""Within an installed package, else at the top of the repository."""
Settings = dict[str, Any]
T = TypeVar("T")


def entry(
    config_name: str, *, default: Callable[[list[str]], list[str]] = lambda typed: []
) -> Callable[[Callable[[Settings], int | None]], Callable[..., NoReturn]]:
    """Decorator: runs `task(settings)` under `configs/<config_name>.yaml` and the command line's overrides.

    `default` gives overrides to add to those typed. With `-m` every combination of the listed values runs, one after
    another and all checked first; each gets a `name` of its own, the run's and then what was swept."""

    def decorate(task: Callable[[Settings], int | None]) -> Callable[..., NoReturn]:
        @functools.wraps(task)
        def main(argv: Sequence[str] | None = None) -> NoReturn:
            warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; ours do
            with _quitting(for_good=argv is None):
                sys.exit(_run(task, config_name, default, argv))

        return main

    return decorate


def _run(
    task: Callable[[Settings], int | None],
    config_name: str,
    default: Callable[[list[str]], list[str]],
    argv: Sequence[str] | None,
) -> int:
    """The exit code."""
    arguments = _parser(task, config_name).parse_intermixed_args(argv)
    words = [*default(arguments.overrides), *arguments.overrides]
    settings: Settings = {}
    try:
        if arguments.cfg:
            _print(_config(config_name, words), resolve=arguments.resolve)
            return 0
        for settings in sweep(config_name, words) if arguments.multirun else [compose(config_name, words)]:
            if code := task(settings):
                return code
    except (RetinaError, OSError) as fault:
        if settings.get("traceback"):
            traceback.print_exc()
        _report(fault)
        return 2
    return 0


@contextmanager
def _quitting(*, for_good: bool) -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once, with status 128 + n; `for_good` also after the block, while Python
    shuts down. Does nothing outside the main thread, which alone may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, lambda number, _: quit_at_once(number)) for number in SIGNALS}
    try:
        yield
    finally:
        if not for_good:
            for number, handler in previous.items():
                signal.signal(number, handler)


def compose(config_name: str, overrides: Sequence[str]) -> Settings:
    """Resolved settings as plain dicts. Raises ConfigError naming the key at fault and the nearest that exists."""
    config = _config(config_name, overrides)
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as fault:
        raise _wrong_value(fault) from None
    if missing:
        raise ConfigError("; ".join(f"{key}: missing - give {key}=..." for key in missing))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _print(config: DictConfig, *, resolve: bool) -> None:
    try:
        print(OmegaConf.to_yaml(config, resolve=resolve), end="")
    except OmegaConfBaseException as fault:
        raise _wrong_value(fault) from None


def sweep(config_name: str, overrides: Sequence[str]) -> list[Settings]:
    """One `compose` for every combination of the values listed in overrides such as `optimizer.lr=0.1,0.2`."""
    if os.environ.get("WORLD_SIZE", "1") != "1":  # the second job would wait for its processes to meet for ever
        raise ConfigError("-m: not under torchrun - start the runs one by one")
    choices = [values_of(word) for word in overrides]
    swept = [position for position, words in enumerate(choices) if len(words) > 1]
    jobs = []
    for words in itertools.product(*choices):
        settings = compose(config_name, words)
        told = ",".join(words[i].lstrip("+") for i in swept if not words[i].startswith(("name=", "runs=")))
        if told and "name" in settings:
            settings["name"] = f"{settings['name']}__{re.sub(r'[^a-zA-Z0-9.,=+_-]+', '_', told)}"
        jobs.append(settings)
    return jobs


def typed(cls: type[T], settings: Mapping[str, Any]) -> T:
    """The settings of a whole command as a dataclass. Raises ConfigError for a wrong type."""
    try:
        return from_mapping(cls, settings, "")
    except ConfigError as fault:
        raise ConfigError(str(fault).removeprefix(".")) from None


def _report(fault: RetinaError | OSError) -> None:
    """One line on stderr; of many faulty records the first, and other things there are to tell, on stdout."""
    if isinstance(fault, OSError):
        where = fault.filename or "file system"
        print(plain(f"error: {where}: {fault.strerror or fault} - make room or correct the path"), file=sys.stderr)
        return
    faults = fault.faults if isinstance(fault, RecordsError) else []
    for line in DataReport(faults=faults).lines() if len(faults) > 1 else []:
        print(line)
    for note in getattr(fault, "__notes__", ()):
        print(plain(note))
    code = f"[{fault.code}]" if fault.code else ""
    print(f"error{code}: {plain(str(fault))}", file=sys.stderr)


def _parser(task: Callable[..., Any], config_name: str) -> argparse.ArgumentParser:
    class OneLineParser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"error: {message} - see --help\n")

    parser = OneLineParser(
        description=sys.modules[task.__module__].__doc__,
        epilog=f"Settings and what they mean: configs/{config_name}.yaml and the folders beside it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, in Hydra's syntax")
    parser.add_argument("--cfg", choices=["job"], help="print the settings and do nothing")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: follow ${references}")
    parser.add_argument("-m", "--multirun", action="store_true", help="run once for each of key=value1,value2")
    return parser


def _config(config_name: str, overrides: Sequence[str]) -> DictConfig:
    for word in overrides:
        if word.lstrip("+~").startswith(("hydra.", "hydra/")) and not word.startswith("hydra.searchpath="):
            raise ConfigError(f"{word}: has no effect here - leave it out: Hydra only composes the settings")
    # remap is empty, and Hydra gives an empty mapping no new keys unasked
    overrides = [f"++{word}" if word.startswith(("remap=", "remap.")) else word for word in overrides]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return hydra.compose(config_name, list(overrides))
        except MissingConfigException as fault:
            group, _, option = str(fault.missing_cfg_file or "").replace("\\", "/").rpartition("/")
            options = sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))
            raise ConfigError(f"{group}={option}: no such option - choose one of {', '.join(options)}") from None
        except OverrideParseException as fault:
            raise _unreadable(fault) from None
        except HydraException as fault:
            raise ConfigError(_explain(fault, config_name, overrides)) from None
        except OmegaConfBaseException as fault:
            raise _wrong_value(fault) from None
        except (yaml.YAMLError, ValueError, RecursionError) as fault:  # such as tags that would make objects
            reason = " ".join(str(fault).split())
            raise ConfigError(f"settings: {reason} - correct that override or YAML file") from None


def values_of(word: str) -> list[str]:
    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override():
            return [word]
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except OverrideParseException as fault:
        raise _unreadable(fault) from None
    except HydraException as fault:
        raise ConfigError(f"{word}: {str(fault).splitlines()[0]} - list the values, as in key=1,2,3") from None


def _unreadable(fault: OverrideParseException) -> ConfigError:
    return ConfigError(f"{fault.override}: cannot be understood - write key=value, with quotes as in 'key=\"a, b\"'")


def _wrong_value(fault: OmegaConfBaseException) -> ConfigError:
    return ConfigError(f"{fault.full_key or 'settings'}: {str(fault).splitlines()[0]} - correct this setting")


def _explain(fault: HydraException, config_name: str, overrides: Sequence[str]) -> str:
    """Hydra's complaint as one line; of an unknown key, with the nearest that exists under the groups chosen."""
    text = str(fault)
    if ambiguous := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{ambiguous[1]}: several values - add -m to run them all, or write key=[1,2] or 'key=\"a,b\"'"
    if present := re.search(r"An item is already at '([^']+)'", text):
        return f"{present[1]}: exists already - leave out the +"
    named = re.search(r"(?:Could not override|Could not delete from config\.|Could not delete) '([^']+)'", text)
    if not named:
        return f"{text.splitlines()[0]} - see configs/{config_name}.yaml"
    key = named[1].split("@")[0]
    groups = [path.name for path in CONFIGS.iterdir() if path.is_dir()]
    chosen = [word for word in overrides if word.partition("=")[0] in groups and word.partition("=")[0] != key]
    try:
        values = OmegaConf.to_container(hydra.compose(config_name, chosen), resolve=False)
    except (HydraException, OmegaConfBaseException):
        values = {}
    known = [*_keys(values), *groups]
    if key in known and (inside := re.search(r"full_key: (\S+)", str(fault.__cause__))):  # as in train={lenght: 3}
        key = inside[1]
    fault_and_fix = unknown_key(key, known)
    takes_more = f"{key.rpartition('.')[0]}._target_" in known
    return f"{fault_and_fix} An argument that is not listed: +{key}=..." if takes_more else fault_and_fix


def _keys(values: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items() if isinstance(values, dict) else ():
        found += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return found
