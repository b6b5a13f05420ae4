"""What one model can take over from the weights of another: tensors of the same name and shape and, in the layer that
predicts classes, the rows of classes that both have."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load
from torch import Tensor

from retina.errors import ConfigError
from retina.interop.convert import convert_detector
from retina.interop.foreign import CLASS_LAYER, refusal, some
from retina.interop.read import FOREIGN_SUFFIXES, read_foreign
from retina.interop.torchvision import PREFIX, fetch_published
from retina.model.input_channels import adapt_state
from retina.model.weights import first_non_finite, read_file


@dataclass(frozen=True)
class Start:
    """The weights that a model starts from."""

    file: Path
    state: dict[str, Tensor]
    classes: list[str]
    """Empty where the file names none."""
    model: dict[str, Any]
    """Settings of the model, so far as they are known."""
    notes: list[str] = field(default_factory=list)


def match_classes(source: Sequence[str], classes: Sequence[str], remap: Mapping[str, str]) -> dict[int, int]:
    """The index of each class of the data to that in the source, for classes of the same name once `remap` has renamed
    some of the source's.

    Raises ConfigError for names in `remap` that are not in the lists, and when several classes become one."""
    for pair in remap.items():
        for name, known, where in zip(pair, (source, classes), ("the weights", "the data"), strict=True):
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known[:8])}"
                raise ConfigError(f"{name!r} is no class of {where} - {hint}", code="unknown-class", key="remap")
    matched: dict[int, int] = {}
    for index, name in enumerate(source):
        new_name = remap.get(name, name)
        if new_name not in classes:
            continue
        if (first := matched.setdefault(classes.index(new_name), index)) != index:
            line = f"{source[first]} and {name} would both be {new_name} - rename one of them at most"
            raise ConfigError(line, code="same-name", key="remap")
    return matched


def merge_rows(
    tensor: Float[Tensor, "_ ..."],
    source: Float[Tensor, "_ ..."],
    matched: Mapping[int, int],
    num_classes: tuple[int, int],
) -> Float[Tensor, "_ ..."] | None:
    """A copy of a weight or bias with rows [anchors x classes], with the rows of matched classes from the source's;
    None where the two have other numbers of anchors or inputs. `num_classes`: of the tensor and of the source."""
    rows, source_rows = tensor.unflatten(0, (-1, num_classes[0])).clone(), source.unflatten(0, (-1, num_classes[1]))
    if len(rows) != len(source_rows) or rows.shape[2:] != source_rows.shape[2:]:
        return None
    rows[:, list(matched)] = source_rows[:, list(matched.values())].to(rows)
    return rows.flatten(0, 1)


def renumber(source: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's tensors with the head's convolutions numbered as in the model, where only one of them has norms."""
    step, source_step = (3 if "head.box.convs.1.weight" in state else 2 for state in (model, source))

    def name(key: str) -> str:
        if not (match := re.fullmatch(r"(head\.\w+\.convs)\.(\d+)\.(\w+)", key)):
            return key
        layer, part = divmod(int(match[2]), source_step)
        return f"{match[1]}.{step * layer + part}.{match[3]}"  # a norm's number is a ReLU's where there are none

    return {name(key): value for key, value in source.items()}


_LAYERS = {  # settings that make tensors of the same name, and maybe shape, parts of another layer
    "backbone": r"backbone\..+",
    "norm": r"backbone\.(.+\.)?(bn\d|downsample\.1)\..+",
    "levels": r"fpn\.(lateral|output|down|down_output)\..+",
    "p6_from": r"fpn\.extra\..+",
    "head_convs": r"head\.\w+\.(predict|quality)\..+",
    "box_bins": r"head\.box\.predict\..+",
}


_BODY = "backbone."


def _layer(name: str, value: Any) -> Any:
    """What of a setting's value makes other layers."""
    if name == "norm":
        return value == "group"  # the others differ in what is trained alone
    return value[0] if name == "levels" else value


def other_layers(source: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, str]:
    """Patterns of tensors that belong to other layers under the source's settings than under the model's, and why."""
    return {
        pattern: f"model.{name} is {source[name]} there"
        for name, pattern in _LAYERS.items()
        if name in source and name in settings and _layer(name, source[name]) != _layer(name, settings[name])
    }


def take(
    key: str, tensor: Tensor, start: Start, matched: Mapping[int, int], reasons: Mapping[str, str], num_classes: int
) -> Tensor | str:
    """What takes the place of a tensor of the model, or why nothing does.

    matched: as from `match_classes`. reasons: as from `other_layers`. num_classes: of the model."""
    source, num_source = start.state.get(key), len(start.classes)
    if source is None:
        return "not in the file"
    if reason := next((why for pattern, why in reasons.items() if re.fullmatch(pattern, key)), None):
        return reason
    same_classes = num_classes == num_source and all(matched.get(k) == k for k in range(num_classes))
    if same_classes or not key.startswith(CLASS_LAYER):
        return source if source.shape == tensor.shape else f"{list(source.shape)} there, {list(tensor.shape)} here"
    if not matched:
        return "other classes" if start.classes else "the file names no classes"
    merged = merge_rows(tensor, source, matched, (num_classes, num_source))
    if merged is None:
        return f"{list(source.shape)} there for {num_source} classes, {list(tensor.shape)} here"
    return merged


_OF_TRAINING = ("num_classes", "weights", "frozen_stages", "prior")
"""Settings that change nothing about what given weights compute."""


