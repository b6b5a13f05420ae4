"""Sigmoid focal loss, forward and backward, against what torchvision's RetinaNetClassificationHead.compute_loss does.

One anchor in a thousand is positive and two are ignored, as in training; logits are those of its beginning. Both sides
end with the mean over the positives. On a GPU, the reference is a copy of the logits.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from retina.lab.clock import Bench, Row, absolute, peak_memory, speedup
from retina.losses.focal import class_focal_loss, sigmoid_focal_loss

CLASSES = 80
BIAS = -4.6  # the prior of 0.01 with which training starts


class Problem(NamedTuple):
    logits: Tensor
    """[*batch A K], a leaf that wants a gradient."""
    labels: Tensor
    positive: Tensor
    negative: Tensor


def run(bench: Bench) -> list[Row]:
    return _on_gpu(bench) if bench.device.type == "cuda" else _on_cpu(bench)


def _on_cpu(bench: Bench) -> list[Row]:
    anchors = 20_000 if bench.quick else 200_000
    problem = _random_problem((anchors,), bench.device, torch.float32)
    name = f"focal loss, {anchors:,} x {CLASSES} fp32"
    ours, reference = partial(_ours, problem, class_focal_loss), partial(_torchvision, problem)
    backend = "aot_eager" if bench.quick else "inductor"  # C++ takes a minute to compile
    compiled = partial(_ours, problem, torch.compile(class_focal_loss, backend=backend))
    _check(problem, ours())
    _check(problem, reference())
    _check(problem, compiled(), rtol=1e-5)  # it sums in a row
    compilation = {"ours": compiled, "reference": reference}
    return [
        speedup(f"{name}: speed", bench.time({"ours": ours, "reference": reference}), must=6, goal=15),
        _memory(f"{name}: memory in units of the logits", problem, ours, must=2.1, goal=1.1),
        _memory(f"{name}: the same of torchvision", problem, reference),
        speedup(f"{name}: torch.compile of the plain formula", bench.time(compilation), must=None, goal=None),
    ]


def _on_gpu(bench: Bench) -> list[Row]:
    images, anchors = (2, 2_000) if bench.quick else (16, 201_600)
    problem = _random_problem((images, anchors), bench.device, torch.bfloat16)
    _check_sums(problem)
    target = torch.empty_like(problem.logits, requires_grad=False)

    def ours(divisor: float) -> None:
        problem.logits.grad = None
        (class_focal_loss(*problem) / divisor).backward()

    def copy() -> None:
        target.copy_(problem.logits.detach())

    name = f"focal loss, {images} x {anchors:,} x {CLASSES} bf16: fraction of copy bandwidth"
    times = bench.time({"ours": partial(ours, 1.0), "mean": partial(ours, 8.0), "reference": copy})
    mean = {"ours": times["mean"], "reference": times["reference"]}
    return [
        speedup(name, times, must=0.4, goal=0.8),
        speedup(f"{name}, where backward has to scale", mean, must=None, goal=None),
    ]


def _random_problem(anchors: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Problem:
    role = torch.rand(anchors, device=device)
    return Problem(
        logits=(torch.randn(*anchors, CLASSES, device=device) + BIAS).to(dtype).requires_grad_(),
        labels=torch.randint(0, CLASSES, anchors, device=device),
        positive=role < 0.001,
        negative=role > 0.003,
    )


def _ours(problem: Problem, focal_loss: Callable[..., Tensor]) -> Tensor:
    problem.logits.grad = None
    loss = focal_loss(*problem) / problem.positive.sum().clamp(min=1)
    loss.backward()
    return loss.detach()


def _torchvision(problem: Problem) -> Tensor:
    logits, labels, positive, negative = problem
    logits.grad = None
    targets = torch.zeros_like(logits)
    targets[positive, labels[positive]] = 1.0
    valid = positive | negative
    loss = torchvision.ops.sigmoid_focal_loss(logits[valid], targets[valid], reduction="sum") / max(1, positive.sum())
    loss.backward()
    return loss.detach()


def _check(problem: Problem, loss: Tensor, *, rtol: float = 1e-6) -> None:
    """This loss and the gradient that it left, against float64."""
    expected, grad = _float64(*problem)
    count = problem.positive.sum().clamp(min=1)
    torch.testing.assert_close(loss.double(), expected / count, rtol=rtol, atol=0)
    assert problem.logits.grad is not None
    torch.testing.assert_close(problem.logits.grad.double(), grad / count, rtol=0, atol=1e-8)


def _check_sums(problem: Problem) -> None:
    """The loss and gradient of all images against the sum over images in float64, up to the rounding of bfloat16."""
    problem.logits.grad = None
    loss = class_focal_loss(*problem)
    loss.backward()
    assert problem.logits.grad is not None
    losses = []
    for grad, *image in zip(problem.logits.grad, *problem, strict=True):
        expected, slope = _float64(*image)
        torch.testing.assert_close(grad.double(), slope, rtol=torch.finfo(grad.dtype).eps, atol=1e-12)
        losses.append(expected)
    torch.testing.assert_close(loss.double(), torch.stack(losses).sum(), rtol=1e-5, atol=0)


def _float64(logits: Tensor, labels: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and gradient of the plain formula."""
    logits = logits.detach().double().requires_grad_()
    targets = positive[:, None] & (labels[:, None] == torch.arange(CLASSES, device=logits.device))
    loss = (sigmoid_focal_loss(logits, targets.double()) * (positive | negative)[:, None]).sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def _memory(
    measure: str, problem: Problem, way: Callable[[], object], *, must: float | None = None, goal: float | None = None
) -> Row:
    problem.logits.grad = None
    units = peak_memory(way) / problem.logits.nbytes
    return absolute(measure, units, "x", must=must, goal=goal)
