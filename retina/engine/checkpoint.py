"""Checkpoints of a run: tensors as safetensors, numbers as JSON, a manifest of hashes, one rename.

    checkpoints/step_00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors  state.json  MANIFEST.sha256
        best.safetensors    only if the run's own could not be written: what is owed survives the process

A checkpoint is valid only if it is exactly what its manifest says; resume takes the newest valid one. Nothing in it is
code, and nothing is unpickled. Other names in the folder are left by a kill, and swept:

    .step_00001000.tmp     being written
    .step_00001000.aside   just replaced by another of the same step; put back if that did not come to be
    .step_00001000.old     being removed
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from retina.engine.config import from_mapping
from retina.engine.meter import NUM_SUMS
from retina.engine.optim import ExponentialMovingAverage
from retina.errors import CheckpointError, ConfigError, check
from retina.files import make_folder, open_plain, remove, sync_folder, write_synced
from retina.model.header import LAST_STEP
from retina.model.weights import first_non_finite, load_state, serialize
from retina.schema import check_type, parse_json

SCHEMA_VERSION = 1
BEST = "best.safetensors"


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: plain numbers. The order of samples, the augmentation, the learning rate and the random state
    are all functions of the seed and the step, so none of them is stored."""

    step: int = 0
    """Optimizer steps done."""
    best: float | None = None
    """Best value so far of the metric that names the best checkpoint."""
    best_step: int = 0
    evaluated: int = 0
    """Step of the last evaluation that was finished."""
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    bad_steps: int = 0
    """Updates skipped in a row, up to now, for numbers that were not finite."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the fp16 gradient scaler."""
    meter: list[float] = field(default_factory=list)
    """Sums since the last logged line."""
    annotations: str = ""
    """Fingerprint of the training annotations."""
    total: int | None = None
    seconds: float = 0.0
    """Of a run with a deadline: its steps in all, and the time that it has taken."""
    schema_version: int = SCHEMA_VERSION


def save_checkpoint(
    folder: Path,
    progress: Progress,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    ema: ExponentialMovingAverage | None,
    keep: int,
    best: bytes | None = None,
) -> Path:
    """Writes `folder/step_XXXXXXXX`, verifies it, and only then removes all but the newest `keep`.

    best: the content of the run's `best.safetensors` if it could not be written there.

    Raises OSError when the disk is full or fails, CheckpointError for values that are not finite and for a disk that
    gives back other bytes. Then the earlier checkpoints are as they were, and nothing of this one is left."""
    final = folder / _name(progress.step)
    tensors, numbers = _flatten_optimizer(optimizer)
    states = {"model": model.state_dict(), "optimizer": tensors}
    if ema is not None:
        states["ema"] = ema.model.state_dict()
    state = {"progress": asdict(progress), "optimizer": numbers}
    _refuse_non_finite(final, states, state)

    make_folder(folder, within=folder.parent)
    sync_folder(folder.parent)
    _sweep(folder)
    try:
        temporary = folder / f".{final.name}.tmp"
        _write(temporary, states, state, best)
        if fault := find_fault(temporary):
            problem = f"{final}: {fault} right after it was written - check the disk"
            raise CheckpointError(problem, code="damaged-checkpoint")
        aside = folder / f".{final.name}.aside"
        if os.path.lexists(final):
            final.rename(aside)
        temporary.rename(final)
        sync_folder(folder)
    except BaseException:
        _sweep(folder)
        raise
    older = [path for path in _checkpoints(folder) if _step(path) < progress.step]
    for path in (aside, *older[max(0, keep - 1) :]):
        _remove(path)
    return final


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for every newer one that does not, with the steps that costs.

    Also sweeps what a kill left behind, so it is for the process that holds the run's lock."""
    if not folder.is_dir():
        return None, []
    _sweep(folder)
    faults: dict[Path, str] = {}
    for newest in _checkpoints(folder):
        if (fault := find_fault(newest)) is None:
            break
        faults[newest] = fault
    else:
        newest = None
    start, source = (_step(newest), f"going on from {newest.name}") if newest else (0, "and there is none before it")
    return newest, [
        f"{checkpoint}: {fault} - ignored, {source}: {_step(checkpoint) - start} steps are done again"
        for checkpoint, fault in faults.items()
    ]


