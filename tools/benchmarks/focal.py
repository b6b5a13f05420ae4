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
    return on_gpu(bench) if bench.device.type == "cuda" else on_cpu(bench)


def on_cpu(bench: Bench) -> list[Row]:
    anchors = 20_000 if bench.quick else 200_000
    problem = random_problem((1, anchors), bench.device, torch.float32)
    name = f"focal loss, {anchors:,} x {CLASSES} fp32"
    backend = "eager" if bench.quick else "inductor"  # C++ takes a minute to compile
    fused, reference = partial(mean_loss, problem, class_focal_loss), partial(torchvision_loss, problem)
    compiled = partial(mean_loss, problem, torch.compile(class_focal_loss, backend=backend))
    for way, rtol in ((fused, 1e-6), (reference, 1e-6), (compiled, 1e-5)):  # compiled, it sums in a row
        check(problem, way(), problem.positive.sum(), rtol=rtol, grad_atol=1e-8)
    units = {name: memory(problem, way) for name, way in (("ours", fused), ("torchvision", reference))}
    return [
        speedup(f"{name}: speed", bench.time({"ours": fused, "reference": reference}), must=6, goal=15),
        absolute(f"{name}: memory in units of the logits", units["ours"], "x", must=2.1, goal=1.1),
        absolute(f"{name}: the same of torchvision", units["torchvision"], "x"),
        speedup(f"{name}: torch.compile of the plain formula", bench.time({"ours": compiled, "reference": reference})),
    ]


def on_gpu(bench: Bench) -> list[Row]:
    images, anchors = (2, 2_000) if bench.quick else (16, 201_600)
    problem = random_problem((images, anchors), bench.device, torch.bfloat16)
    target = torch.empty_like(problem.logits, requires_grad=False)

    def backpropagate(divisor: float) -> Tensor:
        problem.logits.grad = None
        loss = class_focal_loss(*problem) / divisor
        loss.backward()
        return loss.detach()

    def copy() -> None:
        target.copy_(problem.logits.detach())

    check(problem, backpropagate(1.0), 1, rtol=1e-5, grad_rtol=torch.finfo(torch.bfloat16).eps, grad_atol=1e-12)
    name = f"focal loss, {images} x {anchors:,} x {CLASSES} bf16: fraction of copy bandwidth"
    times = bench.time({"ours": partial(backpropagate, 1.0), "mean": partial(backpropagate, 8.0), "reference": copy})
    mean = {"ours": times["mean"], "reference": times["reference"]}
    return [speedup(name, times, must=0.4, goal=0.8), speedup(f"{name}, where backward has to scale", mean)]


def random_problem(anchors: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Problem:
    role = torch.rand(anchors, device=device)
    return Problem(
        logits=(torch.randn(*anchors, CLASSES, device=device) + BIAS).to(dtype).requires_grad_(),
        labels=torch.randint(0, CLASSES, anchors, device=device),
        positive=role < 0.001,
        negative=role > 0.003,
    )


def mean_loss(problem: Problem, focal_loss: Callable[..., Tensor]) -> Tensor:
    """The loss per positive; its gradient is that of the logits."""
    problem.logits.grad = None
    loss = focal_loss(*problem) / problem.positive.sum().clamp(min=1)
    loss.backward()
    return loss.detach()


def torchvision_loss(problem: Problem) -> Tensor:
    logits, labels, positive, negative = problem
    logits.grad = None
    targets = torch.zeros_like(logits)
    targets[positive, labels[positive]] = 1.0
    valid = positive | negative
    loss = torchvision.ops.sigmoid_focal_loss(logits[valid], targets[valid], reduction="sum") / max(1, positive.sum())
    loss.backward()
    return loss.detach()


def check(
    problem: Problem, loss: Tensor, divisor: Tensor | int, *, rtol: float, grad_rtol: float = 0.0, grad_atol: float
) -> None:
    """This loss of all images and the gradient that it left, against the plain formula in float64, image by image."""
    assert problem.logits.grad is not None
    total = torch.zeros((), dtype=torch.float64, device=loss.device)
    for grad, logits, labels, positive, negative in zip(problem.logits.grad, *problem, strict=True):
        exact = logits.detach().double().requires_grad_()
        targets = positive[:, None] & (labels[:, None] == torch.arange(CLASSES, device=logits.device))
        expected = (sigmoid_focal_loss(exact, targets.double()) * (positive | negative)[:, None]).sum() / divisor
        slope = torch.autograd.grad(expected, exact)[0]
        torch.testing.assert_close(grad.double(), slope, rtol=grad_rtol, atol=grad_atol)
        total += expected.detach()
    torch.testing.assert_close(loss.double(), total, rtol=rtol, atol=0)


def memory(problem: Problem, way: Callable[[], object]) -> float:
    """Peak memory in units of the logits."""
    problem.logits.grad = None
    return peak_memory(way) / problem.logits.nbytes
