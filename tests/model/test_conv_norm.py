"""Folded convolutions against a convolution and then torchvision's or torch's own norm."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from retina.model.backbone import ResNet
from retina.model.folding import (
    FoldedBatchNorm2d,
    FoldedFrozenBatchNorm2d,
    FoldingConv2d,
    fold_norms,
    merge_norms,
)

KINDS = {"frozen": (FoldedFrozenBatchNorm2d, FrozenBatchNorm2d), "batch": (FoldedBatchNorm2d, nn.BatchNorm2d)}


def pair(kind: str, *, groups: int = 1) -> tuple[nn.Sequential, nn.Sequential]:
    """The same layers folded and plain, with statistics that are no identity; a ReLU stands between them."""
    torch.manual_seed(0)
    ours, theirs = (
        nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
            norm(6, eps=1e-3),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=groups, bias=False),
            norm(8),
        )
        for norm in KINDS[kind]
    )
    state = {key: torch.rand_like(v) + 0.5 if v.ndim == 1 else v for key, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    fold_norms(ours)
    return ours, theirs


def outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output and every gradient."""
    images = images.clone().requires_grad_()
    model.zero_grad()
    output = model(images)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "images": images.grad, **grads}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_convolution_and_norm(kind: str, training: bool, groups: int) -> None:
    ours, theirs = (model.train(training) for model in pair(kind, groups=groups))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(3, 4, 9, 7)
    for _ in range(2):  # the second time with the statistics that the first has left
        found, expected = outcome(ours, images), outcome(theirs, images)
        assert found.keys() == expected.keys()
        assert len(found) == (8 if kind == "batch" else 4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval()  # learned statistics reach the convolution
    torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e12])
def test_extreme_variances(variance: float) -> None:
    ours, theirs = pair("frozen")
    for model in (ours, theirs):
        model[1].running_var.fill_(variance)
    images = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_stands_alone(kind: str) -> None:
    ours, _ = pair(kind)
    images = torch.randn(2, 4, 8, 8)
    before = ours.eval()(images)
    twin = copy.deepcopy(ours)
    assert list(twin.state_dict()) == list(ours.state_dict())
    with torch.no_grad():
        twin.state_dict()["1.bias"].add_(1)
        twin.state_dict()["4.running_mean"].add_(1)
    assert torch.equal(ours(images), before)
    assert not torch.allclose(twin(images), before)
    wide = copy.deepcopy(ours).double().to(memory_format=torch.channels_last)
    torch.testing.assert_close(wide(images.double()).float(), before)


def test_bfloat16_folds_before_it_rounds() -> None:
    ours, theirs = (model.eval() for model in pair("frozen"))
    images = torch.randn(2, 4, 16, 16)
    expected = theirs(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(images)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.01 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_for_good(kind: str) -> None:
    ours, _ = pair(kind)
    ours.eval().to(memory_format=torch.channels_last)
    images = torch.randn(2, 4, 8, 8)
    expected = ours(images)
    merge_norms(ours)
    assert [type(layer) for layer in ours] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, nn.Identity]
    assert ours[3].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(images), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_every_norm_of_a_backbone_is_folded(name: str, norm: str) -> None:
    with torch.device("meta"):
        body = ResNet(name, norm=norm, frozen_stages=2)
        theirs = torchvision.models.get_model(name, weights=None)
    convs = [module for module in body.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in body.modules() if isinstance(module, (FoldedBatchNorm2d, FoldedFrozenBatchNorm2d))]
    assert len(convs) == len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())
    assert all(isinstance(conv, FoldingConv2d) for conv in convs)
    assert [conv.folded[0] for conv in convs] == norms
    merge_norms(body)
    assert not any(isinstance(m, (FoldedBatchNorm2d, FoldedFrozenBatchNorm2d, FoldingConv2d)) for m in body.modules())


def test_group_norm_is_left_alone() -> None:
    with torch.device("meta"):
        body = ResNet("resnet18", norm="group", frozen_stages=0)
    assert not any(isinstance(module, FoldingConv2d) for module in body.modules())


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_frozen_stages_keep_nothing_for_a_backward(norm: str) -> None:
    body = ResNet("resnet18", norm=norm, frozen_stages=2, last_level=3).train()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        c2 = body.layer1(body.stem(torch.randn(1, 3, 32, 32)))
        assert not c2.requires_grad
        assert saved == []
        assert body.layer2(c2).requires_grad
    assert saved
