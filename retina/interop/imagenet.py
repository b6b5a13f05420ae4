"""Plain ResNets trained on ImageNet: of torchvision, of timm, whose tensors have the same names, and of detectron2.

torchvision's and timm's take RGB with ImageNet's mean and std (pytorch/vision, torchvision/transforms/_presets.py;
huggingface/pytorch-image-models, timm/data/constants.py) and stride in the 3x3 convolution. MSRA's, which detectron2
starts from, take BGR less a mean and stride in 1x1; their names are detectron2's or Caffe2's. Caffe2's norms end in
gamma, beta, running_mean, running_var (R-50.pkl), or are a scale `s` and a shift `b` with no statistics
(facebookresearch/detectron2, detectron2/checkpoint/c2_model_loading.py and layers/batch_norm.py).
"""

import re
from collections.abc import Callable, Set

import torch
from torch import Tensor

from retina.interop import detectron2
from retina.interop.foreign import Conventions, Foreign, Rule, Source, rename

_CLASSIFIER = "the classifier"
_CAFFE2_NORM = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
_CAFFE2_NORM |= {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}


def recognises_torchvision(keys: Set[str]) -> bool:
    return {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"} <= keys


def read_torchvision(source: Source) -> Foreign:
    renamed = rename(
        source.state,
        [(r"((?:conv|bn)1\..+)", r"backbone.stem.\1"), (r"(layer[1-4]\..+)", r"backbone.\1")],
        [(r"fc\.(weight|bias)", _CLASSIFIER)],
    )
    return Foreign(
        program="an ImageNet ResNet (torchvision, timm)",
        state=renamed.state,
        names=renamed.names,
        conventions=Conventions(),
        unused=renamed.unused,
        unknown=renamed.unknown,
    )


def recognises_detectron2(keys: Set[str]) -> bool:
    return {"stem.conv1.weight", "res2.0.conv1.weight"} <= keys or {"conv1_w", "res2_0_branch2a_w"} <= keys


def read_detectron2(source: Source) -> Foreign:
    renamed = rename(
        source.state,
        [*detectron2.body_rules(""), *_caffe2_rules()],
        [
            (r"(stem\.)?fc(1000)?[._].+|pred_[wb]|linear\.(weight|bias)", _CLASSIFIER),
            (r"conv1_b|stem\.conv1\.bias", "a bias that detectron2 leaves out, for the norm after it has one"),
            (r".+_momentum", "the state of an optimizer"),
        ],
    )
    state = renamed.state
    notes = []
    norms = [key.removesuffix(".bias") for key in state if key.endswith(".bias")]
    if "conv1_w" in source.state and not any("_gn_" in key for key in source.state):
        without = [norm for norm in norms if f"{norm}.running_var" not in state]
        for norm in without:
            state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = _no_statistics(state[f"{norm}.bias"])
        if without:
            notes.append(f"{len(without)} norms are a scale and a shift: their statistics are mean 0 and variance 1")
    conventions = detectron2.MSRA
    if source.other.get("__author__") == "torchvision":
        conventions = Conventions()
        notes.append("came from torchvision by detectron2's converter: RGB, stride in 3x3")
    elif state["backbone.layer1.0.conv2.weight"].shape[:2].count(64) == 0:  # groups, or wide
        conventions = detectron2.resnext(conventions)
    return Foreign(
        program="an ImageNet ResNet (detectron2)",
        state=state,
        names=renamed.names,
        conventions=conventions,
        unused=renamed.unused,
        unknown=renamed.unknown,
        notes=notes,
    )


def _no_statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a norm that is the identity but for its scale and shift, with eps 1e-5."""
    return torch.zeros_like(like), torch.ones_like(like) - 1e-5


def _caffe2_rules() -> list[Rule]:
    block = r"res([2-5])_(\d+)_branch"
    norm = rf"_(?:bn|gn)_({'|'.join(_CAFFE2_NORM)})"

    def inner(rest: Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
        return lambda match: f"backbone.layer{int(match[1]) - 1}.{match[2]}.{rest(match)}"

    def number(match: re.Match[str]) -> int:
        return "abc".index(match[3]) + 1

    return [
        (r"conv1_w", "backbone.stem.conv1.weight"),
        (rf"(?:res_)?conv1{norm}", lambda match: f"backbone.stem.bn1.{_CAFFE2_NORM[match[1]]}"),
        (rf"{block}2([abc])_w", inner(lambda match: f"conv{number(match)}.weight")),
        (rf"{block}2([abc]){norm}", inner(lambda match: f"bn{number(match)}.{_CAFFE2_NORM[match[4]]}")),
        (rf"{block}1_w", inner(lambda match: "downsample.0.weight")),
        (rf"{block}1{norm}", inner(lambda match: f"downsample.1.{_CAFFE2_NORM[match[3]]}")),
    ]
