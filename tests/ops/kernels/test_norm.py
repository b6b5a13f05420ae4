"""Statistics over content against those of each crop alone, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retina.ops.kernels.norm import NormalizeWhole, normalize_content
from retina.ops.kernels.norm_cpu import NormalizeByImage, goes_by_image

Form = type[torch.autograd.Function]
FORMS = pytest.mark.parametrize("form", [NormalizeWhole, NormalizeByImage])

SIZES = [(5, 7), (3, 2), (6, 4)]


def batch(dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Maps with wild numbers beyond the content, and their mask."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 6, 7, generator=generator, dtype=torch.float64) + mean
    mask = torch.zeros(3, 1, 6, 7)
    for image, (height, width) in enumerate(SIZES):
        mask[image, :, :height, :width] = 1
    return torch.where(mask > 0, x, 1000.0).to(dtype), mask


def of_crops(x: Tensor, weight: Tensor, bias: Tensor, groups: int | None) -> list[Tensor]:
    crops = [image[:, :height, :width] for image, (height, width) in zip(x, SIZES, strict=True)]
    if groups is not None:
        return [F.group_norm(crop[None], groups, weight, bias)[0] for crop in crops]
    everything = torch.cat([crop.flatten(1) for crop in crops], dim=1)
    normal = F.batch_norm(everything[None], None, None, weight, bias, training=True)[0]
    parts = normal.split([height * width for height, width in SIZES], dim=1)
    return [part.view(8, *size) for part, size in zip(parts, SIZES, strict=True)]


@FORMS
@pytest.mark.parametrize("groups", [1, 4, 8, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_norm_of_each_crop(groups: int | None, dtype: torch.dtype, form: Form) -> None:
    x, mask = batch(dtype, mean=3.0)
    weight, bias = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    found, mean, var = form.apply(inputs[0], mask, *inputs[1:], groups, 1e-5)
    assert found.dtype == dtype
    expected = of_crops(exact[0], exact[1], exact[2], groups)
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    total = 0.0
    for image, (height, width) in enumerate(SIZES):
        one = found[image, :, :height, :width]
        torch.testing.assert_close(one.double(), expected[image], rtol=tolerance, atol=tolerance)
        slope = torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view(one.shape)
        total = total + (one.double() * slope).sum() + one.double().square().sum()
    total.backward()
    sum((e * torch.linspace(-1, 1, e.numel(), dtype=torch.float64).view(e.shape)).sum() + e.square().sum()
        for e in expected).backward()  # fmt: skip
    for ours, theirs in zip(inputs, exact, strict=True):
        limit = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=limit, atol=limit)
    assert (inputs[0].grad * (1 - mask) == 0).all()
    if groups is None:
        crops = torch.cat([x[i, :, :h, :w].double().flatten(1) for i, (h, w) in enumerate(SIZES)], dim=1)
        torch.testing.assert_close(mean[0], crops.mean(dim=1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(var[0], crops.var(dim=1, correction=0), rtol=1e-4, atol=1e-4)


@FORMS
def test_gradients_are_those_of_differences(form: Form) -> None:
    x, mask = batch(torch.float64)
    weight, bias = torch.linspace(0.5, 2, 8).double(), torch.linspace(-1, 1, 8).double()
    inputs = [tensor.requires_grad_() for tensor in (x[:, :4, :3, :3].clone(), weight[:4].clone(), bias[:4].clone())]
    for groups in (2, None):

        def norm(*tensors: Tensor, groups: int | None = groups) -> Tensor:
            result = form.apply(tensors[0], mask[..., :3, :3], *tensors[1:], groups, 1e-5)[0]
            return result * mask[..., :3, :3]

        assert torch.autograd.gradcheck(norm, inputs)


@FORMS
@pytest.mark.parametrize("groups", [4, None])
def test_large_means_lose_no_precision(groups: int | None, form: Form) -> None:
    """The variance is not the difference of two large numbers in float32."""
    x, mask = batch(torch.float32, mean=300.0)
    found, *_ = form.apply(x, mask, torch.ones(8), torch.zeros(8), groups, 1e-5)
    expected = of_crops(x.double(), torch.ones(8).double(), torch.zeros(8).double(), groups)
    for image, (height, width) in enumerate(SIZES):
        torch.testing.assert_close(found[image, :, :height, :width].double(), expected[image], rtol=1e-2, atol=1e-2)


@FORMS
def test_an_image_without_content_is_the_bias(form: Form) -> None:
    x = torch.randn(1, 8, 2, 2)
    found, *_ = form.apply(x, torch.zeros(1, 1, 2, 2), torch.ones(8), torch.ones(8), 2, 1e-5)
    assert (found == 1).all()


@pytest.mark.parametrize("groups", [4, None])
def test_large_maps_go_image_by_image_and_are_as_whole_ones(groups: int | None) -> None:
    large = torch.randn(2, 8, 256, 136).contiguous(memory_format=torch.channels_last)
    mask = torch.ones(2, 1, 256, 136)
    assert goes_by_image(large)
    assert not goes_by_image(large[:, :, :100])
    weight, bias = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
    found, mean, var = normalize_content(large, mask, weight, bias, groups=groups, eps=1e-5)
    same = F.group_norm(large, groups, weight, bias) if groups else F.batch_norm(large, None, None, weight, bias, True)
    torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if groups is None:
        torch.testing.assert_close(mean[0].float(), large.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var[1].float(), large.var(dim=(0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
