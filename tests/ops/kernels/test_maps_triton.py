"""The kernels of maps without a GPU: run by Triton's interpreter against the plain forms in float64, alone and in whole
detectors, and compiled for a GPU that is not there."""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # for the process of its own
from programs import interpret

SHAPES = [(23, 30), (6, 8), (1, 1)]
IMAGES = 2


def maps(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """In channels_last memory, with means far from 0."""
    levels = [3 * torch.randn(IMAGES, channels, *shape) + 50 * torch.randn(channels, 1, 1) for shape in SHAPES]
    return [level.to(dtype).contiguous(memory_format=torch.channels_last) for level in levels]


def masks() -> list[Tensor]:
    """Of a whole image, and of one that covers a part of the canvas."""
    found = [torch.ones(IMAGES, 1, *shape) for shape in SHAPES]
    for mask in found:
        mask[1, :, (mask.shape[2] + 1) // 2 :] = 0
        mask[1, :, :, (2 * mask.shape[3] + 2) // 3 :] = 0
    return found


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("part", ["norms", "shifts", pytest.param("detectors", marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_the_plain_forms(part: str) -> None:
    pytest.importorskip("triton")
    interpret(__file__, part, cwd=Path(__file__).parent)


def norms() -> None:
    from retina.ops.kernels.map_forms import group_norm
    from retina.ops.kernels.norm import normalize_content

    for masked, relu, dtype in product((False, True), (False, True), (torch.float32, torch.bfloat16)):
        inputs = [level.requires_grad_() for level in maps(16, dtype)]
        weight, bias = torch.randn(16).requires_grad_(), torch.randn(16).requires_grad_()
        given = masks() if masked else [None] * len(SHAPES)
        outputs = group_norm(inputs, given, weight, bias, 4, 1e-5, relu)
        *levels, gamma, beta = exact([*inputs, weight, bias])
        total, expected_total = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        for x, y, mask in zip(levels, outputs, masks() if masked else map(torch.ones_like, masks()), strict=True):
            expected = normalize_content(x, mask.double(), gamma, beta, groups=4, eps=1e-5)[0] * mask.double()
            expected = expected.relu() if relu else expected
            digits = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(y.double(), expected, **digits)
            slope = torch.randn_like(expected)
            total, expected_total = (
                total + (y * slope.to(dtype)).sum().float(),
                expected_total + (expected * slope).sum(),
            )
        total.backward()
        expected_total.backward()
        if dtype == torch.float32:
            for x, y in zip([*inputs, weight, bias], [*levels, gamma, beta], strict=True):
                torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-3)


def shifts() -> None:
    from retina.ops.kernels.map_forms import Norm, shift

    def draw(channels: int) -> Norm:
        return Norm((*(torch.randn(channels) for _ in range(3)), torch.rand(channels) + 0.5), 1e-3)

    def apply(norm: Norm, x: Tensor) -> Tensor:
        first, *others = (t.double()[:, None, None] for t in norm.tensors)
        return first * (x - others[1]) * (others[2] + norm.eps).rsqrt() + others[0] if others else x + first

    wide = (300, True, True, True, True)  # more than a program's tile
    for channels, masked, added, scaled, relu in [*product((5,), *[(False, True)] * 4), wide]:
        norm = draw(channels) if scaled else Norm((torch.randn(channels),))
        other = draw(channels) if added and scaled else None
        inputs, residuals = maps(channels), maps(channels) if added else []
        for x in [*inputs, *residuals, *(norm.tensors[:1] if not scaled else ())]:
            x.requires_grad_()
        given = masks() if masked else [None] * len(SHAPES)
        outputs = shift(inputs, given, norm, residuals=residuals, residual_norm=other, relu=relu)
        levels, more, (bias,) = exact(inputs), exact(residuals), exact(list(norm.tensors[:1]))
        total, expected_total = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        for i, (x, y) in enumerate(zip(levels, outputs, strict=True)):
            expected = apply(norm, x) if scaled else x + bias[:, None, None]
            if added:
                expected = expected + (apply(other, more[i]) if other else more[i])
            expected = expected.relu() if relu else expected
            expected = expected * masks()[i].double() if masked else expected
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
            slope = torch.randn_like(expected)
            total, expected_total = total + (y * slope.float()).sum(), expected_total + (expected * slope).sum()
        total.backward()
        expected_total.backward()
        pairs = [*zip(inputs, levels, strict=True), *zip(residuals, more, strict=True)]
        for x, y in pairs if scaled else [*pairs, (norm.tensors[0], bias)]:
            torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-4)


def detectors() -> None:
    """Predictions and gradients of small detectors by the kernels and by torch's operations."""
    import retina.model.layers
    from retina.model.retinanet import RetinaNet, retinanet
    from retina.ops.kernels import map_forms

    default = {"head_norm": "group", "head_scales": True, "box_bins": 4, "anchor_scales": [2.0], "anchor_ratios": [1.0]}
    common: dict[str, Any] = {"num_classes": 3, "fpn_channels": 16, "head_convs": 1, "levels": [3, 4, 5, 6, 7]}
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    sizes = torch.tensor([[64, 96], [40, 57]])
    for backbone, options in (
        ("resnet18_half", default | {"norm": "frozen"}),
        ("resnet18_half", {"norm": "group", "neck": "pafpn", "head_quality": True}),
    ):
        torch.manual_seed(0)
        model = retinanet(backbone=backbone, **common, **options).to(memory_format=torch.channels_last)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
        results = []
        for way in ("kernels", "compiled kernels", "plain"):
            map_forms._is_on_gpu = lambda x, answer=way != "plain": answer
            model._levels = RetinaNet._compute_levels
            if way == "compiled kernels":  # each kernel is an operation to the compiler
                model.compile(backend="aot_eager", fullgraph=True)
            model.zero_grad()
            predictions = model(images, sizes)
            outputs = [*predictions.logits, *(predictions.bins or predictions.deltas), *(predictions.quality or ())]
            torch.manual_seed(1)
            sum((x * torch.randn_like(x)).sum() for x in outputs).backward()
            grads = [p.grad for p in model.parameters() if p.requires_grad]
            results.append(([x.detach() for x in outputs], grads))
        *by_kernels, (expected, slopes) = results
        assert any(x.abs().max() > 0.1 for x in expected)
        for outputs, grads in by_kernels:
            for x, y in zip(outputs, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
            for x, y in zip(grads, slopes, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()) + 1e-6)
    assert retina.model.layers.kernels_serve is map_forms.kernels_serve


NORM = {"levels": 2, "groups": 32, "width": 8, "rows": 32, "steps": 16, "relu": True, "masked": True}
SHIFT = {"levels": 2, "channels": 720, "width": 256, "rows": 32, "steps": 8, "relu": True, "masked": True}
SHIFT |= {"scaled": True, "added_scaled": True}
KERNELS = {
    "_norm_parts": NORM,
    "_norm_apply": NORM | {"splits": 32},
    "_norm_sums": NORM,
    "_add_parts": {"size": 512, "levels": 2},
    "_norm_slopes": NORM,
    "_shift": SHIFT | {"added": True},
    "_shift_slopes": SHIFT | {"two": True, "summed": True},
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_compiler_accepts_what_the_interpreter_does(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Down to the machine code of an NVIDIA GPU, which need not be there."""
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from retina.ops.kernels import maps as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, fixed = getattr(kernels, name), KERNELS[name]
    types: dict[str, Any] = dict.fromkeys(("maps", "grads", "results", "residuals", "slopes", "others"), ("*bf16",) * 2)
    types |= {"masks": ("*fp32",) * 2, "norm": ("*fp32",) * 4, "residual_norm": ("*fp32",) * 4, "table": "*i32"}
    types |= {"eps": "fp32", "residual_eps": "fp32"}
    signature = {arg: "constexpr" if arg in fixed else types.get(arg, "*fp32") for arg in function.arg_names}
    source = compiler.ASTSource(fn=function, signature=signature, constexprs=fixed)
    assert compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]


if __name__ == "__main__":
    torch.manual_seed(0)
    {"norms": norms, "shifts": shifts, "detectors": detectors}[sys.argv[1]]()
