"""From the command line to settings: the only place that knows Hydra.

`entry` turns a function of plain settings into a program with Hydra's overrides, `--cfg job`, `--help` and `-m`. Faults
a user can mend end in one line on stderr and exit code 2; `traceback=true` shows the traceback as well.
`build` makes objects from sections with a `_target_`. Both check everything before torch is loaded or data is opened.
"""

import functools
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retina.engine.config import unknown_key
from retina.errors import ConfigError, RetinaError

CONFIGS = Path(__file__).parents[1] / "configs"
ALLOWED_TARGETS = ("retina.", "torch.optim.", "albumentations.")

Settings = dict[str, Any]


def entry(config_name: str, *, default: Callable[[list[str]], list[str]] = lambda typed: []) -> Any:
    """Decorator: runs `task(settings)` under `configs/<config_name>.yaml` and the command line's overrides.

    `default` gives overrides to add to those typed. Under `-m` every job gets its own `name`: the run's, then what was swept."""

    def decorate(task: Callable[[Settings], int | None]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            arguments = get_args_parser().parse_args()
            sys.argv += default(arguments.overrides)
            overrides = arguments.overrides + default(arguments.overrides)
            try:
                if not (arguments.help or arguments.hydra_help or arguments.cfg or arguments.info):
                    compose(config_name, [o for o in overrides if not _is_sweep(o)])
            except RetinaError as fault:
                sys.exit(_report(fault))
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(run)()

        def run(config: DictConfig) -> None:
            job = HydraConfig.get()
            if job.mode == RunMode.MULTIRUN and "name" in config:
                config.name = f"{config.name}/{job.job.override_dirname or job.job.num}"
            try:
                code = task(_plain(config)) or 0
            except RetinaError as fault:
                if config.traceback:
                    traceback.print_exc()
                code = _report(fault)
            except KeyboardInterrupt:
                code = 130
            if code or job.mode != RunMode.MULTIRUN:
                sys.exit(code)

        return main

    return decorate


def compose(config_name: str, overrides: list[str]) -> Settings:
    """Resolved settings as plain dicts. Raises ConfigError, one line naming the key at fault and the nearest that exists."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return _plain(hydra.compose(config_name, overrides))
        except MissingConfigException as fault:
            choice = str(fault.missing_cfg_file or "").replace("\\", "/")
            group, _, option = choice.rpartition("/")
            options = ", ".join(o for o in fault.options or [] if not o.startswith("_"))
            raise ConfigError(f"{group}={option}: no such option - choose one of {options}") from None
        except OverrideParseException as fault:
            raise ConfigError(f"{fault.override}: cannot be understood - write key=value, quoting spaces") from None
        except HydraException as fault:
            raise ConfigError(_explain(fault, config_name, overrides)) from None
        except OmegaConfBaseException as fault:
            key = getattr(fault, "full_key", None) or "settings"
            raise ConfigError(f"{key}: {str(fault).splitlines()[0]} - correct this setting") from None


def build(section: Mapping[str, Any], key: str, **extra: Any) -> Any:
    """The object that a section's `_target_` describes, or with `_partial_: true` a callable that makes it.

    Nested sections are built first. `extra` arguments win. Raises ConfigError for a target outside ALLOWED_TARGETS and,
    all at once, for arguments it does not take or lacks."""
    values = dict(section)
    target = values.pop("_target_", None)
    partial = values.pop("_partial_", False)
    if not isinstance(target, str):
        raise ConfigError(f"{key}._target_: {target!r} - give the dotted name of a class or function")
    factory = _find(target, f"{key}._target_")
    arguments = {
        name: build(value, f"{key}.{name}") if isinstance(value, Mapping) and "_target_" in value else value
        for name, value in values.items()
    }
    check_arguments(factory, arguments | extra, key, partial=partial)
    if partial:
        return functools.partial(factory, **arguments, **extra)
    return call(factory, key, **(arguments | extra))


def call(factory: Callable[..., Any], key: str, **arguments: Any) -> Any:
    """`factory(**arguments)`, with whatever it has to say against the values as one line that names the section."""
    check_arguments(factory, arguments, key)
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as fault:  # pydantic's ValidationError is a ValueError of several lines
        reason = " ".join(line.strip() for line in str(fault).splitlines() if "errors.pydantic" not in line)
        raise ConfigError(f"{key}: {reason} - correct these values") from None


def check_arguments(factory: Callable[..., Any], arguments: Iterable[str], key: str, *, partial: bool = False) -> None:
    """Raises ConfigError listing every argument that `factory` does not take, and (unless `partial`) every one it lacks."""
    parameters = inspect.signature(factory).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    faults = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        faults += [unknown_key(f"{key}.{a}", [f"{key}.{n}" for n in names]) for a in arguments if a not in names]
    if not partial:
        faults += [f"{key}.{name}: missing - give {key}.{name}=..." for name in required if name not in arguments]
    if faults:
        raise ConfigError("; ".join(faults))


def _find(target: str, key: str) -> Callable[..., Any]:
    allowed = f"choose something under {', '.join(prefix + '*' for prefix in ALLOWED_TARGETS)}"
    if not target.startswith(ALLOWED_TARGETS):
        raise ConfigError(f"{key}: {target} is not allowed - {allowed}")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ConfigError(f"{key}: {target} does not exist - check its spelling") from None
    # a package also holds what it imported itself: only what it defines is its own
    if not callable(found) or not f"{getattr(found, '__module__', '')}.".startswith(ALLOWED_TARGETS):
        raise ConfigError(f"{key}: {target} is not allowed - {allowed}")
    return found


def _plain(config: DictConfig) -> Settings:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError("; ".join(f"{key}: missing - give {key}=..." for key in missing))
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as fault:
        key = getattr(fault, "full_key", None) or "settings"
        raise ConfigError(f"{key}: {str(fault).splitlines()[0]} - correct this setting") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _explain(fault: HydraException, config_name: str, overrides: list[str]) -> str:
    text = str(fault).splitlines()[0]
    named = re.search(
        r"(?:Could not override|Could not append to config\. An item is already at|Could not delete) '([^']+)'", text
    )
    if not named:
        return f"{text} - see configs/{config_name}.yaml"
    key = named.group(1).split("@")[0]
    groups = [path.name for path in CONFIGS.iterdir() if path.is_dir()]
    choices = [o for o in overrides if o.partition("=")[0].split("@")[0] in groups and o.partition("=")[0] != key]
    try:
        values = OmegaConf.create(dict(hydra.compose(config_name, choices)))
    except (HydraException, OmegaConfBaseException):
        values = OmegaConf.create({})
    known = _keys(OmegaConf.to_container(values, resolve=False))
    if key in known:
        return f"{key}: {text} - correct this setting"
    return unknown_key(key, [*known, *groups])


def _keys(values: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items() if isinstance(values, dict) else ():
        found += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return found


def _is_sweep(override: str) -> bool:
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False


def _report(fault: RetinaError) -> int:
    print(f"error: {fault}", file=sys.stderr)
    return 2
