"""Checkpoints of a run: tensors as safetensors, numbers as JSON, a manifest of hashes, one rename.

    checkpoints/step_00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors  state.json  MANIFEST.sha256

A checkpoint is valid only if every hash in its manifest verifies; resume takes the newest valid one. Nothing in it is
code, and nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from retina.engine.ema import ExponentialMovingAverage
from retina.errors import CheckpointError
from retina.model.weights import load_state, serialize

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.sha256"


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: plain numbers. The order of samples, the augmentation, the learning rate and the random state
    are all functions of the seed and the step, so none of them is stored."""

    step: int = 0
    """Optimizer steps done."""
    best: float | None = None
    """Best value so far of the metric that names the best checkpoint."""
    best_step: int = 0
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 gradient scaler."""
    meter: list[float] = field(default_factory=list)
    """Sums since the last logged line."""
    annotations: str = ""
    """Fingerprint of the training annotations."""
    schema_version: int = SCHEMA_VERSION


def save_checkpoint(
    folder: Path,
    progress: Progress,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    ema: ExponentialMovingAverage | None,
    keep: int,
) -> Path:
    """Writes `folder/step_XXXXXXXX`, verifies it, and only then removes all but the newest `keep`."""
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    tensors, numbers = _flatten_optimizer(optimizer)
    (temporary / "model.safetensors").write_bytes(serialize(model.state_dict()))
    (temporary / "optimizer.safetensors").write_bytes(serialize(tensors))
    if ema is not None:
        (temporary / "ema.safetensors").write_bytes(serialize(ema.model.state_dict()))
    (temporary / "state.json").write_text(json.dumps({"progress": asdict(progress), "optimizer": numbers}, indent=1))
    names = sorted(path.name for path in temporary.iterdir())
    (temporary / MANIFEST).write_text("".join(f"{_sha256(temporary / name)}  {name}\n" for name in names))
    for name in (*names, MANIFEST):
        _fsync(temporary / name)
    _fsync(temporary)
    if fault := find_fault(temporary):
        raise CheckpointError(f"{temporary}: {fault} right after it was written - check the disk")
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(folder)
    older = sorted(path for path in folder.glob("step_*") if path.name < final.name)
    for old in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(old)
    return final


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None when its manifest verifies."""
    try:
        text = (checkpoint / MANIFEST).read_text()
    except (OSError, UnicodeDecodeError):
        return f"{MANIFEST} is missing or unreadable"
    entries = [line.split("  ", 1) for line in text.splitlines()]
    well_formed = text.endswith("\n") and all(len(entry) == 2 and "/" not in entry[1] for entry in entries)
    if not well_formed or not {"model.safetensors", "state.json"} <= {entry[-1] for entry in entries}:
        return f"{MANIFEST} is damaged"
    for digest, name in entries:
        try:
            if _sha256(checkpoint / name) != digest:
                return f"{name} does not match its hash"
        except OSError:
            return f"{name} is missing or unreadable"
    return None


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for every newer one that does not."""
    faults: list[str] = []
    for checkpoint in sorted(folder.glob("step_*"), reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint}: {fault} - ignored, the one before it is used")
    return None, faults


def load_checkpoint(
    checkpoint: Path, *, model: nn.Module, optimizer: Optimizer, ema: ExponentialMovingAverage | None
) -> Progress:
    """Restores everything in place. Raises CheckpointError for a checkpoint of another model or version."""
    state = json.loads((checkpoint / "state.json").read_text())
    values = state["progress"]
    if values.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{checkpoint}: schema version {values.get('schema_version')}, this program reads {SCHEMA_VERSION} - "
            "use the version that wrote it"
        )
    load_state(model, load_file(checkpoint / "model.safetensors"), checkpoint / "model.safetensors")
    if ema is not None:
        file = checkpoint / "ema.safetensors"
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, the run kept no moving average - restore it from a copy")
        load_state(ema.model, load_file(file), file)
    _restore_optimizer(optimizer, load_file(checkpoint / "optimizer.safetensors"), state["optimizer"], checkpoint)
    return Progress(**{f.name: values[f.name] for f in fields(Progress) if f.name in values})


def _flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{k}": v for i, values in state.items() for k, v in values.items() if isinstance(v, Tensor)}
    numbers = {f"{i}.{k}": v for i, values in state.items() for k, v in values.items() if not isinstance(v, Tensor)}
    return tensors, numbers


def _restore_optimizer(
    optimizer: Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any], checkpoint: Path
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *numbers.items()):
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for position, values in state.items():
        for name, value in values.items():
            if position >= len(parameters) or (
                isinstance(value, Tensor) and value.ndim and value.shape != parameters[position].shape
            ):
                raise CheckpointError(
                    f"{checkpoint}: optimizer state {name} fits no parameter - use the run's own model"
                )
            if isinstance(value, Tensor) and value.ndim:  # in the parameter's memory format, as fused kernels expect
                values[name] = torch.empty_like(parameters[position]).copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
