import hashlib
import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model_weights, resnet50
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection import retinanet_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from faults import refused
from interop.states import numbered, write_detector
from retina.errors import ConfigError
from retina.inference import Detector
from retina.interop import torchvision
from retina.interop.convert import convert_detector
from retina.interop.read import read_foreign
from retina.model.retinanet import retinanet
from retina.model.weights import DetectorCard, save_detector
from retina.types import Detections

SIDES = {"short_side": 96, "long_side": 160}
CLASSES = ["ant", "bee", "cat", "dog", "eel"]


def v1(num_classes: int) -> TorchvisionRetinaNet:
    """`retinanet_resnet50_fpn` as it is with pretrained weights: frozen norms, and as with COCO_V1 of eps 0."""
    body = resnet50(weights=None, norm_layer=partial(FrozenBatchNorm2d, eps=0.0))
    blocks = LastLevelP6P7(256, 256)
    backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=blocks)
    return TorchvisionRetinaNet(backbone, num_classes, min_size=96, max_size=160)


def v2(num_classes: int) -> TorchvisionRetinaNet:
    return retinanet_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=96, max_size=160
    )


@torch.no_grad()
def give_signal(model: TorchvisionRetinaNet) -> TorchvisionRetinaNet:
    """Statistics that are no identity, and logits and deltas that spread."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5).mul_(0.3 if name.endswith("bn3") else 1.0)
            module.bias.normal_(std=0.1)
        elif isinstance(module, nn.Conv2d) and name.startswith("head") and ".conv." in name:
            nn.init.kaiming_normal_(module.weight)
    head = model.head
    head.regression_head.bbox_reg.weight.normal_(std=0.01)
    head.classification_head.cls_logits.weight.normal_(std=0.03)
    head.classification_head.cls_logits.bias.fill_(-3.0)
    return model.eval()


@pytest.mark.parametrize(("kind", "classes"), [(v1, ["none", *CLASSES]), (v2, CLASSES)])
def test_an_imported_detector_finds_what_torchvision_does(
    kind: Callable[[int], TorchvisionRetinaNet], classes: list[str], tmp_path: Path
) -> None:
    """From its file to boxes in the image's pixels, on a canvas on which it guesses strides of 48 and 53 pixels on P6;
    with a name for every row, and without one for the background's."""
    torch.manual_seed(0)
    theirs = give_signal(kind(6))
    file = tmp_path / "theirs.pth"
    torch.save(theirs.state_dict(), file)
    conventions = SIDES | ({"norm_eps": 0.0} if kind is v1 else {})
    imported = convert_detector(read_foreign(file), file, classes=classes, conventions=conventions)
    detector = Detector.load(write_detector(imported, tmp_path / "ours.safetensors"))
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 160, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = theirs(list(torch.from_numpy(images).permute(0, 3, 1, 2) / 255))
    first = 6 - len(classes)
    for found, other in zip(detector.predict(list(images)), expected, strict=True):
        keep = other["labels"] >= first
        count = int(keep.sum())
        assert 20 < count <= len(keep) - first
        assert len(found.scores) == count if first == 0 else count <= len(found.scores) <= 300
        partner = counterparts(found, other["boxes"][keep], other["scores"][keep], other["labels"][keep] - first)
        assert len(set(partner)) == count
        torch.testing.assert_close(found.scores[partner], other["scores"][keep], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.boxes[partner], other["boxes"][keep], rtol=0, atol=1e-3)


def counterparts(found: Detections, boxes: Tensor, scores: Tensor, labels: Tensor) -> list[int]:
    """For each of theirs the nearest of ours with its label; those of nearly the same score may stand in another
    order."""
    distance = (boxes[:, None] - found.boxes).abs().amax(dim=-1) + 1e3 * (scores[:, None] - found.scores).abs()
    distance[labels[:, None] != found.labels] = torch.inf
    return distance.argmin(dim=1).tolist()


def random_state(model: str) -> dict[str, Tensor]:
    return {"v1": v1, "v2": v2}[model](3).state_dict()


