"""Light bottom-up networks of torchvision as a source of the maps C2..C5: MobileNets and EfficientNet. Beside the road.

All are made of inverted residuals (Sandler et al., arXiv 1801.04381): a 1x1 convolution to more channels, a convolution
of each channel by itself, perhaps a gate on the channels, and a 1x1 convolution back to few."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from retina.errors import check_choice
from retina.model.backbone import NORMS, check_frozen_stages
from retina.model.content import Content
from retina.model.folding import fold_norms, freeze
from retina.model.layers import run_norm
from retina.model.pretrained import imagenet_state, load_backbone


class _Network(NamedTuple):
    ends: tuple[int, ...]
    """How many of torchvision's `features` are the stem, and are there up to the end of C2, C3, C4 and C5."""
    channels: tuple[int, ...]
    """Of C2..C5."""
    eps: float = 1e-5
    """Of the norms, which published weights are made for."""
    options: tuple[tuple[str, float], ...] = ()


MOBILENETS = {
    "mobilenet_v2": _Network((2, 4, 7, 14, 18), (24, 32, 96, 320)),
    "mobilenet_v3_large": _Network((2, 4, 7, 13, 16), (24, 40, 112, 160), eps=1e-3),
    # nothing is left out at random, because a run that was cut off goes on bit for bit
    "efficientnet_b0": _Network((2, 3, 4, 6, 8), (24, 40, 112, 320), options=(("stochastic_depth_prob", 0.0),)),
}


class MobileNet(nn.Module):
    """The stages of a light classifier of torchvision, under its names. Returns C2, C3, C4, C5 at strides 4, 8, 16, 32,
    finest first.

    Each is the last map of its stride; the 1x1 convolution before the classifier is left out. With `last_level` below
    5, the stages above C_`last_level` are left out too, because nothing would use them."""

    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __init__(self, name: str, *, norm: str, frozen_stages: int, last_level: int = 5) -> None:
        """`norm` and `frozen_stages` as those of `ResNet`; the stem is all that comes before C2's stride.

        Raises ConfigError for values that are not known or out of range."""
        super().__init__()
        check_choice(name, MOBILENETS, "backbone")
        check_choice(norm, NORMS, "norm")
        check_frozen_stages(frozen_stages)
        network = MOBILENETS[name]
        options: dict[str, Any] = {"norm_layer": partial(NORMS[norm], eps=network.eps), **dict(network.options)}
        net = torchvision.models.get_model(name, weights=None, **options)
        self.ends = network.ends[:last_level]
        self.features = nn.Sequential(*list(net.features)[: self.ends[-1]])
        self.strides, self.channels = self.strides[: last_level - 1], network.channels[: last_level - 1]
        for module in self.features[: (0, *self.ends)[min(frozen_stages, last_level)]]:
            freeze(module)
        fold_norms(self)

    def forward(self, images: Float[Tensor, "B C H W"], content: Content | None = None) -> tuple[Tensor, ...]:
        """The maps, zero beyond the `content`."""
        content = content or Content(None, (images.shape[2], images.shape[3]))
        x, stride = content.keep(images, 1), 1
        maps = []
        for number, module in enumerate(self.features, 1):
            for block in module if type(module) is nn.Sequential else [module]:
                x, stride = _run_block(block, x, content, stride)
            if number in self.ends[1:]:
                maps.append(x)
        return tuple(maps)

    def load_imagenet(self, name: str, weights: str) -> None:
        """As that of `ResNet`."""
        load_backbone(self, imagenet_state(name, weights), name=name, weights=weights)


def _run_block(block: Any, x: Tensor, content: Content, stride: int) -> tuple[Tensor, int]:
    """The output of the first convolution or of an inverted residual for a map of this stride, and the output's stride.

    A map is made zero beyond the content before a layer that looks at other cells, and at the end. This comes before
    the activation, which needs its own result for the gradient and leaves zeros as they are."""
    shortcut, layers = x, list(_layers(block))
    while layers:
        layer: Any = layers.pop(0)
        if isinstance(layer, nn.Conv2d):
            stride *= layer.stride[0]
            x = run_norm(layers.pop(0), layer(x), content, stride)
            following = next((later for later in layers if isinstance(later, (nn.Conv2d, SqueezeExcitation))), None)
            if getattr(following, "kernel_size", None) != (1, 1):
                x = content.keep(x, stride)
        elif isinstance(layer, SqueezeExcitation):
            x = _excite(layer, x, content.mask(stride))
        else:
            x = layer(x)
    if getattr(block, "use_res_connect", False):
        x += shortcut
    return x, stride


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """In the order of use: each convolution with its norm behind it, gates, activations."""
    children = [] if isinstance(module, SqueezeExcitation) else list(module.children())
    for child in children:
        yield from _layers(child)
    if not children:
        yield module


def _excite(gate: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` with each channel multiplied by a number that its means over the content decide. `x` is zero beyond it."""
    if mask is None:
        return gate(x)
    mean = x.sum(dim=(2, 3), keepdim=True) / mask.sum(dim=(2, 3), keepdim=True)
    return x * gate.scale_activation(gate.fc2(gate.activation(gate.fc1(mean))))
