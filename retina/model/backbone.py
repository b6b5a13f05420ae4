"""Bottom-up networks: torchvision's ResNets as a source of the maps C2..C5 with declared strides and channels."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from retina.errors import ConfigError, check_choice
from retina.model.content import Content, GroupNorm
from retina.model.folding import FoldedBatchNorm2d, FoldedFrozenBatchNorm2d, fold_norms, freeze
from retina.model.half_resnet import HALVES, resnet
from retina.model.layers import norm_relu
from retina.model.pretrained import imagenet_state, load_backbone

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


def _group_norm(channels: int, *, eps: float) -> GroupNorm:
    return GroupNorm(math.gcd(32, channels), channels, eps=eps)


NORMS: dict[str, Any] = {"batch": FoldedBatchNorm2d, "frozen": FoldedFrozenBatchNorm2d, "group": _group_norm}


class ResNet(nn.Module):
    """The stages of a torchvision ResNet. Returns C2, C3, C4, C5 at strides 4, 8, 16, 32, finest first.

    With `last_level` below 5, the stages above C_`last_level` are left out, because nothing would use them."""

    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __init__(
        self,
        name: str,
        *,
        norm: str,
        frozen_stages: int,
        last_level: int = 5,
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
    ) -> None:
        """`frozen_stages` counts from the input: 1 is the stem, 2 adds C2's stage, up to 5. Parameters of frozen stages
        need no gradient and their BatchNorm keeps its statistics. `stride_in_1x1`: a bottleneck that halves the map
        does so in its first convolution (He et al., CVPR 2016, and weights made for Caffe), not in its 3x3 one.

        Raises ConfigError for values that are not known, out of range or contradict each other."""
        super().__init__()
        check_choice(name, (*RESNETS, *HALVES), "backbone")
        check_choice(norm, NORMS, "norm")
        check_frozen_stages(frozen_stages)
        if not 0 <= norm_eps < math.inf:
            raise ConfigError(f"{norm_eps} - give a small number, e.g. 1e-5", code="out-of-range", key="norm_eps")
        net = resnet(name, partial(NORMS[norm], eps=norm_eps))
        if stride_in_1x1:
            _move_strides(net, name)
        self.stem = nn.Sequential()
        for layer in ("conv1", "bn1", "relu", "maxpool"):
            self.stem.add_module(layer, getattr(net, layer))
        for i in range(1, last_level):
            self.add_module(f"layer{i}", getattr(net, f"layer{i}"))
        self.strides = self.strides[: last_level - 1]
        width = net.layer1[-1].conv1.in_channels
        self.channels = tuple(width * stride // 4 for stride in self.strides)
        for stage in self.stages[:frozen_stages]:
            freeze(stage)
        fold_norms(self)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return tuple(self.children())

    def forward(self, images: Float[Tensor, "B C H W"], content: Content | None = None) -> tuple[Tensor, ...]:
        """The maps, zero beyond the `content`."""
        content = content or Content(None, (images.shape[2], images.shape[3]))
        stem: Any = self.stem
        x = norm_relu(stem.conv1, stem.bn1, content.keep(images, 1), content, 2)
        x = content.keep(stem.maxpool(x), 4)
        features, stride = [], 4
        for stage in self.stages[1:]:
            *blocks, last = stage.children()
            for block in (*blocks, last):
                x, stride = _run_block(block, x, content, stride, is_last=block is last)
            features.append(x)
        return tuple(features)

    def load_imagenet(self, name: str, weights: str) -> None:
        """Loads classification weights: a torchvision weights name (`DEFAULT`, `IMAGENET1K_V1`, ...) or a local file.

        Raises CheckpointError for a file that is missing, unreadable, of another architecture or cannot be fetched."""
        state = imagenet_state(name, weights)
        renamed = {f"stem.{key}" if key.startswith(("conv1.", "bn1.")) else key: state[key] for key in state}
        load_backbone(self, renamed, name=name, weights=weights)


def _run_block(block: Any, x: Tensor, content: Content, stride: int, *, is_last: bool) -> tuple[Tensor, int]:
    """The output of a residual block of torchvision for a map of this stride, and the output's stride.

    A map is made zero beyond the content where a convolution will look at its neighbours: before a 3x3 one, and at the
    end of a stage. This comes before the ReLU, which needs its own result for the gradient."""
    layers = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        layers.append((block.conv3, block.bn3))
    out = x
    for (conv, norm), (following, _) in pairwise(layers):
        stride *= conv.stride[0]
        out = norm_relu(conv, norm, out, content, stride, keep=following.kernel_size != (1, 1))
    conv, norm = layers[-1]
    stride *= conv.stride[0]
    keep = is_last or isinstance(block, BasicBlock)
    return norm_relu(conv, norm, out, content, stride, keep=keep, shortcut=(x, block.downsample)), stride


def check_frozen_stages(count: int) -> None:
    """Raises ConfigError for a number of stages that no backbone has."""
    if not 0 <= count <= 5:
        raise ConfigError(f"{count} - give 0 (none) to 5 (all)", code="out-of-range", key="frozen_stages")


def _move_strides(net: nn.Module, name: str) -> None:
    """Puts the strides of all bottlenecks from their 3x3 into their first 1x1 convolution."""
    blocks = [module for module in net.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        problem = f"{name} has no bottlenecks - give false, or resnet50 and larger"
        raise ConfigError(problem, code="contradiction", key="stride_in_1x1")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
