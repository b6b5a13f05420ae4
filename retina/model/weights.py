"""The weights file of a trained detector: tensors as safetensors, and in its header everything needed to use them.

The model is rebuilt from keyword arguments of `retinanet`, never from code or import paths in the file.

The header also holds the SHA-256 of the whole file, computed with 64 zeros in the place of the hash, so that every
flipped bit is noticed. Files of earlier versions have no hash, and are read without it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from retina.errors import CheckpointError, ConfigError, RetinaError
from retina.files import write_whole
from retina.model.header import check_header, check_sizes, check_tensors, model_on_meta
from retina.model.parts import missing_plugins
from retina.model.retinanet import RetinaNet, retinanet
from retina.schema import parse_json

SCHEMA_VERSION = 1
_NO_DIGEST = "0" * 64
_RENAMED = {
    "model": ("anchors_spread", "canvas_strides"),
    "preprocessing": ("divisor", "pad_multiple"),
}
"""Old and new name of what earlier versions wrote otherwise, by field of the card."""


@dataclass(frozen=True, kw_only=True)
class DetectorCard:
    """The description of a detector in its weights file."""

    model: dict[str, Any]
    """Keyword arguments of `retinanet`."""
    classes: list[str]
    category_ids: list[int]
    preprocessing: dict[str, Any]
    """short_side, long_side, pad_multiple, pad_value, precision, batch_size."""
    postprocess: dict[str, Any]
    """Keyword arguments of `postprocess`."""
    step: int = 0
    metrics: dict[str, float | int | None] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, commit and device it was trained with; empty in files of earlier versions."""
    operating_point: dict[str, Any] = field(default_factory=dict)
    """The score threshold of each class and what to expect of it (`fit_operating_point`); may be empty."""
    schema_version: int = SCHEMA_VERSION


def save_detector(file: Path, state: dict[str, Tensor], card: DetectorCard) -> None:
    """Writes beside `file` and renames once, so that a reader sees the old file or the new one, never a half.

    Raises OSError, or CheckpointError for weights that are not finite; `file` is then unchanged."""
    write_whole(file, detector_bytes(file, state, card))


def detector_bytes(file: Path, state: dict[str, Tensor], card: DetectorCard) -> bytes:
    """What is to stand in `file`. Raises CheckpointError for weights that are not finite."""
    if key := first_non_finite(state):
        problem = f"{key} is not finite, so nothing was saved - lower the learning rate, or clip the gradients"
        raise CheckpointError(f"{file}: {problem}", code="not-finite")
    data = serialize(state, {"retina": json.dumps({"sha256": _NO_DIGEST, **asdict(card)})})
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(_NO_DIGEST.encode(), digest.encode(), 1)


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
    """The header of a weights file. Raises CheckpointError if it has none, is of another version or damaged."""
    return _read(file)[0]


def load_detector(file: Path, device: torch.device, *, plugins: Sequence[str] = ()) -> tuple[RetinaNet, DetectorCard]:
    """The model in evaluation mode, and its card.

    Raises CheckpointError for damaged files and weights of another architecture."""
    card, data = _read(file)
    for key, target in missing_plugins(card.model, plugins).items():
        problem = f"its {key} is {target} - give plugins=[{target.partition('.')[0]}] if you trust that package"
        raise CheckpointError(f"{file}: {problem}", code="needs-plugin")
    arguments = card.model | {"weights": None, "plugins": plugins}  # a file must not choose other files to load
    state = load(data)
    try:
        check_sizes(arguments, state)
    except ConfigError as fault:
        raise CheckpointError(
            f"{file}: {fault}: weights of another architecture - take another copy of the file", code=fault.code
        ) from None
    try:
        check_tensors(model_on_meta(arguments) or state, state, file)  # before anything costs memory
        model = retinanet(**arguments)
    except CheckpointError:
        raise
    except (TypeError, ValueError, RuntimeError, RetinaError) as fault:
        raise CheckpointError(f"{file}: header: {fault} - use the version that wrote it", code="bad-header") from None
    load_state(model, state, file)
    return model.to(device).eval(), card


def _read(file: Path) -> tuple[DetectorCard, bytes]:
    card, data = read_file(file)
    if card is None:
        problem = "has no detector description - give the best.safetensors of a run, not bare weights"
        raise CheckpointError(f"{file}: {problem}", code="no-card")
    return card, data


def read_file(file: Path) -> tuple[DetectorCard | None, bytes]:
    """The card of a safetensors file, or None for bare weights, and the bytes of the whole file.

    Raises CheckpointError for a file that is missing or damaged, or whose card is of another version."""
    if not file.is_file():
        problem = "no such file - give a run folder or a .safetensors file written by training"
        raise CheckpointError(f"{file}: {problem}", code="no-file")
    try:
        with safe_open(file, framework="pt") as handle:  # checks the structure before all of it is read
            header = (handle.metadata() or {}).get("retina")
        data = file.read_bytes()
        values = {} if header is None else parse_json(header)
    except (SafetensorError, OSError, ValueError, RecursionError) as fault:
        problem = f"cannot be read ({fault}) - restore it from a copy or train again"
        raise CheckpointError(f"{file}: {problem}", code="unreadable-file") from None
    return None if header is None else _card(file, values, data), data


def _card(file: Path, values: Any, data: bytes) -> DetectorCard:
    """The card from the `values` in a header, after the check of the file's hash."""
    if not isinstance(values, dict) or "schema_version" not in values:
        raise _bad_header(file, "schema_version is missing")
    names = {f.name for f in fields(DetectorCard)}
    digest = values.pop("sha256", None)
    if digest is None:
        damaged = not values.keys() <= names  # a file of an earlier version, unless the name of the hash is damaged
    else:
        blank = data.replace(str(digest).encode(errors="replace"), _NO_DIGEST.encode(), 1)
        damaged = hashlib.sha256(blank).hexdigest() != digest
    if damaged:
        problem = "does not match its own hash, it is damaged - restore it from a copy"
        raise CheckpointError(f"{file}: {problem}", code="damaged-file")
    if (version := values["schema_version"]) != SCHEMA_VERSION:
        problem = f"schema version {version!r:.20}, this program reads {SCHEMA_VERSION} - use the version that wrote it"
        raise CheckpointError(f"{file}: {problem}", code="other-version")
    values = {"environment": {}, "operating_point": {}} | values
    for section, (old, new) in _RENAMED.items():
        if isinstance(part := values.get(section), dict) and old in part:
            part[new] = part.pop(old)
    try:
        check_header(values, get_type_hints(DetectorCard))
    except ConfigError as fault:
        raise _bad_header(file, str(fault)) from None
    return DetectorCard(**{name: values[name] for name in names})


def _bad_header(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file}: header: {problem} - restore it from a copy", code="bad-header")


def load_state(model: torch.nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Strict `load_state_dict` that fails with one line naming the first tensor that does not fit."""
    check_tensors(model.state_dict(), state, file)
    model.load_state_dict(state)
