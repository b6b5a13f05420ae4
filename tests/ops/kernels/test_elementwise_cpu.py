"""The closed forms of losses against the plain formulas in float64, and what autograd may ask of them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from retina.losses.focal import sigmoid_focal_loss, softmax_focal_loss
from retina.losses.soft_targets import quality_focal_loss, varifocal_loss
from retina.ops.kernels.elementwise_cpu import is_fusable

Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "focal": sigmoid_focal_loss,
    "focal without alpha": partial(sigmoid_focal_loss, alpha=None, gamma=1.5),
    "quality": quality_focal_loss,
    "quality 0.5": partial(quality_focal_loss, gamma=0.5),
    "varifocal": varifocal_loss,
}


def problem(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and targets of 101 x 7; targets hard, soft, or soft in few places, so that chunks are of both kinds."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(101, 7, generator=generator, dtype=dtype) * 4
    targets = (torch.rand(101, 7, generator=generator) < 0.3).to(dtype)
    if kind != "hard":
        targets = targets * torch.rand(101, 7, generator=generator).to(dtype)
    if kind == "mixed":
        targets[10:] = targets[10:].ceil()
    return logits.requires_grad_(), targets


def plain(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """Targets that want a gradient themselves keep the closed form out."""
    targets = targets.clone().requires_grad_()
    assert not is_fusable(logits, targets)
    return loss(logits, targets)


@pytest.mark.parametrize("kind", ["hard", "soft", "mixed"])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_equal_the_plain_form(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retina.ops.kernels.elementwise_cpu.CHUNK", 40)
    logits, targets = problem(kind)
    assert is_fusable(logits, targets)
    exact = logits.detach().double().requires_grad_()
    expected = plain(LOSSES[name], exact, targets.double())
    losses = LOSSES[name](logits, targets)
    atol = 0.0 if kind == "hard" else 1e-7  # p - y of a soft target has few digits
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=atol)
    weights = torch.rand_like(losses)
    slope = torch.autograd.grad((expected * weights).sum(), exact)[0]
    grad = torch.autograd.grad((losses * weights).sum(), logits)[0]
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=10 * atol)
    for reduction, total in (("sum", expected.sum()), ("mean", expected.mean())):
        torch.testing.assert_close(
            LOSSES[name](logits, targets, reduction=reduction).double(), total, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("name", ["focal", "focal without alpha", "quality", "varifocal"])
def test_second_derivatives(name: str) -> None:
    logits, targets = problem("soft", torch.float64)
    few = logits.detach()[:3].requires_grad_()
    assert torch.autograd.gradgradcheck(partial(LOSSES[name], targets=targets[:3]), few)


def test_second_derivatives_of_a_softmax() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    loss = partial(softmax_focal_loss, targets=torch.tensor([0, 6, 2, -100, 3]))
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("name", [*LOSSES, "softmax"])
def test_backward_again(name: str) -> None:
    logits, targets = problem("hard")
    loss = LOSSES[name](logits, targets) if name in LOSSES else softmax_focal_loss(logits, targets.long()[:, 0])
    first = torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(2 * loss.sum(), logits)[0], 2 * first)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss.sum(), logits)


def test_any_layout_and_shape() -> None:
    logits, targets = problem("mixed")
    expected = sigmoid_focal_loss(logits, targets)
    torch.testing.assert_close(sigmoid_focal_loss(logits.T, targets.T), expected.T)
    grad = torch.autograd.grad(sigmoid_focal_loss(logits.T, targets.T).sum(), logits)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), logits)[0])
    assert sigmoid_focal_loss(logits[0, 0], targets[0, 0]) == expected[0, 0]
    nothing = logits[:0]
    for reduction, value in (("sum", 0.0), ("mean", 0.0)):
        assert sigmoid_focal_loss(nothing, targets[:0], reduction=reduction) == value
    assert sigmoid_focal_loss(nothing, targets[:0]).shape == (0, 7)


def test_forward_mode_takes_the_plain_form() -> None:
    logits, targets = problem("soft", torch.float64)
    tangent = torch.randn_like(logits)
    _, derivative = torch.func.jvp(lambda x: quality_focal_loss(x, targets).sum(), (logits.detach(),), (tangent,))
    grad = torch.autograd.grad(quality_focal_loss(logits, targets).sum(), logits)[0]
    torch.testing.assert_close(derivative, (grad * tangent).sum())


def test_probabilities_that_underflow_keep_their_logarithm() -> None:
    logits = torch.tensor([[0.0, 200.0], [3.0, 1.0]], requires_grad=True)
    loss = softmax_focal_loss(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(loss[0], torch.tensor(200.0))
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()
