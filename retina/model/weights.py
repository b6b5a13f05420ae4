"""The file a trained detector travels in: weights as safetensors, everything else needed to use them in its header.

The model is rebuilt from keyword arguments of `retinanet`, never from code or import paths in the file.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retina.errors import CheckpointError, RetinaError
from retina.model.retinanet import RetinaNet, retinanet

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DetectorCard:
    """What a weights file says about itself."""

    model: dict[str, Any]
    """Keyword arguments of `retinanet`."""
    classes: list[str]
    category_ids: list[int]
    preprocessing: dict[str, Any]
    """short_side, long_side, pad_value, divisor, precision, batch_size."""
    postprocess: dict[str, Any]
    """Keyword arguments of `postprocess`."""
    step: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def save_detector(file: Path, state: dict[str, Tensor], card: DetectorCard) -> None:
    """Writes beside `file` and renames once, so a reader sees the old file or the new one, never a half."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as handle:
        handle.write(serialize(state, {"retina": json.dumps(asdict(card))}))
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def serialize(state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A state dict as the bytes of a safetensors file (`save_file` would give the file to its owner alone)."""
    return save({key: value.detach().cpu().contiguous() for key, value in state.items()}, metadata)


def read_card(file: Path) -> DetectorCard:
    """The header of a weights file. Raises CheckpointError when there is none or it is of another version."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file - give a run folder or a .safetensors file written by training")
    try:
        with safe_open(file, framework="pt") as handle:
            header = handle.metadata() or {}
        values = json.loads(header["retina"])
        version = values["schema_version"]
    except KeyError:
        raise CheckpointError(
            f"{file}: has no detector description - give the best.safetensors of a run, not bare weights"
        ) from None
    except (SafetensorError, OSError, ValueError, TypeError) as fault:
        raise CheckpointError(f"{file}: cannot be read ({fault}) - restore it from a copy or train again") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{file}: schema version {version}, this program reads {SCHEMA_VERSION} - use the version that wrote it"
        )
    try:
        return DetectorCard(**{f.name: values[f.name] for f in fields(DetectorCard)})
    except KeyError as fault:
        raise CheckpointError(f"{file}: header: {fault.args[0]} is missing - restore it from a copy") from None


def load_detector(file: Path, device: torch.device) -> tuple[RetinaNet, DetectorCard]:
    """The model in evaluation mode, and its card. Raises CheckpointError for weights of another architecture."""
    card = read_card(file)
    try:
        model = retinanet(**card.model)
    except (TypeError, RetinaError) as fault:
        raise CheckpointError(f"{file}: header: {fault} - use the version that wrote it") from None
    with safe_open(file, framework="pt") as handle:
        state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
    load_state(model, state, file)
    return model.to(device).eval(), card


def load_state(model: torch.nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Strict `load_state_dict` whose failure is one line naming the first key that does not fit."""
    own = model.state_dict()
    for key in (*own, *(key for key in state if key not in own)):
        if key not in state or key not in own:
            where = "lacks" if key not in state else "has an unknown"
            raise CheckpointError(
                f"{file}: {where} {key}: weights of another architecture - use its own model settings"
            )
        if own[key].shape != state[key].shape:
            raise CheckpointError(
                f"{file}: {key} is {list(state[key].shape)}, the model needs {list(own[key].shape)}: "
                "weights of another architecture - use its own model settings"
            )
    model.load_state_dict(state)