@pytest.mark.parametrize("model", ["v1", "v2"])
def test_there_and_back_is_the_same_to_the_bit(model: str, tmp_path: Path) -> None:
    state = random_state(model)
    file = tmp_path / "theirs.pth"
    torch.save({"model": state, "epoch": 3, "args": Namespace(lr=0.1)}, file)  # as torchvision's references save
    imported = convert_detector(read_foreign(file), file, classes=CLASSES[:3])
    assert imported.card.category_ids == [0, 1, 2]
    back = torchvision.to_torchvision(imported.state)
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    torchvision.check_export(imported.card.model, imported.card.postprocess)
    again = tmp_path / "again.safetensors"
    save_file(back, again)
    same = convert_detector(read_foreign(again), again, classes=CLASSES[:3])
    assert all(torch.equal(value, imported.state[key]) for key, value in same.state.items())
    assert same.card.model == imported.card.model


def test_files_of_before_2022_have_other_names(tmp_path: Path) -> None:
    state = random_state("v1")

    def before(key: str) -> str:
        key = re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
        return re.sub(r"\.conv\.(\d)\.0\.", lambda match: f".conv.{2 * int(match[1])}.", key)

    old = {before(key): value for key, value in state.items()}
    assert len(old.keys() - state.keys()) == 28
    save_file(old, tmp_path / "old.safetensors")
    imported = convert_detector(read_foreign(tmp_path / "old.safetensors"), tmp_path, classes=CLASSES[:3])
    back = torchvision.to_torchvision(imported.state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_published_weights_of_the_first_are_known_by_their_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "v1.safetensors"
    save_file({key: value for key, value in random_state("v1").items() if "num_batches" not in key}, file)
    assert read_foreign(file).conventions.norm_eps == 1e-5
    assert any("give 0" in note for note in read_foreign(file).notes)
    monkeypatch.setattr(torchvision, "EPS_0", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    assert read_foreign(file).conventions.norm_eps == 0.0


def test_conventions_go_into_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "v2.safetensors"
    save_file(random_state("v2"), file)
    imported = convert_detector(read_foreign(file), file, classes=CLASSES[:2])
    told = {"p6_from": "c5", "head_norm": "group", "anchors_rounded": True, "norm": "batch", "backbone": "resnet50"}
    assert {key: imported.card.model[key] for key in told} == told
    assert imported.card.postprocess["max_detections"] == 300
    assert imported.card.category_ids == [1, 2]
    assert (imported.card.preprocessing["short_side"], imported.card.preprocessing["long_side"]) == (800, 1333)


def test_coco_keeps_its_category_ids(tmp_path: Path) -> None:
    file = tmp_path / "coco.safetensors"
    state = random_state("v1")
    for part in ("weight", "bias"):
        key = f"head.classification_head.cls_logits.{part}"
        state[key] = numbered(torch.empty(9 * 91, *state[key].shape[1:]))
    save_file(state, file)
    imported = convert_detector(read_foreign(file), file)
    assert len(imported.card.classes) == 80
    ids = dict(zip(imported.card.classes, imported.card.category_ids, strict=True))
    assert (ids["person"], ids["stop sign"], ids["toothbrush"]) == (1, 13, 90)
    rows = imported.state["head.classification.predict.bias"].view(9, 80)
    assert rows[2].tolist() == [2 * 91 + i for i in imported.card.category_ids]


@pytest.mark.parametrize(
    "changes",
    [
        {"neck": "pafpn"},
        {"levels": [2, 3, 4, 5]},
        {"p7_relu": False},
        {"stride_in_1x1": True},
        {"head_convs": 1},
        {"head_channels": 64},
        {"p6_from": "c5", "fpn_channels": 512},
        {"head_quality": True},
        {"head_scales": True},
        {"anchor_offset": 0.5},
        {"backbone": "timm:resnet18"},
        {"backbone": "mobilenet_v2"},
    ],
)
def test_what_torchvision_has_not_is_not_exported(changes: dict[str, object]) -> None:
    with refused("not-in-torchvision", f"model.{next(iter(changes))}", kind=ConfigError):
        torchvision.check_export({"backbone": "resnet18", "levels": [3, 4, 5, 6, 7], "head_convs": 4} | changes, {})


def test_detections_that_ignore_classes_are_not_exported() -> None:
    with refused("not-in-torchvision", "postprocess.class_agnostic", kind=ConfigError):
        torchvision.check_export({}, {"class_agnostic": True})


@pytest.mark.parametrize(
    "changes",
    [
        {"fpn_channels": 48, "norm_eps": 1e-3, "head_norm": "group", "anchor_sizes": [12.0, 30.0, 70.0, 150.0, 300.0]},
        {"fpn_channels": 32, "norm": "frozen", "p6_from": "p5", "anchors_rounded": True, "canvas_strides": True},
        {"fpn_channels": 32, "norm": "group", "mean": [120.0, 110.0, 100.0], "std": [50.0, 60.0, 70.0]},
    ],
)
def test_what_an_export_prints_loads_a_model_that_finds_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    """With anchors, channels, norms, sizes and thresholds that torchvision's own two models have not."""
    torch.manual_seed(0)
    anchors = {"anchor_scales": [0.9, 1.3], "anchor_ratios": [0.4, 1.0, 2.5], "mean": [124.0, 116.0, 104.0]}
    ours = retinanet(num_classes=3, backbone="resnet18", **anchors | changes)
    state = ours.state_dict()
    for key, value in state.items():
        if "head" in key and ".convs." in key and value.ndim == 4:
            nn.init.kaiming_normal_(value)
        elif re.fullmatch(r".*(bn\d|downsample\.1)\.weight", key):
            value.uniform_(0.5, 1.5).mul_(0.3 if "bn2" in key else 1.0)
        elif key.endswith(("running_mean", "bn1.bias")):
            value.normal_(std=0.1)
    state["head.box.predict.weight"].normal_(std=0.01)
    state["head.classification.predict.weight"].normal_(std=0.03)
    state["head.classification.predict.bias"].fill_(-2.0)
    post = {"score_threshold": 0.15, "candidates_per_level": 60, "nms_iou": 0.4, "max_detections": 40}
    # An image that fills its canvas, because torchvision's norms see the padding too.
    sides = {
        "short_side": 128,
        "long_side": 256,
        "pad_multiple": 32,
        "pad_value": list(ours.pad_value),
        "precision": "fp32",
        "batch_size": 1,
    }
    if not changes.get("canvas_strides"):
        sides["pad_multiple"] = 128
    card = DetectorCard(
        model=ours.arguments, classes=CLASSES[:3], category_ids=[1, 2, 3], preprocessing=sides, postprocess=post
    )
    save_detector(tmp_path / "ours.safetensors", state, card)
    torchvision.check_export(ours.arguments, post)
    save_file(torchvision.to_torchvision(state), tmp_path / "theirs.safetensors")
    lines = torchvision.describe_export(ours, sides, post, tmp_path / "theirs.safetensors")
    made: dict[str, Any] = {}
    exec("\n".join(lines[lines.index("in Python:") + 1 :]), made)
    image = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    with torch.no_grad():
        (expected,) = made["model"]([torch.from_numpy(image).permute(2, 0, 1) / 255])
    (found,) = Detector.load(tmp_path / "ours.safetensors").predict([image])
    assert 20 < len(found.scores) == len(expected["scores"])
    partner = counterparts(found, expected["boxes"], expected["scores"], expected["labels"])
    torch.testing.assert_close(found.scores[partner], expected["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes[partner], expected["boxes"], rtol=0, atol=1e-3)


def test_an_export_pads_so_that_anchors_stay_a_stride_apart() -> None:
    with torch.device("meta"):
        model = retinanet(num_classes=3)
    lines = torchvision.describe_export(model, {"pad_multiple": 32}, {}, Path("x.safetensors"))
    assert any("padded to multiples of 128, not 32" in line for line in lines)
    assert any("'size_divisible': 128" in line for line in lines)


def test_published_weights_are_fetched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = tmp_path / "checkpoints" / "retinanet_resnet50_fpn_v2_coco-e3b0c442.pth"  # the hash of nothing
    file.parent.mkdir()
    file.touch()
    entry = get_model_weights("retinanet_resnet50_fpn_v2")["DEFAULT"].value
    monkeypatch.setattr(entry, "url", f"http://localhost/{file.name}")
    assert torchvision.fetch_published("torchvision:retinanet_resnet50_fpn_v2") == file
    with refused("unknown-name", "torchvision:ssd300_vgg16", "torchvision:retinanet_resnet50_fpn", kind=ConfigError):
        torchvision.fetch_published("torchvision:ssd300_vgg16")