def load_checkpoint(
    checkpoint: Path, *, model: nn.Module, optimizer: Optimizer, ema: ExponentialMovingAverage | None
) -> Progress:
    """Restores everything in place. Raises CheckpointError for a checkpoint of another model or version."""
    progress, numbers = _read_state(checkpoint / "state.json")
    modules = {"model": model} if ema is None else {"model": model, "ema": ema.model}
    for name, module in modules.items():
        file = checkpoint / f"{name}.safetensors"
        if name == "ema" and not file.is_file():
            problem = f"{file}: missing, because the run kept no moving average - train without ema"
            raise CheckpointError(problem, code="missing-average")
        load_state(module, _read_tensors(file), file)
    file = checkpoint / "optimizer.safetensors"
    _restore_optimizer(optimizer, _read_tensors(file), numbers, file)
    return progress


def _write(
    temporary: Path, states: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: bytes | None
) -> None:
    def contents() -> Iterator[tuple[str, bytes]]:
        for name, tensors in states.items():  # one after another, because the bytes of each are as large as its tensors
            yield f"{name}.safetensors", serialize(tensors)
        yield "state.json", json.dumps(state, indent=1).encode()
        if best is not None:
            yield BEST, best

    make_folder(temporary, within=temporary.parent)
    digests = {}
    for name, data in contents():
        digests[name] = hashlib.sha256(data).hexdigest()
        write_synced(temporary / name, data)
    write_synced(temporary / MANIFEST, manifest(digests))
    sync_folder(temporary)


def _refuse_non_finite(
    final: Path, states: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Mapping[str, Any]]
) -> None:
    names = [f"{name}: {key}" for name, tensors in states.items() if (key := first_non_finite(tensors))]
    for section, values in state.items():
        for key, value in values.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError:
                names.append(f"{section}: {key}")
    if names:
        fix = "go on from the checkpoint before it with a lower learning rate or with clip_norm"
        raise CheckpointError(f"{final}: {names[0]} is not finite, so nothing was saved - {fix}", code="not-finite")


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)), key=_step)[::-1]


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _sweep(folder: Path) -> None:
    """Removes what a save that was cut off has left, and puts back what it had set aside."""
    for path in folder.glob(".step_*"):
        final = path.with_name(path.stem.removeprefix("."))
        if path.suffix == ".aside" and not final.exists():
            path.rename(final)
        elif path.suffix in (".tmp", ".aside", ".old"):
            with suppress(OSError):
                remove(path)


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: what a kill leaves of it should not look like a checkpoint."""
    if os.path.lexists(checkpoint):
        old = checkpoint.with_name(f".{checkpoint.name.removeprefix('.')}.old")
        with suppress(OSError):  # the next save tries again
            checkpoint.rename(old)
            remove(old)


def _read_state(file: Path) -> tuple[Progress, dict[str, Any]]:
    """Progress and the optimizer's numbers. Keys of later minor versions are ignored."""
    known = [f.name for f in fields(Progress)]
    try:
        state = parse_json(file.read_bytes())
        values, numbers = state["progress"], state["optimizer"]
        if (version := values["schema_version"]) != SCHEMA_VERSION:
            problem = f"{file.parent}: schema version {version!r:.20}, this program reads {SCHEMA_VERSION}"
            raise CheckpointError(f"{problem} - use the version that wrote it", code="other-version")
        check_type(numbers, dict[str, float | bool | str | list[float] | None], "optimizer")
        progress = from_mapping(Progress, {key: values[key] for key in known if key in values}, "progress")
        for name in ("step", "best_step", "evaluated", "evaluations_without_gain", "bad_steps"):
            check(0 <= getattr(progress, name) <= LAST_STEP, name, getattr(progress, name), f"give 0 to {LAST_STEP}")
        check(len(progress.meter) in (0, NUM_SUMS), "meter", progress.meter, f"a meter has {NUM_SUMS} sums")
        progress.meter = [float(value) for value in progress.meter]
        check(file.parent.name == _name(progress.step), "step", progress.step, "it is not that of the folder")
        return progress, numbers
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as fault:
        problem = f"{file}: is not what this program writes ({fault!r:.100}) - restore it from a copy"
        raise CheckpointError(problem, code="damaged-checkpoint") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as fault:
        problem = f"{file}: cannot be read ({fault}) - restore it from a copy"
        raise CheckpointError(problem, code="damaged-checkpoint") from None


