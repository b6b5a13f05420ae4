"""The first convolution of a backbone for another number of channels than the three of RGB. Beside the road."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from retina.errors import ConfigError

RGB = 3


def adapt_input(backbone: nn.Module, channels: int, *, pretrained: bool = False) -> None:
    """Makes a backbone that was built for RGB take images of so many channels.

    Without weights to come, and before they are loaded, the convolution is drawn anew, as torchvision draws those of
    its ResNets. `pretrained`: it holds such weights, which are carried over (`weights_for`).

    Raises ConfigError if the first convolution is not one of three inputs."""
    if channels == RGB:
        return
    conv = _first(backbone)[1]
    if conv is None or conv.in_channels != RGB or conv.groups != 1:
        problem = f"images have {channels} channels, and this backbone does not begin with a convolution of RGB"
        raise ConfigError(f"{problem} - choose another", code="unsuitable-backbone", key="backbone")
    with torch.no_grad():
        weight = weights_for(conv.weight, channels)
        if not pretrained:
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    is_trained = conv.weight.requires_grad or pretrained
    conv.in_channels, conv.weight = channels, nn.Parameter(weight, requires_grad=is_trained)


def adapt_state(backbone: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, of which those of the first convolution are made for the channels that `backbone` takes. If that
    changes them, the convolution is trained whatever stages are frozen: it has never seen such images."""
    name, conv = _first(backbone)
    key = f"{name}.weight"
    weight = state.get(key)
    if conv is None or weight is None or weight.ndim != 4 or weight.shape[1] == conv.in_channels:
        return dict(state)
    conv.weight.requires_grad_(True)
    return {**state, key: weights_for(weight, conv.in_channels)}


def weights_for(weight: Tensor, channels: int) -> Tensor:
    """Weights [O C h w] for so many inputs: those of C channels as they are if there are no fewer, and of all others
    their mean; scaled so that an image whose channels are all equal gives what it gave before."""
    before = weight.shape[1]
    parts = [weight] if channels >= before else []
    mean = weight.mean(dim=1, keepdim=True).expand(-1, channels - before * len(parts), -1, -1)
    return torch.cat([*parts, mean], dim=1) * (before / channels)


def _first(backbone: nn.Module) -> tuple[str, nn.Conv2d | None]:
    convs = ((name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d))
    return next(convs, ("", None))
