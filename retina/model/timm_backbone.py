"""Bottom-up networks of timm (`pip install 'retina-detect[timm]'`), as a source of the maps C2..C5. Beside the
road."""

from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retina.errors import CheckpointError, ConfigError, check_choice
from retina.model.backbone import check_frozen_stages
from retina.model.pretrained import check_digest, first_line, installed, is_file_name, load_backbone, read_weights

PREFIX = "timm:"
"""`backbone` is `timm:NAME`, with timm's own name, which may end in `.TAG` of its weights."""

_STRIDES = (4, 8, 16, 32)
_PROBE = (64, 160)
"""Height and width that no network was designed for."""


PACKAGED = {"tf_efficientnet_lite0": "efficientnet-lite0-57934424.pth"}
"""Files with weights of a network that an installed package brings: `DEFAULT` takes them, and needs no network then."""


class TimmBackbone(nn.Module):
    """The stages of any network of timm that gives feature maps. Returns its maps of strides 4, 8, 16 and 32, finest
    first; the stages above C_`last_level` are left out.

    Its own layers do not know the content of images (`retina.model.parts`): a detection near an edge may depend a
    little on the padding, as it cannot with our ResNets."""

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

        weights: `DEFAULT` is the file of `PACKAGED` if it is installed, else timm's own for this name (and tag), which
            are downloaded. Otherwise a file with the state dict of the whole network under timm's names or those of
            efficientnet-pytorch; None: random.
        norm: `batch` leaves the network's norms as they are; `frozen` fixes the scale, shift and statistics of every
            BatchNorm. Other norms (LayerNorm) keep no statistics, and learn in both cases.
        frozen_stages: as in `ResNet`: 1 is everything before C2's stage, 2 adds it, and so on.

        Raises ConfigError without timm, for an unknown name and for a network that has no such pyramid or takes images
        of one size only; CheckpointError for unusable weights."""
        super().__init__()
        check_frozen_stages(frozen_stages)
        check_choice(norm, ("batch", "frozen"), "norm")
        net = _create(name)
        positions = {info["reduction"]: i for i, info in enumerate(net.feature_info.info)}
        available = [stride for stride in _STRIDES if stride in positions and stride <= 2**last_level]
        needed = [stride for stride in _STRIDES if 2**first_level <= stride <= 2**last_level]
        if not set(needed) <= set(available):
            raise _unsuitable(f"timm:{name} has maps of stride {sorted(positions)}, not {needed}")
        if weights == "DEFAULT" and (file := installed(PACKAGED.get(name, ""))):
            check_digest(file)
            weights = str(file)
        download = weights is not None and not is_file_name(weights)
        if download:  # timm's tag is part of the name, as in timm:convnext_tiny.fb_in1k
            check_choice(weights, ("DEFAULT", "FILE", None), "weights")
        indices = tuple(positions[stride] for stride in available)
        if download or indices != tuple(net.feature_info.out_indices):
            net = _create(name, out_indices=indices, pretrained=download)
        _check_maps(net, name, available)
        _freeze_unused(net, len(needed))
        self.net = net
        self.strides = tuple(available)
        self.channels = tuple(net.feature_info.channels())
        if weights is not None and is_file_name(weights):
            _load_file(net, name, weights)
        _freeze(net, name, frozen_stages, all_norms=norm == "frozen")

    def forward(self, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        return _maps(self.net, images)


def _create(name: str, **options: Any) -> Any:
    try:
        import timm
    except ImportError:
        problem = f"timm:{name} needs timm - pip install 'retina-detect[timm]'"
        raise ConfigError(problem, code="missing-package", key="backbone") from None
    # Only timm's own networks: a weights file names its backbone, and must not choose another source to download from.
    if ":" in name or "/" in name or not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models())) or "one of timm.list_models()"
        problem = f"timm has no network {name!r:.60} - choose another, e.g. {near}"
        raise ConfigError(problem, code="unknown-value", key="backbone")
    try:
        with suppress(TypeError):  # Swin takes every size with this argument, which most networks do not know
            return timm.create_model(name, features_only=True, strict_img_size=False, **options)
        return timm.create_model(name, features_only=True, **options)
    except Exception as fault:  # networks and broken connections raise errors of many types
        if options.get("pretrained"):
            problem = f"DEFAULT of timm:{name} could not be fetched ({first_line(fault)}) - give weights=FILE with the "
            problem += "network's state dict (.safetensors or .pth), or null to train from scratch"
            raise CheckpointError(problem, code="download", key="weights") from None
        raise _unsuitable(f"timm:{name} cannot give feature maps ({first_line(fault)})") from None


def _unsuitable(problem: str) -> ConfigError:
    return ConfigError(f"{problem} - choose another", code="unsuitable-backbone", key="backbone")


def _maps(net: Any, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
    maps = net(images)
    return tuple(x.permute(0, 3, 1, 2) for x in maps) if getattr(net, "output_fmt", "") == "NHWC" else tuple(maps)


@torch.no_grad()
def _check_maps(net: Any, name: str, strides: list[int]) -> None:
    """Raises ConfigError unless the network runs on any canvas and its maps have the declared shapes."""
    height, width = _PROBE
    expected = [(c, height // s, width // s) for c, s in zip(net.feature_info.channels(), strides, strict=True)]
    training = net.training
    try:
        shapes = [tuple(x.shape[1:]) for x in _maps(net.eval(), torch.zeros(1, 3, height, width))]
        problem = f"gives maps {shapes} of an image of {height} x {width}, not {expected}" if shapes != expected else ""
    except Exception as fault:  # networks raise errors of many types
        problem = f"takes images of some sizes only ({first_line(fault)})"
    if problem:
        raise _unsuitable(f"timm:{name} {problem}")
    net.train(training)


@torch.enable_grad()
def _freeze_unused(net: Any, num_maps: int) -> None:
    """Parameters that none of the last maps depends on need no gradient: several processes would wait for theirs."""
    training, parameters = net.training, list(net.parameters())
    maps = _maps(net.eval(), torch.zeros(1, 3, *_PROBE))[-num_maps:]
    gradients = torch.autograd.grad(torch.stack([x.sum() for x in maps]).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
    net.train(training)


def _load_file(net: Any, name: str, weights: str) -> None:
    """timm names the tensors of a whole network and of one that gives feature maps differently; both are accepted, and
    those of efficientnet-pytorch, which have the same order."""
    names = {_spelling(key): key for key in net.state_dict()}
    state = {names.get(_spelling(key), key): value for key, value in read_weights(Path(weights)).items()}
    if "_conv_stem.weight" in state:
        state = dict(zip(net.state_dict(), state.values(), strict=False))  # without the layers of the classifier
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
        prefix = _spelling(level_module.get(2 ** max(2, stages), "")) + "."
        inside = [i for i, (key, _) in enumerate(modules) if f"{_spelling(key)}.".startswith(prefix)]
        if not inside:
            problem = f"stages of timm:{name} are not known - give 0"
            raise ConfigError(problem, code="contradiction", key="frozen_stages")
        last = inside[0] if stages == 1 else inside[-1] + 1
    for i, (key, module) in enumerate(modules):
        if i < last:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        if (i < last or all_norms) and isinstance(module, nn.BatchNorm2d):
            parent, _, child = key.rpartition(".")
            setattr(net.get_submodule(parent), child, freeze_batch_norm_2d(module))