def _flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    flat = {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in flat.items() if key not in tensors}


def _restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any], file: Path) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    kinds = {key.partition(".")[2] for key in tensors}
    for key in numbers:
        if key.partition(".")[2] in kinds and numbers[key] is not None:
            problem = f"{file}: {key} is a number instead of a tensor - restore it from a copy"
            raise CheckpointError(problem, code="damaged-checkpoint")
    for key, value in (numbers | tensors).items():
        index, _, name = key.partition(".")
        position = int(index) if re.fullmatch(r"\d{1,9}", index) else len(parameters)
        if position >= len(parameters) or not name:
            problem = f"{file}: {key} is of no parameter of this model - use the run's own model"
            raise CheckpointError(problem, code="other-model")
        parameter = parameters[position]
        if isinstance(value, Tensor) and not _fits(value, parameter):
            problem = f"{file}: {key} is {list(value.shape)}, its parameter is {list(parameter.shape)}"
            raise CheckpointError(f"{problem} - use the run's own model", code="other-model")
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
            # in the parameter's memory format, as fused kernels expect
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(position, {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """One number, a number for each of the parameter's, or (Adafactor) one for each of its rows or columns."""
    same_rank = value.ndim == parameter.ndim
    return not value.ndim or (same_rank and all(n in (1, m) for n, m in zip(value.shape, parameter.shape, strict=True)))


# The list of a checkpoint's files and their hashes, which says whether it can be trusted.
#
#     <sha256>  model.safetensors
#     ...
#     # sha256 of the lines above: <sha256>
#
# `sha256sum -c MANIFEST.sha256` checks the files too.
MANIFEST = "MANIFEST.sha256"
REQUIRED = ("model.safetensors", "optimizer.safetensors", "state.json")

_ENTRY = re.compile(rb"([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})")
_SEAL = b"# sha256 of the lines above: "
_LONGEST = 1 << 16
"""Bytes: no manifest of ours comes near."""


def manifest(digests: Mapping[str, str]) -> bytes:
    """The text for files of these names and SHA-256 digests (hexadecimal)."""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()
    return lines + _SEAL + hashlib.sha256(lines).hexdigest().encode() + b"\n"


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None when it is exactly what its manifest says.

    Every file is read. A file that is not listed, a link and anything that is no plain file are faults as well."""
    if checkpoint.is_symlink():
        return "is a symbolic link"
    try:
        with open_plain(checkpoint / MANIFEST, "rb") as handle:
            digests = _parse(handle.read(_LONGEST))
        present = set(os.listdir(checkpoint))
    except OSError:
        return f"{MANIFEST} is missing or unreadable"
    if digests is None:
        return f"{MANIFEST} is damaged"
    for name in REQUIRED:
        if name not in digests:
            return f"{MANIFEST} lists no {name}"
    for name in sorted(present - {MANIFEST, *digests}):
        return f"{name} is not listed in {MANIFEST}"
    for name, digest in digests.items():
        try:
            with open_plain(checkpoint / name, "rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    return f"{name} does not match its hash"
        except OSError:
            return f"{name} is missing or unreadable"
    return None


def _parse(text: bytes) -> dict[str, str] | None:
    """Digest by name, or None for what `manifest` cannot have written."""
    lines, seal, digest = text.rpartition(_SEAL)
    if not seal or digest != hashlib.sha256(lines).hexdigest().encode() + b"\n":
        return None
    entries = [_ENTRY.fullmatch(line) for line in lines.removesuffix(b"\n").split(b"\n")]
    digests = {entry[2].decode(): entry[1].decode() for entry in entries if entry}
    return digests if len(digests) == len(entries) and MANIFEST not in digests else None
