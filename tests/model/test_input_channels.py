"""Detectors for images of other than three channels: the first convolution, and what the weights file says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faults import refused
from retina.errors import ConfigError
from retina.interop.torchvision import check_export
from retina.interop.transfer import init_from
from retina.model.backbone import ResNet
from retina.model.input_channels import adapt_input, adapt_state, weights_for
from retina.model.pretrained import load_backbone
from retina.model.retinanet import RetinaNet, retinanet
from retina.model.weights import DetectorCard, load_detector, save_detector

SMALL: dict[str, Any] = {
    "num_classes": 2,
    "backbone": "resnet18_half",
    "levels": [3],
    "fpn_channels": 8,
    "head_convs": 1,
}


def detector(channels: int, **changes: Any) -> RetinaNet:
    values = {"mean": [100.0] * channels, "std": [50.0] * channels}
    return retinanet(**{**SMALL, **values, **changes})


def first_of(model: Any) -> nn.Conv2d:
    conv: nn.Conv2d = model.backbone.stem.conv1
    return conv


@pytest.mark.parametrize("before", [3, 5])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_equal_channels_give_what_they_gave(before: int, channels: int) -> None:
    torch.manual_seed(0)
    weight, grey = torch.randn(6, before, 3, 3, dtype=torch.float64), torch.rand(2, 1, 9, 9, dtype=torch.float64)

    def response(weights: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(grey.expand(-1, weights.shape[1], -1, -1), weights)

    carried = weights_for(weight, channels)
    assert carried.shape == (6, channels, 3, 3)
    torch.testing.assert_close(response(carried), response(weight))
    if channels >= before:
        torch.testing.assert_close(carried[:, :before] * channels / before, weight)


def test_pretrained_weights_are_carried_over_and_trained_whatever_is_frozen() -> None:
    state = ResNet("resnet18", norm="frozen", frozen_stages=0, last_level=3).state_dict()
    net = ResNet("resnet18", norm="frozen", frozen_stages=2, last_level=3)
    adapt_input(net, 4)
    load_backbone(net, state, name="resnet18", weights="FILE")
    torch.testing.assert_close(net.stem.conv1.weight, weights_for(state["stem.conv1.weight"], 4))
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert "stem.conv1.weight" in trained
    assert not any(name.startswith("layer1.") for name in trained)
    net(torch.randn(1, 4, 64, 64))[-1].sum().backward()
    assert net.stem.conv1.weight.grad is not None

    again = ResNet("resnet18", norm="frozen", frozen_stages=2, last_level=3)
    adapt_input(again, 4)
    load_backbone(again, net.state_dict(), name="resnet18", weights="FILE")
    assert again.stem.conv1.weight.equal(net.stem.conv1.weight), "weights for four channels are taken as they are"
    assert not again.stem.conv1.weight.requires_grad


def test_without_weights_the_convolution_is_drawn_as_its_like() -> None:
    torch.manual_seed(0)
    weight = first_of(detector(8)).weight.detach()
    assert weight.std().item() == pytest.approx(first_of(detector(3)).weight.std().item(), rel=0.1)
    assert weight.mean(dim=1).std() < 0.6 * weight.std(), "no channel is the mean of others"


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("backbone", ["resnet18_half", "mobilenet_v2"])
def test_a_detector_takes_its_channels_and_no_others(channels: int, backbone: str) -> None:
    model = detector(channels, backbone=backbone)
    assert model.pad_value == (100,) * channels
    images = torch.randint(0, 256, (1, channels, 64, 64), dtype=torch.uint8)
    assert model(images).logits[0].shape == (1, 8 * 8 * 9, 2)
    with pytest.raises(ValueError, match=f"\\[B {channels} H W\\]"):
        model(images[:, :1].expand(-1, 3, -1, -1))


def test_weights_are_loaded_with_their_channels(tmp_path: Path) -> None:
    model = detector(5).eval()
    preprocessing = {"short_side": 64, "long_side": 64, "pad_multiple": 32, "pad_value": [100] * 5, "precision": "fp32"}
    card = DetectorCard(
        model=model.arguments,
        classes=["a", "b"],
        category_ids=[1, 2],
        preprocessing=preprocessing | {"batch_size": 1},
        postprocess={},
    )
    save_detector(tmp_path / "best.safetensors", model.state_dict(), card)
    loaded, _ = load_detector(tmp_path / "best.safetensors", torch.device("cpu"))
    images = torch.randint(0, 256, (1, 5, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(loaded(images).logits, model(images).logits)

    card.preprocessing["pad_value"] = [100] * 3
    save_detector(tmp_path / "other.safetensors", model.state_dict(), card)
    with refused("bad-header", "pad_value"):
        load_detector(tmp_path / "other.safetensors", torch.device("cpu"))
    card.preprocessing["pad_value"] = card.model["mean"] = card.model["std"] = [100] * 200
    save_detector(tmp_path / "many.safetensors", model.state_dict(), card)
    with refused("other-model", "mean"):
        load_detector(tmp_path / "many.safetensors", torch.device("cpu"))


def test_a_run_on_other_channels_is_a_start(tmp_path: Path) -> None:
    source = detector(3)
    card = DetectorCard(
        model=source.arguments, classes=["a", "b"], category_ids=[1, 2], preprocessing={}, postprocess={}
    )
    save_detector(tmp_path / "best.safetensors", source.state_dict(), card)
    model = detector(4)
    init_from(model, tmp_path / "best.safetensors", classes=["a", "b"])
    torch.testing.assert_close(first_of(model).weight, weights_for(first_of(source).weight, 4))


def test_what_cannot_have_other_channels_is_refused() -> None:
    for values in ({"mean": [], "std": []}, {"mean": [1.0] * 300, "std": [1.0] * 300}, {"std": [1.0] * 4}):
        with refused("out-of-range", kind=ConfigError):
            retinanet(**SMALL | values)
    with refused("unsuitable-backbone", "4 channels", kind=ConfigError):
        adapt_input(nn.Sequential(nn.Conv2d(16, 8, 1)), 4)
    with refused("not-in-torchvision", "model.mean", kind=ConfigError):
        check_export({"mean": [1.0] * 4}, {})
    assert adapt_state(nn.Linear(1, 1), {"weight": torch.zeros(1)}).keys() == {"weight"}
