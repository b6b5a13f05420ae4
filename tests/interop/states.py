"""State dicts of other programs by the formula of their names: no weights, but the right names and shapes, and in every
tensor one number that only its name tells. A tensor of one number takes no memory until it is copied."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from retina.interop.convert import Imported
from retina.model.weights import save_detector

CHANNELS = 8


def number_of(name: str) -> float:
    """Of a tensor of this name: exact in float16."""
    return (zlib.crc32(name.encode()) % 1000 + 1) / 1024


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.tensor(number_of(name)).expand(shape) for name, shape in shapes.items()}


def body(name: str = "resnet18", *, counted: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of a ResNet under torchvision's names, without its classifier; `counted` as norms that were trained do."""
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    kept = [key for key in state if not key.startswith("fc.") and (counted or "num_batches" not in key)]
    return {key: tuple(state[key].shape) for key in kept}


def detectron2_name(key: str) -> str:
    """Of a tensor of a ResNet that torchvision calls `key`."""
    if not key.startswith("layer"):
        return "stem." + key.replace("bn1", "conv1.norm")
    stage, block, *rest = key.split(".")
    inner = ".".join(rest).replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    for i in "123":
        inner = inner.replace(f"bn{i}", f"conv{i}.norm")
    return f"res{int(stage[5:]) + 1}.{block}.{inner}"


def detectron2(num_classes: int = 80, *, backbone: str = "resnet50", anchors: int = 9) -> dict[str, Tensor]:
    shapes = {f"backbone.bottom_up.{detectron2_name(key)}": shape for key, shape in body(backbone).items()}
    inputs = (512, 1024, 2048) if backbone == "resnet50" else (128, 256, 512)
    for level, channels in zip((3, 4, 5), inputs, strict=True):
        shapes |= convolution(f"backbone.fpn_lateral{level}", channels, CHANNELS, 1)
        shapes |= convolution(f"backbone.fpn_output{level}", CHANNELS, CHANNELS)
    shapes |= convolution("backbone.top_block.p6", inputs[-1], CHANNELS)
    shapes |= convolution("backbone.top_block.p7", CHANNELS, CHANNELS)
    for i in (0, 2):
        shapes |= convolution(f"head.cls_subnet.{i}", CHANNELS, CHANNELS)
        shapes |= convolution(f"head.bbox_subnet.{i}", CHANNELS, CHANNELS)
    shapes |= convolution("head.cls_score", CHANNELS, anchors * num_classes)
    shapes |= convolution("head.bbox_pred", CHANNELS, anchors * 4)
    return filled(shapes)


def mmdetection(num_classes: int = 80, *, backbone: str = "resnet18") -> dict[str, Tensor]:
    shapes = {f"backbone.{key}": shape for key, shape in body(backbone, counted=True).items()}
    inputs = (512, 1024, 2048) if backbone == "resnet50" else (128, 256, 512)
    for i, channels in enumerate(inputs):
        shapes |= convolution(f"neck.lateral_convs.{i}.conv", channels, CHANNELS, 1)
        shapes |= convolution(f"neck.fpn_convs.{i}.conv", CHANNELS, CHANNELS)
    shapes |= convolution("neck.fpn_convs.3.conv", inputs[-1], CHANNELS)
    shapes |= convolution("neck.fpn_convs.4.conv", CHANNELS, CHANNELS)
    for i in (0, 1):
        shapes |= convolution(f"bbox_head.cls_convs.{i}.conv", CHANNELS, CHANNELS)
        shapes |= convolution(f"bbox_head.reg_convs.{i}.conv", CHANNELS, CHANNELS)
    shapes |= convolution("bbox_head.retina_cls", CHANNELS, 9 * num_classes)
    shapes |= convolution("bbox_head.retina_reg", CHANNELS, 9 * 4)
    return filled(shapes)


def yhenon(num_classes: int = 80) -> dict[str, Tensor]:
    shapes = dict(body(counted=True))
    for level, channels in zip((3, 4, 5), (128, 256, 512), strict=True):
        shapes |= convolution(f"fpn.P{level}_1", channels, CHANNELS, 1)
        shapes |= convolution(f"fpn.P{level}_2", CHANNELS, CHANNELS)
    shapes |= convolution("fpn.P6", 512, CHANNELS) | convolution("fpn.P7_2", CHANNELS, CHANNELS)
    for tower in ("regressionModel", "classificationModel"):
        for i in (1, 2, 3, 4):
            shapes |= convolution(f"{tower}.conv{i}", CHANNELS, CHANNELS)
    shapes |= convolution("regressionModel.output", CHANNELS, 9 * 4)
    shapes |= convolution("classificationModel.output", CHANNELS, 9 * num_classes)
    return filled(shapes)


def convolution(name: str, inputs: int, outputs: int, side: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def numbered(like: Tensor) -> Tensor:
    """Another number in every place, exact in float32."""
    return torch.arange(like.numel(), dtype=torch.float32).view(like.shape)


def write_detector(imported: Imported, file: Path) -> Path:
    save_detector(file, imported.state, imported.card)
    return file
