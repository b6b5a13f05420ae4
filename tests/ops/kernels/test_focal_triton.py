"""The kernels run here in Triton's interpreter, in a process of their own: triton chooses when it is imported.

What that cannot show is the precision of a GPU's own exp2 and rsqrt, and its rounding to bfloat16 (this one cuts off).
"""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from programs import interpret
from retina.losses.focal import class_focal_loss, sigmoid_focal_loss

GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]
CLASSES = [1, 3, 20, 80, 91]  # groups of 1, 1, 4, 16 and 1 classes
ANCHORS = 60  # of 80 classes: more than one block
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXTREMES = torch.tensor([-1000.0, -100, -88, -50, -20, -1, 0, 1, 20, 50, 88, 100, 1000])
ROLES = ["mixed", "no positives", "all ignored", "all positive"]

INTERPRETER = """
import sys, torch
from retina.ops.kernels.focal import loss_and_grad, scale_
answers = []
for logits, labels, positive, negative, weights, gamma, dtype in torch.load(sys.argv[1]):
    grad = torch.full(logits.shape, torch.nan, dtype=dtype)
    loss = loss_and_grad(logits, labels, positive, negative, *weights, gamma, grad=grad)
    alone = loss_and_grad(logits, labels, positive, negative, *weights, gamma, grad=None)
    scaled = [scale_(grad.clone(), torch.tensor(factor)) for factor in (3.0, 1.0)]
    answers.append((loss, alone, grad, *scaled))
torch.save(answers, sys.argv[2])
"""


def problem(
    num_classes: int, dtype: torch.dtype, roles: str = "mixed", num_anchors: int = ANCHORS
) -> tuple[Tensor, ...]:
    """Logits, labels (nonsense where not positive), positive, negative; some logits of both roles are extreme."""
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(num_anchors, num_classes, generator=generator) * 4
    extremes = EXTREMES[: logits.numel()]
    logits.view(-1)[: len(extremes)] = extremes
    logits[::7, -1] = extremes[torch.arange(len(logits[::7])) % len(extremes)]
    role = torch.randint(0, 3, (num_anchors, 1), generator=generator)
    role = {"mixed": role, "no positives": role.clamp(min=1), "all ignored": role * 0 + 2, "all positive": role * 0}[
        roles
    ]
    labels = torch.randint(0, num_classes, (num_anchors, 1), generator=generator)
    labels[::7] = num_classes - 1
    return logits.to(dtype), labels.where(role == 0, -7), role == 0, role == 1


def cases() -> dict[str, tuple]:
    """name -> arguments of `loss_and_grad` and the dtype of the gradient."""
    found = {}
    for gamma, num_classes in [*product(GAMMAS, [20]), *product([2.0], CLASSES)]:
        found[f"gamma {gamma}, K {num_classes}"] = (
            *problem(num_classes, torch.float32),
            (0.25, 0.75),
            gamma,
            torch.float32,
        )
    for dtype in DTYPES:
        found[f"{dtype}"] = (*problem(80, dtype), (0.25, 0.75), 2.0, dtype)
    for roles in ROLES:
        found[roles] = (*problem(5, torch.float32, roles), (0.25, 0.75), 2.0, torch.float32)
    for weights in [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]:
        found[f"weights {weights}"] = (*problem(5, torch.float32), weights, 2.0, torch.float32)
    for num_anchors in [0, 1]:
        found[f"{num_anchors} anchors"] = (
            *problem(1, torch.float32, "all positive", num_anchors),
            (0.25, 0.75),
            2.0,
            torch.float32,
        )
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    """What the kernels say to every case."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    torch.save(list(cases().values()), folder / "cases.pt")
    interpret("-c", INTERPRETER, folder / "cases.pt", folder / "answers.pt", cwd=Path(__file__).parents[2])
    return dict(zip(cases(), torch.load(folder / "answers.pt"), strict=True))


def oracle(
    logits: Tensor, labels: Tensor, positive: Tensor, negative: Tensor, weights, gamma: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the plain formula in float64."""
    logits = logits.double().requires_grad_()
    targets = positive & (labels == torch.arange(logits.shape[1]))
    loss = sigmoid_focal_loss(logits, targets.double(), alpha=None, gamma=gamma)
    loss = (loss * torch.where(targets, *weights) * (positive | negative)).sum()
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("name", list(cases()))
def test_equals_the_plain_formula_in_float64(name: str, answers: dict[str, tuple[Tensor, ...]]):
    *arguments, dtype = cases()[name]
    expected, slope = oracle(*arguments)
    loss, alone, grad, scaled, untouched = answers[name]
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    rtol = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    atol = 1e-12 if dtype != torch.float16 else 6e-8  # its smallest number: why `focal` waits for the loss scale
    torch.testing.assert_close(grad.double(), slope, rtol=rtol, atol=atol)
    assert torch.equal(alone, loss)
    torch.testing.assert_close(scaled, 3 * grad, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(untouched, grad)


@pytest.mark.parametrize(("gamma", "num_classes", "kind"), [(2.0, 80, "bf16"), (0.5, 91, "fp32"), (0.0, 1, "fp16")])
def test_the_compiler_accepts_what_the_interpreter_does(
    gamma: float, num_classes: int, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Down to the machine code of an NVIDIA GPU, which need not be there."""
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from retina.ops.kernels import focal as focal_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"logits": kind, "labels": "i64", "positive": "i1", "negative": "i1", "grad": kind, "losses": "fp32"}
    focal = {name: f"*{kind}" for name, kind in pointers.items()}
    focal |= {"size": "i32", "positive_weight": "fp32", "negative_weight": "fp32"}
    group_size = math.gcd(num_classes, 16)
    fixed = {"gamma": gamma, "num_classes": num_classes, "group_size": group_size, "with_grad": True, "block": 4096}
    scale = {"grad": f"*{kind}", "factor": "*fp32", "size": "i64"}
    for kernel, arguments, constants in [
        (focal_triton._focal_kernel, focal, fixed),
        (focal_triton._scale_kernel, scale, {"block": 4096}),
    ]:
        signature = arguments | dict.fromkeys(constants, "constexpr")
        source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert compiler.compile(source, target=GPUTarget("cuda", 80, 32), options=focal_triton._OPTIONS).asm["cubin"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name, case in cases().items() if sum(case[4]) == 1])  # weights of an alpha
def test_on_a_gpu(name: str):
    pytest.importorskip("triton")
    logits, labels, positive, negative, weights, gamma, _ = cases()[name]
    expected, slope = oracle(logits, labels, positive, negative, weights, gamma)
    x = logits.cuda().requires_grad_()
    roles = (labels[:, 0].cuda(), positive[:, 0].cuda(), negative[:, 0].cuda())
    for factor in [1.0, 3.0]:
        x.grad = None
        loss = class_focal_loss(x, *roles, alpha=weights[0], gamma=gamma)
        assert "retina.ops.kernels.focal" in sys.modules
        (factor * loss).backward()
        torch.testing.assert_close(loss.double().cpu(), expected, rtol=2e-6, atol=0)
        assert x.grad.dtype == logits.dtype
        rtol = 1e-5 if logits.dtype == torch.float32 else 2 * torch.finfo(logits.dtype).eps
        atol = 1e-12 if logits.dtype != torch.float16 else 6e-8
        torch.testing.assert_close(x.grad.double().cpu(), factor * slope, rtol=rtol, atol=atol)
