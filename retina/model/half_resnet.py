"""ResNets with half the channels, for training from scratch on a CPU. Beside the road."""

from collections.abc import Callable
from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

HALVES = {"resnet18_half": (2, 2, 2, 2), "resnet34_half": (3, 4, 6, 3)}
"""How many blocks their stages have. No weights of these are published."""


class _HalfResNet(torchvision.models.ResNet):
    """Half the channels everywhere, also in the stem: a quarter of the work."""

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == 64:  # the first: the stem is made already, and the weights of all are initialised afterwards
            self.inplanes = 32
            self.conv1 = nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False)
            self.bn1 = self._norm_layer(32)
        return super()._make_layer(block, planes // 2, *args, **options)


def resnet(name: str, norm_layer: Callable[..., nn.Module]) -> Any:
    """A ResNet of torchvision or one of the HALVES, without weights."""
    if name in HALVES:
        return _HalfResNet(BasicBlock, list(HALVES[name]), norm_layer=norm_layer)
    return torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
