"""The layer that predicts classes, from one list of classes to another: rows of the same class are kept."""

import difflib
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from retina.errors import ConfigError


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
