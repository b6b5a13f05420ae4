"""detectron2's RetinaNet, yhenon's, and plain ResNets trained on ImageNet: each is a table of names and conventions.

detectron2 (facebookresearch/detectron2, detectron2/), from the model zoo's `.pkl` or a training's `.pth`: images in BGR
less a mean, with std 1 because MSRA's first convolution has absorbed it (config/defaults.py: INPUT.FORMAT,
MODEL.PIXEL_MEAN, MODEL.PIXEL_STD), and stages that stride in the first 1x1 convolution as those do
(MODEL.RESNETS.STRIDE_IN_1X1); short side 800, long side at most 1333, padded to multiples of 32; P6 of C5
(modeling/backbone/fpn.py); anchors [scale ratio] around (column, row) x stride, not rounded
(modeling/anchor_generator.py, configs/Base-RetinaNet.yaml); classes from 0, the background beyond the last row; score
above 0.05, 1000 candidates per level, NMS at 0.5, 100 detections (modeling/meta_arch/retinanet.py).

yhenon/pytorch-retinanet (retinanet/): images in RGB with ImageNet's mean and std, short side 608 and long side at most
1024, padded to multiples of 32 (dataloader.py); statistics of norms fixed (`freeze_bn` in train.py); P6 of C5
(model.py); anchors [ratio scale] around the middle of cells, (column + 1/2, row + 1/2) x stride, not rounded
(anchors.py); deltas that are multiplied with (0.1, 0.1, 0.2, 0.2) (utils.py, BBoxTransform); score above 0.05, NMS at
0.5, as many candidates and detections as there are (model.py); classes from 0 in the order of their category ids.

ResNets: torchvision's and timm's, whose tensors have the same names, take RGB with ImageNet's mean and std
(pytorch/vision, torchvision/transforms/_presets.py; huggingface/pytorch-image-models, timm/data/constants.py) and
stride in the 3x3 convolution. MSRA's, which detectron2 starts from, take BGR less a mean and stride in 1x1; their names
are detectron2's or Caffe2's. Caffe2's norms end in gamma, beta, running_mean, running_var (R-50.pkl), or are a scale
`s` and a shift `b` with no statistics (detectron2/checkpoint/c2_model_loading.py and layers/batch_norm.py).
"""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from retina.interop.foreign import (
    IMAGENET_STD,
    Conventions,
    Foreign,
    Rule,
    Source,
    numbered,
    rename,
    resnet_rules,
)

DETECTRON2 = {"backbone.bottom_up.stem.conv1.weight", "head.cls_score.weight"}
YHENON = {"conv1.weight", "classificationModel.output.weight"}
TORCHVISION_RESNET = {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}
DETECTRON2_RESNET = {"stem.conv1.weight", "res2.0.conv1.weight"}
CAFFE2_RESNET = {"conv1_w", "res2_0_branch2a_w"}
"""Names of tensors by which a file is recognised."""

MSRA = Conventions(bgr=True, std=(1.0, 1.0, 1.0), stride_in_1x1=True, anchors_by_scale=True)


