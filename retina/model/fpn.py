"""Feature pyramid (Lin et al., "Feature Pyramid Networks for Object Detection", arXiv 1612.03144), with RetinaNet's
extra levels P6 and P7 (arXiv 1708.02002, section 4)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from retina.errors import ConfigError

P6_SOURCES = ("c5", "p5")


class FPN(nn.Module):
    """Maps C2..C5 to the wanted consecutive levels, e.g. P3..P7, all with the same number of channels.

    Levels that end below 5 need no C5, and take the maps up to their last level.

    P_l for l <= 5: 1x1 lateral of C_l plus the nearest-neighbour upsampled level above, then a 3x3 convolution.
    P6: stride-2 3x3 convolution of C5 (the paper's) or P5 (torchvision's first recipe). P_l for l >= 7: ReLU, then a
    stride-2 3x3 convolution of the level below.
    """

    def __init__(self, in_channels: tuple[int, ...], *, channels: int, levels: tuple[int, ...], p6_from: str) -> None:
        """`in_channels` of C2..C5. `levels` are consecutive and rise, and start at 2..5."""
        super().__init__()
        first, last = (levels[0], levels[-1]) if levels else (0, 0)
        if not levels or tuple(levels) != tuple(range(first, last + 1)) or not 2 <= first <= 5:
            raise ConfigError(
                f"model.levels: {list(levels)} is no pyramid - give consecutive levels that start at 2..5, "
                "e.g. [3,4,5,6,7]"
            )
        if p6_from not in P6_SOURCES:
            raise ConfigError(f"model.p6_from: {p6_from!r} is not known - choose c5 or p5")
        self.first, self.p6_from = first, p6_from
        self.strides = tuple(2**level for level in levels)
        inputs = in_channels[first - 2 :]
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in inputs)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in inputs)
        self.extra = nn.ModuleList()
        for level in range(6, last + 1):
            c = in_channels[-1] if level == 6 and p6_from == "c5" else channels
            self.extra.append(nn.Conv2d(c, channels, 3, stride=2, padding=1))
        for conv in (*self.lateral, *self.output, *self.extra):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: tuple[Float[Tensor, "B _ _ _"], ...]) -> tuple[Float[Tensor, "B C _ _"], ...]:
        """`features` are C2..C5 (or up to the last level); returns the levels, finest first."""
        inputs = features[self.first - 2 :]
        merged = [self.lateral[-1](inputs[-1])]
        for lateral, feature in zip(self.lateral[-2::-1], inputs[-2::-1], strict=True):
            above = F.interpolate(merged[-1], size=feature.shape[-2:], mode="nearest")
            merged.append(lateral(feature).add_(above))  # a convolution's backward needs no output
        pyramid = [conv(x) for conv, x in zip(self.output, reversed(merged), strict=True)]
        for i, conv in enumerate(self.extra):
            if i == 0:
                pyramid.append(conv(features[-1] if self.p6_from == "c5" else pyramid[-1]))
            else:
                pyramid.append(conv(F.relu(pyramid[-1])))
        return tuple(pyramid)
