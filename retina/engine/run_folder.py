"""The folder of a run: whose it is, whether it may be continued, and what of its settings changed."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from retina.errors import ConfigError

OWN = ("config.yaml", "log.txt", "metrics.jsonl", "best.safetensors", "checkpoints", "tensorboard", "eval")
"""What a run writes, and all that `overwrite` removes."""

HARMLESS = (
    "overwrite",
    "traceback",
    "runs",
    "data.root",  # the fingerprint of the annotations is compared instead
    "data.train.annotations",
    "data.train.images",
    "data.val.annotations",
    "data.val.images",
    "data.num_workers",
    "data.eval_batch_size",
    "train.log_every",
    "train.keep_checkpoints",
    "train.pictures",
    "train.device",
    "train.patience",
    "train.save_every",
)
"""Settings that change nothing about the weights a run arrives at; they may differ when it is resumed."""


def open_run(folder: Path, config: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Makes the folder and writes `config.yaml`; returns True when a run of the same settings is already there.

    A run that failed before its first checkpoint holds nothing to lose, and other settings may take its place.
    Raises ConfigError when the folder holds another run (naming the first setting that differs) or something that is
    no run at all. `overwrite` removes what an earlier run wrote, never anything else."""
    settings = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file - choose another name=...")
    if settings.is_file() and holds_work(folder):
        if not overwrite:
            differences = compare(read_settings(settings), config)
            if differences:
                more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
                raise ConfigError(
                    f"{folder}: holds another run: {differences[0]}{more} - choose another name=..., repeat its "
                    "settings to resume it, or give overwrite=true to discard it"
                )
            return True
        for name in OWN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif folder.is_dir() and any(folder.iterdir()) and not settings.is_file():
        raise ConfigError(f"{folder}: holds files but no run - choose another name=...")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    except OSError as fault:
        raise ConfigError(f"{folder}: cannot be written ({fault.strerror}) - choose another runs=FOLDER") from None
    return False


def holds_work(folder: Path) -> bool:
    """Whether a run has got as far as a checkpoint or weights."""
    return (folder / "best.safetensors").exists() or any((folder / "checkpoints").glob("step_*"))


def read_settings(file: Path) -> dict[str, Any]:
    """A run's `config.yaml`. Raises ConfigError when it is no YAML mapping."""
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: is damaged - choose another name=..., or overwrite=true to discard that run")
    return values


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One entry per setting that matters and differs: `optimizer.lr: 0.01 there, 0.02 now`."""
    old, new = _flatten(before), _flatten(now)
    keys = [key for key in (*old, *(k for k in new if k not in old)) if key not in HARMLESS]
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} there, {new.get(key, absent)} now"
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
