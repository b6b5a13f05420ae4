"""What one model can take over from the weights of another: tensors of the same name and shape and, in the layer that
predicts classes, the rows of classes that both have."""

import difflib
import json
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


def fit(
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    matched: Mapping[int, int],
    *,
    num_own: int,
    num_theirs: int,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that a model can take over, and why it cannot take the others.

    matched: classes, as from `match_classes`. num_own, num_theirs: how many there are, 0 where weights name none."""
    same = num_own == num_theirs and all(matched.get(k) == k for k in range(num_own))
    taken: dict[str, Tensor] = {}
    anew: dict[str, str] = {}
    for key, value in own.items():
        other = theirs.get(key)
        if other is None:
            anew[key] = "not in the file"
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


_UNSEEN = (  # settings of a model that its tensors fit whatever they are
    "mean",
    "std",
    "norm_eps",
    "stride_in_1x1",
    "p7_relu",
    "anchor_sizes",
    "anchor_scales",
    "anchor_ratios",
    "anchors_rounded",
    "anchors_spread",
    "anchor_offset",
)


def other_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """One line, as overrides, if weights were made under settings that change what they compute."""
    names = [name for name in _UNSEEN if name in theirs and name in ours and theirs[name] != ours[name]]
    if not names:
        return []
    words = [f"model.{name}={json.dumps(theirs[name], separators=(',', ':'))}" for name in names]
    return [f"init_from: the weights were trained with other settings, to go on with those give {' '.join(words)}"]
