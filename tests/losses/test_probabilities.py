import pytest
import torch
from torch import Tensor

from retina.losses.common import logits_of_sigmoid, logits_of_softmax
from retina.losses.focal import sigmoid_focal_loss, softmax_focal_loss

GAMMAS = [0.0, 0.5, 1.0, 2.0]
TINY = torch.finfo(torch.float32).tiny
# from the smallest normal number to the greatest below 1
PROBABILITIES = torch.tensor(
    [TINY, 1e-30, 1e-10, 1e-7, 1e-4, 0.01, 0.3, 0.4999, 0.5, 0.5001, 0.7, 0.99, 0.9999, 1 - 1e-6]
)
PROBABILITIES = torch.cat((PROBABILITIES, 1 - torch.tensor([2.0**-23, 2.0**-24])))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("target", [0, 1])
def test_sigmoid_gives_the_value_of_the_exact_logit(target: int, gamma: float):
    targets = torch.full_like(PROBABILITIES, target)
    p = PROBABILITIES.double()
    exact = p.log() - torch.log1p(-p)
    expected = sigmoid_focal_loss(exact, targets, gamma=gamma)
    loss = sigmoid_focal_loss(logits_of_sigmoid(PROBABILITIES), targets, gamma=gamma)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_gives_the_value_of_the_exact_logit(gamma: float):
    p = torch.stack((PROBABILITIES, (1 - PROBABILITIES) * 0.75, (1 - PROBABILITIES) * 0.25), dim=1)
    for target in range(3):
        targets = torch.full((len(p),), target)
        expected = softmax_focal_loss(p.double().log(), targets, gamma=gamma)
        loss = softmax_focal_loss(logits_of_softmax(p), targets, gamma=gamma)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_model_that_ends_in_a_sigmoid_or_softmax_learns_the_same(gamma: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, generator=generator, dtype=torch.float64) * 3
    hot, classes = (logits > 1).long(), torch.arange(40) % 3
    for loss, ending, inverse, targets in (
        (sigmoid_focal_loss, torch.sigmoid, logits_of_sigmoid, hot),
        (softmax_focal_loss, lambda x: x.softmax(1), logits_of_softmax, classes),
    ):
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        expected = loss(x, targets, gamma=gamma)
        actual = loss(inverse(ending(y)), targets, gamma=gamma)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        (slope,), (grad,) = torch.autograd.grad(expected.sum(), x), torch.autograd.grad(actual.sum(), y)
        torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-12)


def test_every_float16_has_its_own_value():
    p = torch.arange(1, 15 * 1024, dtype=torch.int16).view(torch.float16)  # all between 0 and 1, subnormals too
    exact = torch.log(p.double()) - torch.log1p(-p.double())
    for target in (0, 1):
        targets = torch.full(p.shape, target)
        loss, expected = (sigmoid_focal_loss(x, targets, alpha=None) for x in (logits_of_sigmoid(p), exact))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def finite(loss: Tensor, probabilities: Tensor) -> bool:
    loss.sum().backward()
    return bool(loss.isfinite().all() and probabilities.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 2.0])
def test_never_nan_at_zero_and_one(gamma: float, dtype: torch.dtype):
    values = [0.0, torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).tiny, 0.5, 1.0]  # a subnormal too
    for target in (0, 1):
        p = torch.tensor(values, dtype=dtype, requires_grad=True)
        assert finite(sigmoid_focal_loss(logits_of_sigmoid(p), torch.full((5,), target), gamma=gamma), p)
        p = torch.stack((torch.tensor(values, dtype=dtype), 1 - torch.tensor(values, dtype=dtype)), dim=1)
        p.requires_grad_()
        assert finite(softmax_focal_loss(logits_of_softmax(p), torch.full((5,), target), gamma=gamma), p)


def test_saturated_endings_give_no_nan_to_the_model():
    for ending, inverse, loss in (
        (torch.sigmoid, logits_of_sigmoid, sigmoid_focal_loss),
        (lambda x: x.softmax(1), logits_of_softmax, softmax_focal_loss),
    ):
        x = torch.tensor([[1e4, -1e4], [-200.0, 200.0]], requires_grad=True)
        targets = torch.tensor([1, 0])
        assert finite(loss(inverse(ending(x)), targets), x)


def test_a_certain_mistake_costs_as_much_as_the_smallest_number_tells():
    loss = sigmoid_focal_loss(logits_of_sigmoid(torch.tensor([0.0, 1.0])), torch.tensor([1, 0]), alpha=None)
    torch.testing.assert_close(loss, -torch.tensor([TINY, TINY]).log())


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(value: float):
    for function in (logits_of_sigmoid, logits_of_softmax):
        with pytest.raises(ValueError, match="probabilities must be in"):
            function(torch.tensor([0.5, value]))