def read_detectron2(source: Source) -> Foreign:
    state = source.state
    finest = min((int(key[20:21]) for key in state if re.match(r"backbone\.fpn_lateral[2-5]\.", key)), default=3)
    has_norm = "head.cls_subnet.1.weight" in state
    foreign = rename(
        state,
        [
            *_detectron2_body(r"backbone\.bottom_up\."),
            (
                r"backbone\.fpn_(lateral|output)([2-5])\.(weight|bias)",
                lambda m: f"fpn.{m[1]}.{int(m[2]) - finest}.{m[3]}",
            ),
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
        _drop_zero_biases(foreign)
    conventions, note = _colours(state.get("pixel_mean"), state.get("pixel_std"))
    return replace(
        foreign,
        program=f"detectron2's RetinaNet{' with GroupNorm' if has_norm else ''}",
        conventions=conventions,
        cell_anchors=[state[key] for key in sorted(state) if key.startswith("anchor_generator.cell_anchors.")] or None,
        notes=[note],
    )


def _detectron2_body(prefix: str = "") -> list[Rule]:
    """Rules for a ResNet; they are those of detectron2's ImageNet weights too."""
    block = rf"{prefix}res([2-5])\.(\d+)\."
    return [
        (rf"{prefix}stem\.conv1\.weight", "backbone.stem.conv1.weight"),
        (rf"{prefix}stem\.conv1\.norm\.(\w+)", r"backbone.stem.bn1.\1"),
        (rf"{block}conv([123])\.weight", numbered("backbone.layer{}.{}.conv{}.weight", plus=-1)),
        (rf"{block}conv([123])\.norm\.(\w+)", numbered("backbone.layer{}.{}.bn{}.{}", plus=-1)),
        (rf"{block}shortcut\.weight", numbered("backbone.layer{}.{}.downsample.0.weight", plus=-1)),
        (rf"{block}shortcut\.norm\.(\w+)", numbered("backbone.layer{}.{}.downsample.1.{}", plus=-1)),
    ]


def _drop_zero_biases(foreign: Foreign) -> None:
    """detectron2's convolutions keep a bias before a norm (modeling/meta_arch/retinanet.py, RetinaNetHead), which is
    left out where it is 0 in all of them."""
    biases = [key for key in foreign.state if re.fullmatch(r"head\.\w+\.convs\.\d+\.bias", key)]
    biases = [key for key in biases if foreign.state[key.replace(".bias", ".weight")].ndim == 4]
    if any(foreign.state[key].any() for key in biases):
        return
    for key in biases:
        del foreign.state[key]
        foreign.unused[foreign.names.pop(key)] = "a bias of 0 before a norm"


def _colours(mean: Tensor | None, std: Tensor | None) -> tuple[Conventions, str]:
    """The conventions that a checkpoint's mean and std, of its own channel order, tell; both are None in newer ones."""
    if mean is None or std is None or mean.numel() != 3 or std.numel() != 3:
        return MSRA, (
            "the file holds no pixel_mean: channels are taken to be BGR, std 1 and the stride in 1x1, as is the default"
        )
    means, stds = (tuple(round(value, 3) for value in tensor.flatten().tolist()) for tensor in (mean, std))
    bgr = not means[0] > means[2]
    msra = all(math.isclose(value, 1.0) for value in stds)
    if bgr:
        means, stds = means[::-1], stds[::-1]
    order = f"pixel_mean {list(means)} (as RGB) says {'BGR' if bgr else 'RGB'}"
    stride = f"pixel_std {list(stds)} that a bottleneck strides in {'1x1, as MSRA' if msra else '3x3'}"
    return replace(MSRA, bgr=bgr, mean=means, std=stds, stride_in_1x1=msra), f"{order}, {stride}"


def read_yhenon(source: Source) -> Foreign:
    foreign = rename(
        source.state,
        [
            *resnet_rules(),
            (r"fpn\.P([345])_1\.(weight|bias)", numbered("fpn.lateral.{}.{}", plus=-3)),
            (r"fpn\.P([345])_2\.(weight|bias)", numbered("fpn.output.{}.{}", plus=-3)),
            (r"fpn\.P6\.(weight|bias)", r"fpn.extra.0.\1"),
            (r"fpn\.P7_2\.(weight|bias)", r"fpn.extra.1.\1"),
            (
                r"classificationModel\.conv(\d)\.(weight|bias)",
                numbered("head.classification.convs.{}.{}", times=2, plus=-2),
            ),
            (r"regressionModel\.conv(\d)\.(weight|bias)", numbered("head.box.convs.{}.{}", times=2, plus=-2)),
            (r"classificationModel\.output\.(weight|bias)", r"head.classification.predict.\1"),
            (r"regressionModel\.output\.(weight|bias)", r"head.box.predict.\1"),
        ],
        [(r"fc\.(weight|bias)", "the classifier of the ImageNet weights it began with")],
    )
    conventions = Conventions(
        norm_fixed=True,
        anchor_offset=0.5,
        delta_std=(0.1, 0.1, 0.2, 0.2),
        short_side=608,
        long_side=1024,
        candidates_per_level=10_000,
        max_detections=1000,
    )
    note = "it limits neither candidates nor detections: here to 10,000 per level and 1000"
    return replace(foreign, program="yhenon's pytorch-retinanet", conventions=conventions, notes=[note])


def read_torchvision_resnet(source: Source) -> Foreign:
    foreign = rename(source.state, resnet_rules(), [(r"fc\.(weight|bias)", "the classifier")])
    return replace(foreign, program="an ImageNet ResNet (torchvision, timm)")


def read_detectron2_resnet(source: Source) -> Foreign:
    foreign = rename(
        source.state,
        [*_detectron2_body(), *_caffe2_body()],
        [
            (r"(stem\.)?fc(1000)?[._].+|pred_[wb]|linear\.(weight|bias)", "the classifier"),
            (r"conv1_b|stem\.conv1\.bias", "a bias that detectron2 leaves out, because the norm after it has one"),
            (r".+_momentum", "the state of an optimizer"),
        ],
    )
    state, conventions, notes = foreign.state, MSRA, []
    if "conv1_w" in source.state and not any("_gn_" in key for key in source.state):
        norms = [key.removesuffix(".bias") for key in state if key.endswith(".bias")]
        without = [norm for norm in norms if f"{norm}.running_var" not in state]
        for norm in without:  # with these statistics and eps 1e-5 it is its scale and shift alone
            state[f"{norm}.running_mean"] = torch.zeros_like(state[f"{norm}.bias"])
            state[f"{norm}.running_var"] = torch.ones_like(state[f"{norm}.bias"]) - 1e-5
        if without:
            notes.append(f"{len(without)} norms are a scale and a shift: their statistics are mean 0 and variance 1")
    if source.other.get("__author__") == "torchvision":
        conventions = Conventions()
        notes.append("came from torchvision by detectron2's converter: RGB, stride in 3x3")
    elif state["backbone.layer1.0.conv2.weight"].shape[:2].count(64) == 0:
        # Grouped or wide: these came out of Caffe2, which took ImageNet's std and the stride in 3x3
        # (configs/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml).
        conventions = replace(MSRA, std=IMAGENET_STD, stride_in_1x1=False)
    return replace(foreign, program="an ImageNet ResNet (detectron2)", conventions=conventions, notes=notes)


_CAFFE2_NORM = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
_CAFFE2_NORM |= {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}


def _caffe2_body() -> list[Rule]:
    """Rules for a ResNet under Caffe2's names: a, b, c are the convolutions of a block, branch1 is its shortcut."""
    branches = {"2a": ("conv1", "bn1"), "2b": ("conv2", "bn2"), "2c": ("conv3", "bn3")}
    branches["1"] = ("downsample.0", "downsample.1")
    rules: list[Rule] = [(r"conv1_w", "backbone.stem.conv1.weight")]
    for branch, (convolution, _) in branches.items():
        rules.append(
            (rf"res([2-5])_(\d+)_branch{branch}_w", numbered(f"backbone.layer{{}}.{{}}.{convolution}.weight", plus=-1))
        )
    for suffix, kind in _CAFFE2_NORM.items():
        rules.append((rf"(?:res_)?conv1_(?:bn|gn)_{suffix}", f"backbone.stem.bn1.{kind}"))
        for branch, (_, norm) in branches.items():
            rules.append(
                (
                    rf"res([2-5])_(\d+)_branch{branch}_(?:bn|gn)_{suffix}",
                    numbered(f"backbone.layer{{}}.{{}}.{norm}.{kind}", plus=-1),
                )
            )
    return rules
