"""Light backbones against torchvision's own networks, which compute whole canvases."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from faults import refused
from retina.errors import CheckpointError
from retina.model.folding import FoldedBatchNorm2d, FoldedFrozenBatchNorm2d, FoldingConv2d, merge_norms
from retina.model.mobilenet import MOBILENETS, MobileNet
from retina.model.retinanet import retinanet


def theirs_of(name: str) -> nn.Module:
    """torchvision's own with weights and statistics that are no identity."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.ndim == 1 and value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return net.eval()


def maps_of(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The last map of each stride from 4 before the classifier's own convolution, found by shapes."""
    last: dict[int, Tensor] = {}
    for module in list(net.features)[:-1]:  # type: ignore[arg-type]
        images = module(images)
        last[images.shape[-1]] = images
    return list(last.values())[1:]


@pytest.mark.parametrize("name", MOBILENETS)
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_maps_equal_torchvisions_own(name: str, norm: str, tmp_path: Path) -> None:
    theirs, file = theirs_of(name), tmp_path / "imagenet.pth"
    torch.save(theirs.state_dict(), file)
    ours = MobileNet(name, norm=norm, frozen_stages=0).eval()
    ours.load_imagenet(name, str(file))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found, expected = ours.double()(images), maps_of(theirs.double(), images)
    assert [x.shape[1] for x in found] == list(ours.channels)
    assert [(64 // x.shape[2], 96 // x.shape[3]) for x in found] == [(s, s) for s in ours.strides]
    for mine, other in zip(found, expected, strict=True):
        assert other.std() > 0.1
        torch.testing.assert_close(mine, other)
    merge_norms(ours)
    for mine, other in zip(ours(images), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", MOBILENETS)
def test_training_equals_torchvisions_own(name: str) -> None:
    """Outputs, gradients and the statistics learned from a batch."""
    theirs = theirs_of(name).double().train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
        elif isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    ours = MobileNet(name, norm="batch", frozen_stages=0, last_level=4).double().train()
    state = {key: value for key, value in theirs.state_dict().items() if key in ours.state_dict()}
    ours.load_state_dict(state)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    (found, expected) = ours(images)[2], maps_of(theirs, images)[2]
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    for output in (found, expected):
        (output * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    torch.testing.assert_close(
        {key: p.grad for key, p in ours.named_parameters()}, {key: grads[key] for key, _ in ours.named_parameters()}
    )
    after = theirs.state_dict()
    torch.testing.assert_close(ours.state_dict(), {key: after[key] for key in ours.state_dict()})


@pytest.mark.parametrize("name", MOBILENETS)
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_every_norm_is_folded(name: str, norm: str) -> None:
    with torch.device("meta"):
        body = MobileNet(name, norm=norm, frozen_stages=2)
    convs = [module for module in body.modules() if isinstance(module, nn.Conv2d) and module.bias is None]
    norms = [module for module in body.modules() if isinstance(module, (FoldedBatchNorm2d, FoldedFrozenBatchNorm2d))]
    assert [conv.folded[0] for conv in convs if isinstance(conv, FoldingConv2d)] == norms
    assert len(convs) == len(norms)


@pytest.mark.parametrize("name", MOBILENETS)
def test_stages_are_frozen_from_the_input(name: str) -> None:
    """Without gradients, and with the statistics they have; with 2, the rest learns."""
    body = MobileNet(name, norm="batch", frozen_stages=2).train()
    before = {key: value.clone() for key, value in body.state_dict().items()}
    maps = body(torch.randn(2, 3, 64, 64))
    assert [x.requires_grad for x in maps] == [False, True, True, True]
    after = body.state_dict()
    changed = {int(key.split(".")[1]) for key in after if not torch.equal(after[key], before[key])}
    assert changed == set(range(body.ends[1], body.ends[-1]))
    assert {int(key.split(".")[1]) for key, p in body.named_parameters() if p.requires_grad} == changed
    whole = MobileNet(name, norm="batch", frozen_stages=5, last_level=4)
    assert not any(p.requires_grad for p in whole.parameters())


def test_with_weights_statistics_are_fixed_as_those_of_a_resnet(tmp_path: Path) -> None:
    file = tmp_path / "imagenet.safetensors"
    save_file(torchvision.models.mobilenet_v2(weights=None).state_dict(), file)
    model = retinanet(num_classes=2, backbone="mobilenet_v2", fpn_channels=16, weights=str(file), levels=(3, 4))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in model.modules()) > 30
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"0", "1", "2", "3"}
    detector = tmp_path / "detector.safetensors"
    save_file(model.state_dict(), detector)
    small = retinanet(num_classes=3, backbone="mobilenet_v2", fpn_channels=8, levels=[3], weights=str(detector))
    theirs = model.backbone.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in small.backbone.state_dict().items())


def test_what_a_mobilenet_cannot_have_is_named(tmp_path: Path) -> None:
    for settings, code, key in (
        ({"norm_eps": 0.1}, "contradiction", "norm_eps"),
        ({"stride_in_1x1": True}, "contradiction", "stride_in_1x1"),
        ({"norm": "layer"}, "unknown-value", "norm"),
        ({"frozen_stages": 6}, "out-of-range", "frozen_stages"),
        ({"backbone": "mobilenet_v4"}, "unknown-value", "backbone"),
    ):
        with refused(code, f"{key}: "):
            retinanet(**{"num_classes": 1, "backbone": "mobilenet_v2"} | settings)  # type: ignore[arg-type]
    file = tmp_path / "v3.safetensors"
    save_file(torchvision.models.mobilenet_v3_large(weights=None).state_dict(), file)
    with refused("other-model", file, "mobilenet_v2", kind=CheckpointError):
        retinanet(num_classes=1, backbone="mobilenet_v2", weights=str(file))
