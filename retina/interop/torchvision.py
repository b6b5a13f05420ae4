"""torchvision's RetinaNets: in, out and by name.

Conventions (pytorch/vision, torchvision/models/detection/): images in RGB with ImageNet's mean and std, short side 800
and long side at most 1333, padded to multiples of 32 (transform.py); score above 0.05, 1000 candidates per level, NMS
at 0.5, 300 detections (retinanet.py); anchors [ratio scale] with sides cut to whole pixels (`_default_anchorgen`) and
rounded corners around (column, row) x stride (anchor_utils.py), where the stride is canvas // grid; row k of the class
layer is COCO category k, with rows for the background and for ids nothing has (_meta.py). P6 is made of P5 in
`retinanet_resnet50_fpn` and of C5 in `retinanet_resnet50_fpn_v2`, whose heads have GroupNorm. The first's published
weights were trained with norms of eps 0 (`overwrite_eps`), everything since with 1e-5.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models import get_model_weights

from retina.errors import ConfigError
from retina.interop.foreign import Conventions, Foreign, Rule, Source, rename, resnet_rules, tower_rules
from retina.model.backbone import RESNETS
from retina.model.pretrained import fetch
from retina.model.retinanet import RetinaNet

NAMES = {"backbone.body.conv1.weight", "head.classification_head.cls_logits.weight"}
"""Tensors by which a file is recognised."""
PREFIX = "torchvision:"
MODELS = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
EPS_0 = "eeacb38b"
"""The first digits of the SHA-256 of `retinanet_resnet50_fpn`'s weights, as in the name of their file."""


def read(source: Source) -> Foreign:
    has_norm = any(re.fullmatch(r"head\.\w+\.conv\.\d+\.1\.weight", key) for key in source.state)
    rules: list[Rule] = [
        *resnet_rules(r"backbone\.body\."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?(weight|bias)", r"fpn.lateral.\1.\2"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?(weight|bias)", r"fpn.output.\1.\2"),
        (r"backbone\.fpn\.extra_blocks\.p6\.(weight|bias)", r"fpn.extra.0.\1"),
        (r"backbone\.fpn\.extra_blocks\.p7\.(weight|bias)", r"fpn.extra.1.\1"),
        (r"head\.classification_head\.cls_logits\.(weight|bias)", r"head.classification.predict.\1"),
        (r"head\.regression_head\.bbox_reg\.(weight|bias)", r"head.box.predict.\1"),
        # until 2022, and in the published weights of the first: one sequence as ours
        (r"head\.classification_head\.conv\.(\d+)\.(weight|bias)", r"head.classification.convs.\1.\2"),
        (r"head\.regression_head\.conv\.(\d+)\.(weight|bias)", r"head.box.convs.\1.\2"),
    ]
    for subnet, tower in (("classification_head", "classification"), ("regression_head", "box")):
        rules += tower_rules(rf"head\.{subnet}\.conv", tower, conv=r"\.0", norm=r"\.1", has_norm=has_norm)
    tracked = any(key.endswith("num_batches_tracked") for key in source.state)
    published = not tracked and source.sha256().startswith(EPS_0)
    notes = []
    if published:
        notes.append("norm eps is 0: these are torchvision's own COCO weights, by their hash")
    elif not has_norm and not tracked:
        notes.append("norm eps is taken to be 1e-5: for weights that are torchvision's own COCO_V1, saved anew, give 0")
    return replace(
        rename(source.state, rules),
        program=f"torchvision's RetinaNet v{2 if has_norm else 1}",
        conventions=Conventions(
            anchors_rounded=True, canvas_strides=True, max_detections=300, norm_eps=0.0 if published else 1e-5
        ),
        first_id=0,
        background_first=True,
        notes=notes,
    )


def fetch_published(name: str) -> Path:
    """The file of the COCO weights that torchvision publishes for `torchvision:NAME`, downloaded where there is a
    network. Raises ConfigError for another name, CheckpointError naming the file to bring."""
    model = name.removeprefix(PREFIX)
    if model not in MODELS:
        choices = " or ".join(PREFIX + model for model in MODELS)
        raise ConfigError(f"{name}: not known - choose {choices}", code="unknown-name")
    weights = get_model_weights(model)["DEFAULT"]
    return fetch(weights.url, f"{name}:", "give a file")


