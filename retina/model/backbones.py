"""Which network a name of a backbone stands for. Beside the road."""

from collections.abc import Sequence
from typing import Any

from retina.errors import ConfigError, check_choice
from retina.model.backbone import RESNETS, ResNet
from retina.model.half_resnet import HALVES
from retina.model.input_channels import adapt_input
from retina.model.mobilenet import MOBILENETS, MobileNet
from retina.model.timm_backbone import PREFIX, TimmBackbone


def build_backbone(
    name: str,
    weights: str | None,
    levels: Sequence[int],
    *,
    channels: int,
    norm_eps: float,
    stride_in_1x1: bool,
    **options: Any,
) -> ResNet | MobileNet | TimmBackbone:
    """The backbone for images of so many channels, with its weights, up to the last level that is needed.

    options: those that all have, `norm` and `frozen_stages`. Raises as `retina.model.retinanet.retinanet` does."""
    options["last_level"] = min(5, max(levels, default=5))
    if not name.startswith(PREFIX):
        check_choice(name, (*RESNETS, *HALVES, *MOBILENETS), "backbone")
    if name not in (*RESNETS, *HALVES) and (stride_in_1x1 or norm_eps != 1e-5):
        key = "stride_in_1x1" if stride_in_1x1 else "norm_eps"
        raise ConfigError(f"{name:.80} has its own - leave the default", code="contradiction", key=key)
    if name.startswith(PREFIX):
        name, first_level = name.removeprefix(PREFIX), min(levels, default=2)
        network = TimmBackbone(name, weights=weights, first_level=first_level, **options)
        adapt_input(network, channels, pretrained=weights is not None)
        return network
    body: ResNet | MobileNet
    if name in MOBILENETS:
        body = MobileNet(name, **options)
    else:
        body = ResNet(name, norm_eps=norm_eps, stride_in_1x1=stride_in_1x1, **options)
    adapt_input(body, channels)
    if weights:
        body.load_imagenet(name, weights)
    return body
