"""The file a trained detector travels in: weights as safetensors, everything else needed to use them in its header.

The model is rebuilt from keyword arguments of `retinanet`, never from code or import paths in the file.

The header also holds the SHA-256 of the whole file, taken while 64 zeros stand in its place, so that no flipped bit
goes unnoticed. Files written before there was one are read without it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from retina.errors import CheckpointError, RetinaError
from retina.files import write_whole
from retina.model.retinanet import RetinaNet, retinanet

SCHEMA_VERSION = 1
_NO_DIGEST = "0" * 64
_TYPES = {
    "model": dict,
    "classes": list,
    "category_ids": list,
    "preprocessing": dict,
    "postprocess": dict,
    "step": int,
    "metrics": dict,
    "schema_version": int,
}


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
    """Writes beside `file` and renames once, so a reader sees the old file or the new one, never a half.

    Raises OSError, or CheckpointError for weights that are not finite; `file` is then as it was."""
    if key := first_non_finite(state):
        raise CheckpointError(
            f"{file}: {key} is not finite, so nothing was saved - lower optimizer.lr, or give train.clip_norm"
        )
    data = serialize(state, {"retina": json.dumps({"sha256": _NO_DIGEST, **asdict(card)})})
    digest = hashlib.sha256(data).hexdigest()
    write_whole(file, data.replace(_NO_DIGEST.encode(), digest.encode(), 1))


def serialize(state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A state dict as the bytes of a safetensors file (`save_file` would give the file to its owner alone)."""
    return save({key: value.detach().cpu().contiguous() for key, value in state.items()}, metadata)


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity. Waits for each device once."""
    for device in {tensor.device for tensor in tensors.values()}:
        names = [name for name, tensor in tensors.items() if tensor.device == device and tensor.is_floating_point()]
        if not names:
            continue
        finite = torch.stack([tensors[name].isfinite().all() for name in names]).tolist()
        if not all(finite):
            return names[finite.index(False)]
    return None


def read_card(file: Path) -> DetectorCard:
    """The header of a weights file. Raises CheckpointError when there is none, it is of another version or the file is
    damaged."""
    return _read(file)[0]


def load_detector(file: Path, device: torch.device) -> tuple[RetinaNet, DetectorCard]:
    """The model in evaluation mode, and its card. Raises CheckpointError for damaged files and weights of another
    architecture."""
    card, data = _read(file)
    try:
        model = retinanet(**card.model | {"weights": None})  # a file must not say what else to load
    except (TypeError, ValueError, RuntimeError, RetinaError) as fault:
        raise CheckpointError(f"{file}: header: {fault} - use the version that wrote it") from None
    load_state(model, load(data), file)
    return model.to(device).eval(), card


def _read(file: Path) -> tuple[DetectorCard, bytes]:
    """The card, and the bytes of the whole file once they have been found undamaged."""
    header, data = read_header(file)
    if "retina" not in header:
        raise CheckpointError(
            f"{file}: has no detector description - give the best.safetensors of a run, not bare weights"
        )
    return card_of(file, header, data), data


def read_header(file: Path) -> tuple[dict[str, str], bytes]:
    """Metadata and bytes of a safetensors file."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file - give a run folder or a .safetensors file written by training")
    try:
        with safe_open(file, framework="pt") as handle:  # checks the structure before all of it is read
            header = handle.metadata() or {}
        return header, file.read_bytes()
    except (SafetensorError, OSError) as fault:
        raise _unreadable(file, fault) from None


def card_of(file: Path, header: Mapping[str, str], data: bytes) -> DetectorCard:
    try:
        values = json.loads(header["retina"])
        version = values["schema_version"]
    except KeyError:
        raise CheckpointError(f"{file}: header: schema_version is missing - restore it from a copy") from None
    except (ValueError, TypeError, RecursionError) as fault:
        raise _unreadable(file, fault) from None
    digest = values.pop("sha256", None)
    names = {f.name for f in fields(DetectorCard)}
    if digest is None:
        damaged = not values.keys() <= names  # a digest whose name is damaged is no file of earlier times
    else:
        blank = data.replace(str(digest).encode(errors="replace"), _NO_DIGEST.encode(), 1)
        damaged = hashlib.sha256(blank).hexdigest() != digest
    if damaged:
        raise CheckpointError(f"{file}: does not match its own hash, it is damaged - restore it from a copy")
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{file}: schema version {version!r:.20}, this program reads {SCHEMA_VERSION} - "
            "use the version that wrote it"
        )
    for f in fields(DetectorCard):
        if not isinstance(values.get(f.name), _TYPES[f.name]):
            problem = "is of the wrong type" if f.name in values else "is missing"
            raise CheckpointError(f"{file}: header: {f.name} {problem} - restore it from a copy")
    return DetectorCard(**{name: values[name] for name in names})


def _unreadable(file: Path, fault: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: cannot be read ({fault}) - restore it from a copy or train again")


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
