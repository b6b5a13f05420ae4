"""detectron2's RetinaNet, from the model zoo's `.pkl` or a training's `.pth`.

Conventions (facebookresearch/detectron2, detectron2/): images in BGR less a mean, with std 1 because MSRA's first
convolution has absorbed it (config/defaults.py: INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD), and stages that
stride in the first 1x1 convolution as those do (MODEL.RESNETS.STRIDE_IN_1X1); short side 800, long side at most 1333,
padded to multiples of 32; P6 of C5 (modeling/backbone/fpn.py); anchors [scale ratio] around (column, row) x stride,
not rounded (modeling/anchor_generator.py, configs/Base-RetinaNet.yaml); classes from 0, the background beyond the last
row; score above 0.05, 1000 candidates per level, NMS at 0.5, 100 detections (modeling/meta_arch/retinanet.py).
"""

import math
import re
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from retina.errors import CheckpointError
from retina.interop.foreign import IMAGENET_STD, Conventions, Foreign, Renamed, Rule, Source, rename

NO_STD = (1.0, 1.0, 1.0)
MSRA = Conventions(bgr=True, std=NO_STD, stride_in_1x1=True, anchors_by_scale=True)


def recognises(keys: Set[str]) -> bool:
    return {"backbone.bottom_up.stem.conv1.weight", "head.cls_score.weight"} <= keys


def body_rules(prefix: str) -> list[Rule]:
    """Rules for a ResNet; they are those of detectron2's ImageNet weights too."""
    blocks = rf"{prefix}res([2-5])\.(\d+)\."

    def block(rest: Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
        return lambda match: f"backbone.layer{int(match[1]) - 1}.{match[2]}.{rest(match)}"

    return [
        (rf"{prefix}stem\.conv1\.weight", "backbone.stem.conv1.weight"),
        (rf"{prefix}stem\.conv1\.norm\.(\w+)", r"backbone.stem.bn1.\1"),
        (rf"{blocks}conv([123])\.weight", block(lambda match: f"conv{match[3]}.weight")),
        (rf"{blocks}conv([123])\.norm\.(\w+)", block(lambda match: f"bn{match[3]}.{match[4]}")),
        (rf"{blocks}shortcut\.weight", block(lambda match: "downsample.0.weight")),
        (rf"{blocks}shortcut\.norm\.(\w+)", block(lambda match: f"downsample.1.{match[3]}")),
    ]


def read(source: Source) -> Foreign:
    state = source.state
    finest = min((int(key[20:21]) for key in state if re.match(r"backbone\.fpn_lateral[2-5]\.", key)), default=3)
    has_norm = "head.cls_subnet.1.weight" in state

    def level(kind: str) -> Callable[[re.Match[str]], str]:
        return lambda match: f"fpn.{kind}.{int(match[1]) - finest}.{match[2]}"

    renamed = rename(
        state,
        [
            *body_rules(r"backbone\.bottom_up\."),
            (r"backbone\.fpn_lateral([2-5])\.(weight|bias)", level("lateral")),
            (r"backbone\.fpn_output([2-5])\.(weight|bias)", level("output")),
            (r"backbone\.top_block\.p6\.(weight|bias)", r"fpn.extra.0.\1"),
            (r"backbone\.top_block\.p7\.(weight|bias)", r"fpn.extra.1.\1"),
            (r"head\.cls_subnet\.(\d+)\.(weight|bias)", r"head.classification.convs.\1.\2"),
            (r"head\.bbox_subnet\.(\d+)\.(weight|bias)", r"head.box.convs.\1.\2"),
            (r"head\.cls_score\.(weight|bias)", r"head.classification.predict.\1"),
            (r"head\.bbox_pred\.(weight|bias)", r"head.box.predict.\1"),
        ],
        [
            (r"anchor_generator\.cell_anchors\.\d", "checked against the settings of anchors"),
            (r"pixel_(mean|std)", "went into the settings of the model"),
        ],
    )
    if has_norm:
        _drop_zero_biases(renamed, source.file)
    conventions, notes = colours(state.get("pixel_mean"), state.get("pixel_std"))
    cells = [state[key] for key in sorted(state) if key.startswith("anchor_generator.cell_anchors.")]
    return Foreign(
        program=f"detectron2's RetinaNet{' with GroupNorm' if has_norm else ''}",
        state=renamed.state,
        names=renamed.names,
        conventions=conventions,
        unused=renamed.unused,
        unknown=renamed.unknown,
        cell_anchors=cells or None,
        notes=notes,
    )


def _drop_zero_biases(renamed: Renamed, file: Path) -> None:
    """detectron2's convolutions keep a bias before a norm, where ours have none (modeling/meta_arch/retinanet.py,
    RetinaNetHead). Raises CheckpointError for one that is not 0, since no other number of ours makes up for it."""
    for key in [key for key in renamed.state if re.fullmatch(r"head\.\w+\.convs\.\d+\.bias", key)]:
        if renamed.state[key.replace(".bias", ".weight")].ndim != 4:
            continue
        published = renamed.names.pop(key)
        if renamed.state.pop(key).any():
            raise CheckpointError(
                f"{file}: {published}: a convolution before GroupNorm with a bias, which ours has not - give a "
                "detector whose head has no norm",
                code="unsupported",
            )
        renamed.unused[published] = "a bias of 0 before a norm"


def colours(mean: Tensor | None, std: Tensor | None) -> tuple[Conventions, list[str]]:
    """The conventions that a checkpoint's mean and std, of its own channel order, tell; both are None in newer ones."""
    if mean is None or std is None or mean.numel() != 3 or std.numel() != 3:
        note = (
            "the file holds no pixel_mean: channels are taken to be BGR, std 1 and the stride in 1x1, as is the default"
        )
        return MSRA, [note]
    means, stds = (tuple(round(value, 3) for value in tensor.flatten().tolist()) for tensor in (mean, std))
    bgr = not means[0] > means[2]
    msra = all(math.isclose(value, 1.0) for value in stds)
    if bgr:
        means, stds = means[::-1], stds[::-1]
    order = f"pixel_mean {list(means)} (as RGB) says {'BGR' if bgr else 'RGB'}"
    stride = f"pixel_std {list(stds)} that a bottleneck strides in {'1x1, as MSRA' if msra else '3x3'}"
    return replace(MSRA, bgr=bgr, mean=means, std=stds, stride_in_1x1=msra), [f"{order}, {stride}"]


def resnext(conventions: Conventions) -> Conventions:
    """Of the ResNeXts that came out of Caffe2, which took ImageNet's std and stride in 3x3 (configs/COCO-Detection/
    faster_rcnn_X_101_32x8d_FPN_3x.yaml)."""
    return replace(conventions, std=IMAGENET_STD, stride_in_1x1=False)
