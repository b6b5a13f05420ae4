"""Bottom-up networks of timm (`pip install 'retina-detect[timm]'`), as a source of the maps C2..C5."""

from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retina.errors import CheckpointError, ConfigError
from retina.model.backbone import check_frozen_stages, is_file_name, load_backbone, read_weights

PREFIX = "timm:"
"""`model.backbone` of this kind is `timm:NAME`, with timm's own name, which may end in `.TAG` of its weights."""

_STRIDES = (4, 8, 16, 32)
_PROBE = (64, 160)
"""Height and width that no network was made for."""


class TimmBackbone(nn.Module):
    """The stages of any network of timm that gives feature maps. Returns the maps of strides 4, 8, 16 and 32, those
    that it has, finest first; the stages behind C_`last_level` are left out."""

    def __init__(
        self,
        name: str,
        *,
        weights: str | None,
        norm: str,
        frozen_stages: int,
        first_level: int = 2,
        last_level: int = 5,
    ) -> None:
        """`name` is timm's, after the prefix.

        weights: `DEFAULT` takes timm's own for this name (and tag), where there is a network; else a file with the
            state dict of the whole network, as timm names its parts; None: random.
        norm: `batch` leaves the network's norms as they are; `frozen` fixes the scale, shift and statistics of every
            BatchNorm. Other norms (LayerNorm) keep no statistics, and learn either way.
        frozen_stages: as in `ResNet`: 1 is all before C2's stage, 2 adds it, and so on.

        Raises ConfigError without timm, for an unknown name and for a network that has no such pyramid or takes images
        of one size only; CheckpointError for unusable weights."""
        super().__init__()
        check_frozen_stages(frozen_stages)
        if norm not in ("batch", "frozen"):
            raise ConfigError(f"model.norm: {norm!r} - a timm backbone has its own norms: give null, batch or frozen")
        net = _create(name)
        positions = {info["reduction"]: i for i, info in enumerate(net.feature_info.info)}
        available = [stride for stride in _STRIDES if stride in positions and stride <= 2**last_level]
        needed = [stride for stride in _STRIDES if 2**first_level <= stride <= 2**last_level]
        if not set(needed) <= set(available):
            found = ", ".join(map(str, sorted(positions)))
            raise ConfigError(f"model.backbone: {name!r} has maps of stride {found}, not {needed} - choose another")
        download = weights is not None and not is_file_name(weights)
        if download and weights != "DEFAULT":
            raise ConfigError(
                f"model.weights: {weights!r} is not known for {name} - give DEFAULT (timm's tag is part of the name, "
                "e.g. timm:convnext_tiny.fb_in1k), a file, or null"
            )
        indices = tuple(positions[stride] for stride in available)
        if download or indices != tuple(net.feature_info.out_indices):
            net = _create(name, out_indices=indices, pretrained=download)
        _check_maps(net, name, available)
        self.net = net
        self.strides = tuple(available)
        self.channels = tuple(net.feature_info.channels())
        if weights is not None and is_file_name(weights):
            _load_file(net, name, weights)
        _freeze(net, name, frozen_stages, all_norms=norm == "frozen")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        return _maps(self.net, images)


def _create(name: str, **options: Any) -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError(f"model.backbone: timm:{name} needs timm - pip install 'retina-detect[timm]'") from None
    # No other source of create_model: a weights file names its backbone, and must not say what to download.
    if ":" in name or "/" in name or not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models())) or "one of timm.list_models()"
        raise ConfigError(f"model.backbone: timm has no network {name!r:.60} - choose another, e.g. {near}")
    try:
        with suppress(TypeError):  # Swin and its like take every size, if told so; the others do not know the word
            return timm.create_model(name, features_only=True, strict_img_size=False, **options)
        return timm.create_model(name, features_only=True, **options)
    except Exception as fault:  # of the network's own making, or of the many kinds of broken connections
        if options.get("pretrained"):
            raise CheckpointError(
                f"model.weights: DEFAULT of timm:{name} could not be fetched ({_first_line(fault)}) - give "
                "model.weights=FILE with the network's state dict (.safetensors or .pth), or null to train from scratch"
            ) from None
        raise ConfigError(
            f"model.backbone: timm:{name} cannot give feature maps ({_first_line(fault)}) - choose another"
        ) from None


def _maps(net: Any, images: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
    maps = net(images)
    return tuple(x.permute(0, 3, 1, 2) for x in maps) if getattr(net, "output_fmt", "") == "NHWC" else tuple(maps)


@torch.no_grad()
def _check_maps(net: Any, name: str, strides: list[int]) -> None:
    """Raises ConfigError unless the network runs on any canvas, and what comes out is what it declares."""
    height, width = _PROBE
    expected = [(c, height // s, width // s) for c, s in zip(net.feature_info.channels(), strides, strict=True)]
    training = net.training
    try:
        found = [tuple(x.shape[1:]) for x in _maps(net.eval(), torch.zeros(1, 3, height, width))]
        problem = f"gives maps {found} of an image of {height} x {width}, not {expected}" if found != expected else ""
    except Exception as fault:  # of the network's own making
        problem = f"takes images of some sizes only ({_first_line(fault)})"
    if problem:
        raise ConfigError(f"model.backbone: timm:{name} {problem} - choose another")
    net.train(training)


def _load_file(net: Any, name: str, weights: str) -> None:
    """From names of the whole network or of one that gives feature maps, which timm spells otherwise."""
    own = {_spelling(key): key for key in net.state_dict()}
    state = {own.get(_spelling(key), key): value for key, value in read_weights(Path(weights)).items()}
    load_backbone(net, state, name=f"timm:{name}", weights=weights)


def _spelling(key: str) -> str:
    return key.removeprefix("model.").removeprefix("body.").replace("_", ".")


def _freeze(net: Any, name: str, stages: int, *, all_norms: bool) -> None:
    """Fixes the first `stages`, and the BatchNorms there or everywhere. timm registers modules in order of use."""
    from timm.layers import freeze_batch_norm_2d

    modules = list(net.named_modules())
    last = 0
    if stages:
        level_module = dict(zip(net.feature_info.reduction(), net.feature_info.module_name(), strict=True))
        wanted = _spelling(level_module.get(2 ** max(2, stages), "")) + "."
        inside = [i for i, (key, _) in enumerate(modules) if f"{_spelling(key)}.".startswith(wanted)]
        if not inside:
            raise ConfigError(f"model.frozen_stages: stages of timm:{name} are not known - give 0")
        last = inside[0] if stages == 1 else inside[-1] + 1
    for i, (key, module) in enumerate(modules):
        if i < last:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        if (i < last or all_norms) and isinstance(module, nn.BatchNorm2d):
            parent, _, child = key.rpartition(".")
            setattr(net.get_submodule(parent), child, freeze_batch_norm_2d(module))


def _first_line(fault: Exception) -> str:
    return next(iter(str(fault).splitlines()), type(fault).__name__)[:200]
