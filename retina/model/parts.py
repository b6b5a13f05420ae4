"""Backbones, necks and heads of other packages, described by a dotted name and keyword arguments. Beside the road.

What each must be like:
- a backbone is made with `last_level`, the last level that is needed (5 at most), takes images as float [B C H W],
  normalised, and returns a tuple of maps, the finest first; `channels` and `strides` say what they are. The last one
  has stride 2^last_level.
- a neck is made with `in_channels` of these maps, `levels` and `channels`, takes the maps and returns one map of
  `channels` for each level; `strides` are theirs.
- a head is made with `in_channels`, `num_classes` and `num_anchors` of a cell, takes the levels and returns three
  tuples, as `retina.model.head.Head` does: class logits [B A_l K] of every level, deltas [B A_l 4], and quality logits
  [B A_l] or nothing.

So that nothing depends on the padding of a batch, each may take a second argument: a backbone and a neck the
`retina.model.content.Content` of the images, to return maps that are zero beyond it; a head the mask [B 1 H W] of each
level, or None. What the maps of a part with one argument hold beyond the content is set to zero behind it; but between
its layers padding is not zero, so what it finds near an image's right and lower edges depends a little on the canvas.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from retina.errors import ConfigError
from retina.model.content import Content
from retina.plugins import find, prefixes

PARTS = ("backbone", "neck", "head")


def missing_plugins(arguments: Mapping[str, Any], plugins: Sequence[str]) -> dict[str, str]:
    """Which parts among the `arguments` of a model are of packages that `plugins` does not name, by dotted name."""
    sections = {key: arguments[key] for key in PARTS if _is_section(arguments.get(key))}
    targets: dict[str, str] = {key: section["_target_"] for key, section in sections.items()}
    return {key: target for key, target in targets.items() if not target.startswith(prefixes(plugins))}


def make_part(section: Mapping[str, Any], key: str, plugins: Sequence[str], **arguments: Any) -> Any:
    """The part that a section `{_target_: mylab.backbones.Tiny, width: 16}` describes, made with `arguments` too.

    Raises ConfigError for a class that is not below `plugins` or is no module, and for arguments that it does not take.
    """
    factory = part_class(section, key, plugins)
    try:
        return factory(**{name: value for name, value in section.items() if name != "_target_"} | arguments)
    except (TypeError, ValueError) as fault:
        problem = f"{section['_target_']}: {fault} - correct these values"
        raise ConfigError(problem, code="wrong-value", key=key) from None


def part_class(section: Mapping[str, Any], key: str, plugins: Sequence[str]) -> type[nn.Module]:
    if not _is_section(section):
        problem = f"{dict(section)!r:.80} has no _target_ - give the dotted name of a class"
        raise ConfigError(problem, code="missing", key=key)
    factory = find(section["_target_"], prefixes(plugins), key=key)
    if not inspect.isclass(factory) or not issubclass(factory, nn.Module):
        problem = f"{section['_target_']} is no torch.nn.Module - give a class of modules"
        raise ConfigError(problem, code="wrong-type", key=key)
    return factory


def check_backbone(part: Any, levels: Sequence[int]) -> None:
    """Raises ConfigError unless the maps that a backbone declares end where these levels need them."""
    channels, strides = tuple(getattr(part, "channels", ())), tuple(getattr(part, "strides", ()))
    needed = tuple(2**level for level in levels if level <= 5)
    if not needed or len(channels) != len(strides) or strides[-len(needed) :] != needed:
        problem = f"its strides {strides} and channels {channels} do not end in maps of strides {needed}"
        raise ConfigError(f"{problem} - mind last_level, or choose other levels", code="wrong-shape", key="backbone")


def _is_section(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("_target_"), str)


def run_part(part: Any, x: Any, content: Content) -> tuple[Tensor, ...]:
    """The maps of a backbone or neck, zero beyond the content, also of one that does not know what that is."""
    if takes_two(part):
        return tuple(part(x, content))
    maps = tuple(part(x))
    masks = (content.mask_of(y, stride) for y, stride in zip(maps, part.strides, strict=True))
    return tuple(y if mask is None else y * mask for y, mask in zip(maps, masks, strict=True))


def takes_two(part: nn.Module) -> bool:
    """Whether the part of a detector also takes the content of its maps."""
    return len(inspect.signature(part.forward).parameters) > 1
