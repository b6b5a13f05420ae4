"""What the shapes of tensors under our names say about the model they belong to."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from retina.errors import CheckpointError, ConfigError
from retina.model.formats.conventions import Conventions

FIRST_CONVOLUTION = "backbone.stem.conv1.weight"
CLASS_LAYER, BOX_LAYER = "head.classification.predict", "head.box.predict"

_RESNETS = {
    # blocks of the third stage, bottlenecks or not, rows and columns of the first 3x3 convolution
    (2, False, 64, 64): "resnet18",
    (6, False, 64, 64): "resnet34",
    (6, True, 64, 64): "resnet50",
    (23, True, 64, 64): "resnet101",
    (36, True, 64, 64): "resnet152",
    (6, True, 128, 4): "resnext50_32x4d",
    (23, True, 256, 8): "resnext101_32x8d",
    (23, True, 256, 4): "resnext101_64x4d",
    (6, True, 128, 128): "wide_resnet50_2",
    (23, True, 128, 128): "wide_resnet101_2",
}


def shape_of(state: dict[str, Tensor], key: str, dimensions: int, file: Path) -> tuple[int, ...]:
    """Raises CheckpointError for a tensor that is missing or has another number of dimensions, or none of a size."""
    if key not in state:
        raise CheckpointError(f"{file}: lacks what would be {key} here - give the whole state dict of a model")
    shape = tuple(state[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{file}: {key} is {list(shape)}, which has no place in a RetinaNet - give another file")
    return shape


def backbone_name(state: dict[str, Tensor], file: Path) -> str:
    first = shape_of(state, "backbone.layer1.0.conv2.weight", 4, file)
    blocks = {match[1] for key in state if (match := re.match(r"backbone\.layer3\.(\d+)\.", key))}
    found = len(blocks), "backbone.layer1.0.conv3.weight" in state, first[0], first[1]
    if found not in _RESNETS:
        raise CheckpointError(
            f"{file}: its backbone, of {len(blocks)} blocks in stage 3 and {first[0]}x{first[1]} channels in the first "
            f"3x3 convolution, is not known - choose one with {', '.join(_RESNETS.values())}"
        )
    return _RESNETS[found]


def backbone_norm(state: dict[str, Tensor]) -> str:
    """GroupNorm has no statistics, and only a norm that was trained counts its batches."""
    keys = [key for key in state if key.startswith("backbone.")]
    if not any(key.endswith(".running_var") for key in keys):
        return "group"
    return "batch" if any(key.endswith(".num_batches_tracked") for key in keys) else "frozen"


def num_anchors(state: dict[str, Tensor], file: Path, told: Conventions) -> int:
    """Per cell."""
    (rows,) = shape_of(state, f"{BOX_LAYER}.bias", 1, file)
    expected = len(told.anchor_scales) * len(told.anchor_ratios)
    if rows != 4 * expected:
        raise ConfigError(
            f"{file}: predicts {rows / 4:g} boxes per cell, where {len(told.anchor_scales)} scales and "
            f"{len(told.anchor_ratios)} ratios make {expected} - give conventions.anchor_scales and "
            "conventions.anchor_ratios as it was trained with"
        )
    return expected


def model_arguments(state: dict[str, Tensor], file: Path, told: Conventions, *, num_classes: int) -> dict[str, Any]:
    """Keyword arguments of `retinanet`."""
    channels = shape_of(state, "fpn.lateral.0.weight", 4, file)[0]
    inputs, extra = (
        len({match[1] for key in state if (match := re.match(rf"fpn\.{part}\.(\d+)\.", key))})
        for part in ("lateral", "extra")
    )
    convolutions = [
        key for key, value in state.items() if re.match(r"head\.box\.convs\.\d+\.weight", key) and value.ndim == 4
    ]
    last_level = shape_of(state, f"fpn.lateral.{inputs - 1}.weight", 4, file)[1]
    p6_inputs = shape_of(state, "fpn.extra.0.weight", 4, file)[1] if extra else last_level
    head_channels = shape_of(state, f"{BOX_LAYER}.weight", 4, file)[1]
    return {
        "num_classes": num_classes,
        "backbone": backbone_name(state, file),
        "norm": backbone_norm(state),
        "norm_eps": told.norm_eps,
        "stride_in_1x1": told.stride_in_1x1,
        "levels": list(range(6 - inputs, 6 + extra)),
        "fpn_channels": channels,
        "p6_from": "c5" if p6_inputs == last_level else "p5",
        "p7_relu": told.p7_relu,
        "head_convs": len(convolutions),
        "head_channels": None if head_channels == channels else head_channels,
        "head_norm": "group" if len(convolutions) and "head.box.convs.1.weight" in state else None,
        "anchor_sizes": None if told.anchor_sizes is None else list(told.anchor_sizes),
        "anchor_scales": list(told.anchor_scales),
        "anchor_ratios": list(told.anchor_ratios),
        "anchors_rounded": told.anchors_rounded,
        "anchors_spread": told.anchors_spread,
        "anchor_offset": told.anchor_offset,
        "mean": list(told.mean),
        "std": list(told.std),
    }
