"""Feature pyramids: top-down (Lin et al., "Feature Pyramid Networks for Object Detection", arXiv 1612.03144) with
RetinaNet's extra levels P6 and P7 (arXiv 1708.02002, section 4), and with a bottom-up path behind it (PAFPN)."""

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from retina.errors import ConfigError, check_choice
from retina.model.content import Content
from retina.model.layers import convolve


class FPN(nn.Module):
    """From the maps of a backbone to consecutive levels, e.g. P3..P7, all with the same number of channels.

    The coarsest map is C5, or C_l if the last level l is below 5.

    P_l for l <= 5: 1x1 lateral of C_l plus the nearest-neighbour upsampled level above, then a 3x3 convolution.
    P6: stride-2 3x3 convolution of C5 (the paper's) or P5 (torchvision's first recipe). P_l for l >= 7: ReLU (left out
    without `p7_relu`, as mmdetection does), then a stride-2 3x3 convolution of the level below.
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        *,
        channels: int,
        levels: tuple[int, ...],
        p6_from: str = "c5",
        p7_relu: bool = True,
    ) -> None:
        """in_channels: of the backbone's maps, finest first. levels: consecutive and rising, the first in 2..5."""
        super().__init__()
        if not levels or not 2 <= levels[0] <= 5 or any(b != a + 1 for a, b in pairwise(levels)):
            problem = f"{list(levels)} is no pyramid - give consecutive levels that start at 2..5, e.g. [3,4,5,6,7]"
            raise ConfigError(problem, code="out-of-range", key="levels")
        check_choice(p6_from, ("c5", "p5"), "p6_from")
        self.p6_from, self.p7_relu = p6_from, p7_relu
        self.strides = tuple(2**level for level in levels)
        inputs = in_channels[-sum(level <= 5 for level in levels) :]
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in inputs)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in inputs)
        self.extra = nn.ModuleList()
        for level in range(6, levels[-1] + 1):
            c = in_channels[-1] if level == 6 and p6_from == "c5" else channels
            self.extra.append(nn.Conv2d(c, channels, 3, stride=2, padding=1))
        self.apply(_initialize)

    def forward(
        self, features: tuple[Float[Tensor, "B _ _ _"], ...], content: Content | None = None
    ) -> tuple[Float[Tensor, "B C _ _"], ...]:
        """`features` are the backbone's maps, zero beyond the `content`; returns the levels, finest first, likewise."""
        content = content or Content(None, (0, 0))
        pyramid = self.merge(features[-len(self.lateral) :], content)
        for i, (conv, stride) in enumerate(zip(self.extra, self.strides[len(pyramid) :], strict=True)):
            below = features[-1] if i == 0 and self.p6_from == "c5" else pyramid[-1]
            pyramid.append(self.level(conv, F.relu(below) if i and self.p7_relu else below, content, stride))
        return tuple(pyramid)

    def merge(self, inputs: tuple[Float[Tensor, "B _ _ _"], ...], content: Content) -> list[Float[Tensor, "B C _ _"]]:
        """The levels up to P5, finest first, one per map."""
        strides = self.strides[: len(inputs)]
        merged = [self.level(self.lateral[-1], inputs[-1], content, strides[-1])]
        for lateral, feature, stride in zip(self.lateral[-2::-1], inputs[-2::-1], strides[-2::-1], strict=True):
            above = F.interpolate(merged[-1], size=feature.shape[-2:], mode="nearest")
            merged.append(self.level(lateral, feature, content, stride, above))
        levels = zip(self.output, reversed(merged), strides, strict=True)
        return [self.level(conv, x, content, stride) for conv, x, stride in levels]

    def level(
        self, conv: nn.Module, x: Tensor, content: Content, stride: int, added: Tensor | None = None
    ) -> Float[Tensor, "B C _ _"]:
        """conv(x) and what is added to it, zero beyond the content; `stride` is that of the result."""
        assert isinstance(conv, nn.Conv2d)
        return convolve(conv, [x], [content.mask(stride)], residuals=[] if added is None else [added])[0]


class PAFPN(FPN):
    """An FPN with a second, bottom-up path over the levels up to P5.

    For the finest level, N_l = P_l, which is also the output. Above it, N_l = P_l plus a stride-2 3x3 convolution of
    N_(l-1), and the output is a 3x3 convolution of N_l. There is no activation between, and P6 from P5 takes the new
    P5, as mmdetection builds it.
    Source: Liu et al., Path Aggregation Network for Instance Segmentation, CVPR 2018, section 3.1.
    """

    def __init__(self, in_channels: tuple[int, ...], *, channels: int, **options: Any) -> None:
        super().__init__(in_channels, channels=channels, **options)
        steps = len(self.lateral) - 1
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(steps))
        self.down_output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(steps))
        self.down.apply(_initialize)
        self.down_output.apply(_initialize)

    def merge(self, inputs: tuple[Float[Tensor, "B _ _ _"], ...], content: Content) -> list[Float[Tensor, "B C _ _"]]:
        first, *others = super().merge(inputs, content)
        pyramid, below = [first], first
        for level, down, output, stride in zip(others, self.down, self.down_output, self.strides[1:], strict=False):
            below = self.level(down, below, content, stride, level)
            pyramid.append(self.level(output, below, content, stride))
        return pyramid


NECKS = {"fpn": FPN, "pafpn": PAFPN}


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_uniform_(module.weight, a=1)
        nn.init.zeros_(module.bias)
