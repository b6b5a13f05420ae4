import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from interop.states import body, detectron2_name, filled, number_of
from retina.interop.convert import convert_backbone
from retina.interop.foreign import IMAGENET_STD
from retina.interop.read import read_foreign
from retina.model.retinanet import retinanet

Converted = tuple[dict[str, Tensor], dict[str, object], list[str]]


def caffe2_name(key: str, *, folded: bool = False) -> str:
    """As Caffe2 calls what torchvision calls `key`, a tensor of a ResNet; `folded` where norms have no statistics."""
    norm = "bn" in key or "downsample.1" in key
    kind = key.rpartition(".")[2]
    if norm:
        kind = {"weight": "s", "bias": "b"}[kind] if folded else {"weight": "gamma", "bias": "beta"}.get(kind, kind)
    tail = f"_bn_{kind}" if norm else "_w"
    if not key.startswith("layer"):
        return f"res_conv1{tail}" if norm else "conv1_w"
    stage, block, layer = key.split(".")[:3]
    branch = "1" if layer == "downsample" else "2" + "abc"[int(layer[-1]) - 1]
    return f"res{int(stage[5:]) + 1}_{block}_branch{branch}{tail}"


def test_names_are_those_of_r_50_pkl() -> None:
    names = {caffe2_name(key) for key in body("resnet50")}
    assert {"conv1_w", "res_conv1_bn_gamma", "res2_0_branch1_bn_beta", "res5_2_branch2c_w"} <= names
    assert {"res_conv1_bn_running_mean", "res2_0_branch2a_bn_running_var"} <= names
    assert caffe2_name("layer1.0.bn1.bias", folded=True) == "res2_0_branch2a_bn_b"


def converted(file: Path) -> Converted:
    return convert_backbone(read_foreign(file), file)


def load_into_a_detector(state: dict[str, Tensor], settings: dict[str, object], folder: Path) -> dict[str, Tensor]:
    """What training would start from."""
    save_file(state, folder / "backbone.safetensors")
    model = retinanet(num_classes=1, weights=str(folder / "backbone.safetensors"), fpn_channels=8, **settings)
    return {key.removeprefix("backbone."): value for key, value in model.backbone.state_dict().items()}


def test_torchvision_and_timm_are_taken_as_they_are(tmp_path: Path) -> None:
    theirs = filled(body("resnet18", counted=True)) | filled({"fc.weight": (1000, 512), "fc.bias": (1000,)})
    torch.save({"state_dict": theirs, "arch": "resnet18"}, tmp_path / "resnet18.pth")
    state, settings, lines = converted(tmp_path / "resnet18.pth")
    assert settings == {"backbone": "resnet18"}
    assert state.keys() == theirs.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, theirs[key]) for key, value in state.items())
    assert "left out, the classifier: fc.weight, fc.bias" in lines
    loaded = load_into_a_detector(state, settings, tmp_path)
    assert loaded["stem.bn1.bias"].unique().tolist() == [number_of("bn1.bias")]


@pytest.mark.parametrize("kind", ["published", "folded", "detectron2"])
def test_msra_becomes_rgb_with_imagenet_s_std(tmp_path: Path, kind: str) -> None:
    """Under the names of the published R-50.pkl, under Caffe2's for norms without statistics, and detectron2's own."""
    shapes = body("resnet50")
    caffe2, folded = kind != "detectron2", kind == "folded"
    if caffe2:
        names = {key: caffe2_name(key, folded=folded) for key in shapes if not (folded and "running" in key)}
        more = {"conv1_b": (64,), "fc1000_w": (1000, 2048), "fc1000_b": (1000,)}
    else:
        names = {key: detectron2_name(key) for key in shapes}
        more = {"stem.fc.weight": (1000, 2048), "stem.fc.bias": (1000,)}
    theirs = filled({name: shapes[key] for key, name in names.items()} | more)
    first = torch.randn(64, 3, 7, 7).half().float()
    theirs[names["conv1.weight"]] = first
    arrays = {key: value.half().numpy() for key, value in theirs.items()}
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps(arrays if caffe2 else {"model": arrays, "__author__": "MSRA"}, protocol=2))
    state, settings, lines = converted(file)
    assert settings == {"backbone": "resnet50", "stride_in_1x1": True}
    assert state.keys() == shapes.keys()
    for key, name in names.items():
        if key != "conv1.weight":
            assert state[key].unique().tolist() == [number_of(name)], key
    rgb = torch.randint(0, 256, (1, 3, 9, 9)).float()
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    ours = F.conv2d((rgb - mean) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), state["conv1.weight"])
    expected = F.conv2d((rgb - mean).flip(1), first)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-1)
    if folded:
        assert any("53 norms are a scale and a shift" in line for line in lines)
        assert state["layer2.1.bn2.running_mean"].eq(0).all()
        torch.testing.assert_close(state["bn1.running_var"] + 1e-5, torch.ones(64))
    load_into_a_detector(state, settings, tmp_path)


def test_what_came_from_torchvision_goes_back_unchanged(tmp_path: Path) -> None:
    theirs = filled({detectron2_name(key): shape for key, shape in body("resnet50").items()})
    arrays = {key: value.half().numpy() for key, value in theirs.items()}
    file = tmp_path / "r50.pkl"
    file.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}))
    state, settings, _ = converted(file)
    assert settings == {"backbone": "resnet50"}
    assert state["conv1.weight"].unique().tolist() == [number_of("stem.conv1.weight")]


def test_caffe2_s_resnext_has_imagenet_s_std_and_the_stride_in_3x3(tmp_path: Path) -> None:
    theirs = filled({detectron2_name(key): shape for key, shape in body("resnext101_32x8d").items()})
    theirs["stem.conv1.weight"] = torch.arange(3.0).view(1, 3, 1, 1).expand(64, 3, 7, 7)
    torch.save(theirs, tmp_path / "X-101-32x8d.pth")
    state, settings, _ = converted(tmp_path / "X-101-32x8d.pth")
    assert settings == {"backbone": "resnext101_32x8d"}
    assert state["conv1.weight"][0, :, 0, 0].tolist() == [2.0, 1.0, 0.0]
