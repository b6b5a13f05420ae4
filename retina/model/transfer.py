"""What one model can take over from the weights of another: tensors of the same name and shape and, in the layer that
predicts classes, the rows of classes that both have."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from retina.errors import ConfigError

CLASS_LAYER = "head.classification.predict."


def match_classes(theirs: Sequence[str], ours: Sequence[str], remap: Mapping[str, str]) -> dict[int, int]:
    """Our class to theirs, as indices, for classes of the same name once `remap` has renamed some of theirs.

    Raises ConfigError for names in `remap` that are not in the lists, and when several of theirs become one of ours."""
    for their, our in remap.items():
        for name, known, where in ((their, theirs, "the weights"), (our, ours, "the data")):
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known[:8])}"
                raise ConfigError(f"remap: {name!r} is no class of {where} - {hint}")
    matched: dict[int, int] = {}
    for index, name in enumerate(theirs):
        our = remap.get(name, name)
        if our not in ours:
            continue
        if (first := matched.setdefault(ours.index(our), index)) != index:
            raise ConfigError(f"remap: {theirs[first]} and {name} would both be {our} - rename one of them at most")
    return matched


def merge_rows(
    own: Float[Tensor, "_ ..."],
    other: Float[Tensor, "_ ..."],
    matched: Mapping[int, int],
    *,
    num_own: int,
    num_other: int,
) -> Float[Tensor, "_ ..."] | None:
    """A copy of `own`, a weight or bias with rows [anchors x classes], with the rows of matched classes from `other`;
    None where the two have other numbers of anchors or inputs."""
    ours, theirs = own.unflatten(0, (-1, num_own)).clone(), other.unflatten(0, (-1, num_other))
    if len(ours) != len(theirs) or ours.shape[2:] != theirs.shape[2:]:
        return None
    ours[:, list(matched)] = theirs[:, list(matched.values())].to(ours)
    return ours.flatten(0, 1)


def renumber(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors with the head's convolutions numbered as in `own`, where one of the two has norms between them."""
    step, other = (3 if "head.box.convs.1.weight" in state else 2 for state in (own, theirs))

    def name(key: str) -> str:
        if not (found := re.fullmatch(r"(head\.\w+\.convs)\.(\d+)\.(\w+)", key)):
            return key
        layer, part = divmod(int(found[2]), other)
        return f"{found[1]}.{step * layer + part}.{found[3]}"  # a norm's number is a ReLU's where there are none

    return {name(key): value for key, value in theirs.items()}


_LAYERS = {  # settings that make tensors of the same name, and maybe shape, parts of another layer
    "backbone": r"backbone\..+",
    "norm": r"backbone\.(.+\.)?(bn\d|downsample\.1)\..+",
    "levels": r"fpn\.(lateral|output|down|down_output)\..+",
    "p6_from": r"fpn\.extra\..+",
    "head_convs": r"head\.\w+\.(predict|quality)\..+",
    "box_bins": r"head\.box\.predict\..+",
}


def other_layers(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """Patterns of tensors that belong to other layers under the settings of the weights than under ours, and why."""
    return {
        pattern: f"model.{name} is {theirs[name]} there"
        for name, pattern in _LAYERS.items()
        if name in theirs and name in ours and _layer(name, theirs[name]) != _layer(name, ours[name])
    }


def _layer(name: str, value: Any) -> Any:
    """What of a setting's value makes other layers."""
    if name == "norm":
        return value == "group"  # the others differ in what is trained alone
    return value[0] if name == "levels" else value


def fit(
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    matched: Mapping[int, int],
    *,
    num_own: int,
    num_theirs: int,
    others: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that a model can take over, and why it cannot take the others.

    matched: classes, as from `match_classes`. num_own, num_theirs: how many there are, 0 where weights name none.
    others: patterns of tensors that belong to other layers, as from `other_layers`."""
    same = num_own == num_theirs and all(matched.get(k) == k for k in range(num_own))
    taken: dict[str, Tensor] = {}
    anew: dict[str, str] = {}
    for key, value in own.items():
        other = theirs.get(key)
        reason = next((why for pattern, why in (others or {}).items() if re.fullmatch(pattern, key)), None)
        if other is None:
            anew[key] = "not in the file"
        elif reason:
            anew[key] = reason
        elif not key.startswith(CLASS_LAYER) or same:
            if other.shape == value.shape:
                taken[key] = other
            else:
                anew[key] = f"{list(other.shape)} there, {list(value.shape)} here"
        elif not matched:
            anew[key] = "other classes" if num_theirs else "the file names no classes"
        else:
            merged = merge_rows(value, other, matched, num_own=num_own, num_other=num_theirs)
            if merged is None:
                anew[key] = f"{list(other.shape)} there for {num_theirs} classes, {list(value.shape)} here"
            else:
                taken[key] = merged
    return taken, anew


_OF_TRAINING = ("num_classes", "weights", "frozen_stages", "prior")
"""Settings that change nothing about what given weights compute."""


def other_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """One line, as overrides, if weights were made under settings that change what they compute."""
    both = [name for name in theirs if name in ours and name not in _OF_TRAINING]
    names = [name for name in both if theirs[name] != ours[name]]
    if _layer("norm", theirs.get("norm")) == _layer("norm", ours.get("norm")):
        names = [name for name in names if name != "norm"]
    if not names:
        return []
    words = [f"model.{name}={json.dumps(theirs[name], separators=(',', ':'))}" for name in names]
    return [f"init_from: the weights were trained with other settings, to go on with those give {' '.join(words)}"]