def other_settings(source: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """A line, as overrides, if weights were made under settings that change what they compute, and one if their norms
    are trained from now on, or no longer."""
    other = {name: source[name] for name in source if name in settings and source[name] != settings[name]}
    lines = []
    if _layer("norm", source.get("norm")) == _layer("norm", settings.get("norm")):
        lines = norm_change("init_from", source, settings)
        other.pop("norm", None)
    words = overrides({name: value for name, value in other.items() if name not in _OF_TRAINING})
    if words:
        lines.append(f"init_from: the weights were trained with other settings, to go on with those give {words}")
    return lines


def norm_change(origin: str, source: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """A line if the statistics of the backbone's BatchNorm were fixed in the weights' run and are not here, or the
    other way round.

    origin: the setting that names the weights."""
    changes = {("frozen", "batch"): "were fixed there and are trained here", ("batch", "frozen"): "are fixed here"}
    norms = source.get("norm"), settings.get("norm")
    change = changes.get(norms)  # type: ignore[arg-type]  # what is no norm has no change
    return [f"{origin}: the backbone's norms {change}, to go on as there give model.norm={norms[0]}"] if change else []


def norms_of(weights: str | None, settings: Mapping[str, Any]) -> list[str]:
    """The same of a detector's file that the backbone has its weights from (`model.weights`); nothing for others.

    settings: arguments of the model."""
    file = Path(weights or "")
    if file.suffix != ".safetensors" or not file.is_file():
        return []
    card = read_file(file)[0]
    return norm_change("model.weights", card.model, settings) if card else []


def overrides(model: Mapping[str, Any]) -> str:
    """Settings of a model as words of a command line."""
    return " ".join(
        f"model.{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in model.items()
    )


def init_from(
    model: torch.nn.Module,
    source: str | Path,
    *,
    classes: Sequence[str],
    remap: Mapping[str, str] | None = None,
) -> list[str]:
    """Starts a model that was just built from the weights of another: those that fit by name and shape, and nothing
    else of the run they come from. Returns lines that say what was taken and what was not.

    source: a run's folder, its best.safetensors, a checkpoint's folder or any .safetensors state dict of ours; a
        detector of another program (.pth, .pt or .pkl); or `torchvision:NAME`, the COCO weights torchvision publishes.
    classes: of the data to train on. Of the layer that predicts classes, the rows of a class that the file names too
        are taken; the others keep the start they were built with, the prior bias among it.
    remap: names of classes there to names here, for what is called otherwise.

    Raises CheckpointError when nothing fits, ConfigError for a `remap` of classes that are not there."""
    if not isinstance(remap or {}, Mapping):  # from the command line
        raise ConfigError(f"{remap!r} pairs no names - give {{theirs: ours}}", code="wrong-type", key="remap")
    start = _read_start(str(source))
    if key := first_non_finite(start.state):
        raise refusal(start.file, f"{key} is not finite - give other weights for init_from", code="not-finite")
    state, settings = model.state_dict(), getattr(model, "arguments", {})
    if isinstance(body := getattr(model, "backbone", None), torch.nn.Module):
        own = {key.removeprefix(_BODY): value for key, value in start.state.items() if key.startswith(_BODY)}
        start = replace(
            start, state=start.state | {_BODY + key: value for key, value in adapt_state(body, own).items()}
        )
    matched = match_classes(start.classes, classes, remap or {})
    start = replace(start, state=renumber(start.state, state))
    reasons = other_layers(start.model, settings)
    results = {key: take(key, value, start, matched, reasons, len(classes)) for key, value in state.items()}
    taken = {key: result for key, result in results.items() if isinstance(result, Tensor)}
    if not taken:
        problem = "holds nothing that fits this model - give other weights for init_from"
        raise refusal(start.file, problem, code="nothing-fits")
    model.load_state_dict(taken, strict=False)
    lines = [*start.notes, f"init_from: {len(taken)} of {len(state)} tensors are those of {start.file}"]
    names = {classes[index]: start.classes[source_index] for index, source_index in matched.items()}
    if start.classes != [names.get(name) for name in classes] and any(key.startswith(CLASS_LAYER) for key in taken):
        same = [name if name == old_name else f"{name} ({old_name} there)" for name, old_name in names.items()]
        lines.append(f"classes: {len(same)} keep what they have learned: {some(same)}")
        if others := [name for name in classes if name not in names]:
            lines.append(f"classes: {len(others)} start anew with the prior bias: {some(others)}")
    if missing := [f"{key} ({reason})" for key, reason in results.items() if isinstance(reason, str)]:
        lines.append(f"model: {len(missing)} tensors start anew: {some(missing)}")
    if unused := [key for key in start.state if key not in state]:
        lines.append(f"init_from: {len(unused)} tensors of the file have no use here: {some(unused)}")
    return lines + other_settings(start.model, settings)


def _read_start(source: str) -> Start:
    file = fetch_published(source) if source.startswith(PREFIX) else Path(source)
    if file.suffix in FOREIGN_SUFFIXES:
        foreign = read_foreign(file)
        if not foreign.is_detector:
            problem = f"{foreign.program}, which detects nothing - import it, for model.weights"
            raise refusal(file, problem, code="not-a-detector")
        converted = convert_detector(foreign, file)
        return Start(file, converted.state, converted.card.classes, converted.card.model, converted.notes)
    if file.is_dir():
        present = [file / name for name in ("best.safetensors", "model.safetensors") if (file / name).is_file()]
        file = present[0] if present else file / "best.safetensors"
    card, data = read_file(file)
    return Start(file, load(data), card.classes if card else [], card.model if card else {})