def check_export(model: Mapping[str, Any], postprocess: Mapping[str, Any]) -> None:
    """Raises ConfigError for settings of `retinanet` and `postprocess` that no RetinaNet of torchvision has."""
    needed = {
        "neck": "fpn",
        "head": None,
        "levels": [3, 4, 5, 6, 7],
        "p7_relu": True,
        "stride_in_1x1": False,
        "head_convs": 4,
        "head_quality": False,
        "head_scales": False,
        "box_bins": None,
        "guided_quality": False,
        "anchor_offset": 0.0,
    }
    channels = model.get("fpn_channels", 256)
    if channels == (512 if model.get("backbone") in ("resnet18", "resnet34") else 2048):
        needed["p6_from"] = "p5"  # LastLevelP6P7 tells by the channels where P6 comes from
    if model.get("head_channels") is not None:
        needed["head_channels"] = channels
    faults = {
        f"model.{name}": (model[name], needed[name]) for name in needed if model.get(name, needed[name]) != needed[name]
    }
    if str(model.get("backbone", "resnet50")) not in RESNETS:
        faults["model.backbone"] = model["backbone"], "its ResNets here"
    if len(model.get("mean", "RGB")) != 3:
        faults["model.mean"] = model["mean"], "images of three channels"
    if postprocess.get("class_agnostic"):
        faults["postprocess.class_agnostic"] = True, False
    for key, (value, only) in faults.items():
        line = f"{value} - torchvision's RetinaNet has {only} and nothing else"
        raise ConfigError(line, code="not-in-torchvision", key=key)


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a detector of ours on levels 3 to 7 under torchvision's names."""
    step = 3 if "head.box.convs.1.weight" in state else 2

    def tower(match: re.Match[str]) -> str:
        layer, part = divmod(int(match[2]), step)
        return f"head.{'regression' if match[1] == 'box' else match[1]}_head.conv.{layer}.{part}.{match[3]}"

    rules: list[Rule] = [
        (r"backbone\.(?:stem\.)?(.+)", r"backbone.body.\1"),
        (r"fpn\.lateral\.(\d)\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
        (r"fpn\.output\.(\d)\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
        (r"fpn\.extra\.0\.(.+)", r"backbone.fpn.extra_blocks.p6.\1"),
        (r"fpn\.extra\.1\.(.+)", r"backbone.fpn.extra_blocks.p7.\1"),
        (r"head\.classification\.predict\.(.+)", r"head.classification_head.cls_logits.\1"),
        (r"head\.box\.predict\.(.+)", r"head.regression_head.bbox_reg.\1"),
        (r"head\.(classification|box)\.convs\.(\d+)\.(weight|bias)", tower),
    ]
    return rename(state, rules).state


def describe_export(
    model: RetinaNet, preprocessing: Mapping[str, Any], postprocess: Mapping[str, Any], file: Path
) -> list[str]:
    """What `to_torchvision` gave, and then, after the line `in Python:`, the program that loads it."""
    arguments, anchors, channels = model.arguments, model.anchors, model.arguments["fpn_channels"]
    whole = math.trunc if anchors.rounded else float
    sides = [[float(whole(size * scale)) for scale in anchors.scales] for size in anchors.sizes]
    pad_multiple = preprocessing.get("pad_multiple", 32)
    multiple = pad_multiple if arguments["canvas_strides"] else math.lcm(pad_multiple, max(model.strides))
    notes = [
        f"torchvision: label k is class k of {arguments['num_classes']}, there is no background",
        "torchvision: it finds the same in images that fill their canvas; its layers see the padding around others too",
    ]
    if multiple != pad_multiple:  # elsewhere it would place anchors otherwise
        notes.append(f"torchvision: images are padded to multiples of {multiple}, not {pad_multiple}, for its anchors")
    norm = "torch.nn.GroupNorm, 32" if arguments["norm"] == "group" else "FrozenBatchNorm2d"
    inputs = list(model.backbone.channels[-3:])
    extra = inputs[-1] if arguments["p6_from"] == "c5" else channels
    head_norm = f", norm_layer=partial(torch.nn.GroupNorm, {math.gcd(32, channels)})" if arguments["head_norm"] else ""
    options = {
        "min_size": preprocessing.get("short_side", 800),
        "max_size": preprocessing.get("long_side", 1333),
        "size_divisible": multiple,
        "image_mean": [value / 255 for value in arguments["mean"]],
        "image_std": [value / 255 for value in arguments["std"]],
        "score_thresh": postprocess.get("score_threshold", 0.05),
        "topk_candidates": postprocess.get("candidates_per_level", 1000),
        "nms_thresh": postprocess.get("nms_iou", 0.5),
        "detections_per_img": postprocess.get("max_detections", 100),
    }
    half = "[(-s / r**0.5, -s * r**0.5, s / r**0.5, s * r**0.5) for r in ratios for s in level]"
    exact = [f"anchors.cell_anchors = [torch.tensor({half}) / 2 for level in sizes]  # it would round them"]
    return [
        *notes,
        "in Python:",
        "from functools import partial",
        "import safetensors.torch, torch",
        "from torchvision.models import get_model",
        "from torchvision.models.detection.anchor_utils import AnchorGenerator",
        "from torchvision.models.detection.backbone_utils import BackboneWithFPN",
        "from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead",
        "from torchvision.ops import FrozenBatchNorm2d",
        "from torchvision.ops.feature_pyramid_network import LastLevelP6P7",
        f"norm = partial({norm}, eps={arguments['norm_eps']})",
        f"body = get_model({arguments['backbone']!r}, weights=None, norm_layer=norm)",
        "maps = {'layer2': '0', 'layer3': '1', 'layer4': '2'}",
        f"backbone = BackboneWithFPN(body, maps, {inputs}, {channels}, LastLevelP6P7({extra}, {channels}))",
        f"sizes, ratios = {sides}, {list(anchors.ratios)}",
        "anchors = AnchorGenerator(sizes, [ratios] * len(sizes))",
        *([] if anchors.rounded else exact),
        f"head = RetinaNetHead({channels}, {anchors.num_per_cell}, {arguments['num_classes']}{head_norm})",
        f"options = {options}",
        f"model = RetinaNet(backbone, {arguments['num_classes']}, anchor_generator=anchors, head=head, **options)",
        f"model.load_state_dict(safetensors.torch.load_file({str(file)!r}))",
        "model.eval()",
    ]
