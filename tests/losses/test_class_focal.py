import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retina.losses.focal import class_focal_loss, sigmoid_focal_loss
from retina.ops.kernels import focal_cpu

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]
EXTREMES = torch.tensor([-1000.0, -100, -50, -20, -1, 0, 1, 20, 50, 100, 1000])


def random_problem(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Logits [... A K], labels, positive, negative: about a third positive, a third negative and a third ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    role = torch.randint(0, 3, shape[:-1], generator=generator)
    return logits, labels, role == 0, role == 1


def oracle(logits: Tensor, labels: Tensor, positive: Tensor, negative: Tensor, **settings) -> Tensor:
    targets = F.one_hot(labels.where(positive, 0), logits.shape[-1]) * positive[..., None]
    loss = sigmoid_focal_loss(logits, targets.to(logits.dtype), **settings)
    return (loss * (positive | negative)[..., None]).sum()


def value_and_grad(function, logits: Tensor, *arguments: Tensor, **settings) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = function(logits, *arguments, **settings)
    (3 * loss).backward()  # an upstream gradient other than 1
    return loss.detach(), logits.grad


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_an_alpha_for_each_class(gamma: float, compiled: bool, monkeypatch: pytest.MonkeyPatch):
    """Rows of chunks too, and what a compiler gets; equal alphas are one alpha."""
    monkeypatch.setattr(focal_cpu, "CHUNK", 40)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    problem, alpha = random_problem(100, 4), [0.1, 0.25, 0.9, 1.0]
    loss, grad = value_and_grad(class_focal_loss, *problem, alpha=alpha, gamma=gamma)
    monkeypatch.undo()
    expected, slope = value_and_grad(oracle, *problem, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-10)
    targets = F.one_hot(problem[1], 4) * problem[2][..., None]
    p = torch.sigmoid(problem[0])
    p_t, alpha_t = torch.where(targets == 1, p, 1 - p), torch.tensor(alpha, dtype=torch.float64)
    plain = torch.where(targets == 1, alpha_t, 1 - alpha_t) * (1 - p_t) ** gamma * -p_t.log()
    torch.testing.assert_close(loss, plain[problem[2] | problem[3]].sum(), rtol=1e-9, atol=0)
    same = value_and_grad(class_focal_loss, *problem, alpha=[0.3] * 4, gamma=gamma)
    torch.testing.assert_close(same, value_and_grad(class_focal_loss, *problem, alpha=0.3, gamma=gamma))


def test_an_alpha_for_each_class_is_as_long_as_there_are_classes():
    with pytest.raises(ValueError, match="alpha must have one value per class, 2, got 3"):
        class_focal_loss(*random_problem(3, 2), alpha=[0.1, 0.2, 0.3])


@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, None])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shape", [(2, 50, 7), (300, 1), (2, 0, 5), (3, 2, 4, 3)])
def test_closed_form_equals_the_oracle(shape: tuple[int, ...], gamma: float, alpha: float | None):
    problem = random_problem(*shape)
    loss, grad = value_and_grad(class_focal_loss, *problem, alpha=alpha, gamma=gamma)
    expected, slope = value_and_grad(oracle, *problem, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_closed_form_in_float32(gamma: float):
    logits, *roles = random_problem(4, 500, 80, dtype=torch.float32)
    loss, grad = value_and_grad(class_focal_loss, logits - 4.6, *roles, gamma=gamma)
    expected, slope = value_and_grad(oracle, (logits - 4.6).double(), *roles, gamma=gamma)
    assert loss.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("which", ["no positives", "all ignored", "all positive"])
def test_closed_form_with_one_role_only(which: str):
    logits, labels, positive, _ = random_problem(2, 30, 5)
    none, every = torch.zeros_like(positive), torch.ones_like(positive)
    roles = {"no positives": (none, every), "all ignored": (none, none), "all positive": (every, none)}[which]
    loss, grad = value_and_grad(class_focal_loss, logits, labels, *roles)
    expected, slope = value_and_grad(oracle, logits, labels, *roles)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-15)
    assert (which == "all ignored") == (loss == 0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_closed_form_gradcheck(gamma: float):
    logits, *roles = random_problem(6, 4)
    assert torch.autograd.gradcheck(lambda x: class_focal_loss(x, *roles, gamma=gamma), logits.requires_grad_())


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 2.0])
def test_closed_form_is_finite_far_out(gamma: float):
    logits = EXTREMES[:, None].expand(-1, 2)
    labels = torch.zeros(len(EXTREMES), dtype=torch.int64)
    every = torch.ones_like(labels, dtype=torch.bool)
    loss, grad = value_and_grad(class_focal_loss, logits, labels, every, ~every, gamma=gamma)
    expected, slope = value_and_grad(oracle, logits.double(), labels, every, ~every, gamma=gamma)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32(dtype: torch.dtype):
    logits, *roles = random_problem(2, 100, 9, dtype=dtype)
    loss, grad = value_and_grad(class_focal_loss, logits, *roles)
    expected, slope = value_and_grad(class_focal_loss, logits.float(), *roles)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.float(), slope, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_half_precision_gradients_survive_thanks_to_the_loss_scale():
    logits = torch.full((1, 4), -7.0, dtype=torch.float16, requires_grad=True)
    negative = torch.tensor([True])
    loss = class_focal_loss(logits, torch.tensor([0]), ~negative, negative)
    (loss * 2.0**16).backward()
    s = 1 / (1 + math.exp(7))
    expected = 0.75 * s**2 * (2 * (1 - s) * math.log1p(math.exp(-7)) + s) * 2**16  # 1.6e-9 before scaling: 0 in float16
    assert logits.grad[0, 0].item() == pytest.approx(expected, rel=2e-3)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    problem = random_problem(3, 101, 7)
    loss, grad = value_and_grad(class_focal_loss, *problem)
    monkeypatch.setattr(focal_cpu, "CHUNK", 40)
    chunked, chunked_grad = value_and_grad(class_focal_loss, *problem)
    torch.testing.assert_close(chunked, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(chunked_grad, grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("level", [-80.0, -16.5, -9.0, -4.6, 0.0, 9.0, 16.5, 80.0, 87.5, 100.0])
def test_float32_keeps_its_digits(level: float, gamma: float):
    """Also where all logits are equal and errors do not cancel: neither 1 + exp(x) nor a long sum may lose them."""
    logits = torch.full((2000, 40), level)
    labels, every = torch.zeros(2000, dtype=torch.int64), torch.ones(2000, dtype=torch.bool)
    roles = (labels, every & (torch.arange(2000) < 2), every)
    loss, grad = value_and_grad(class_focal_loss, logits, *roles, gamma=gamma)
    expected, slope = value_and_grad(oracle, logits.double(), *roles, gamma=gamma)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(grad.double(), slope, rtol=3e-6, atol=1e-16)  # the oracle's own digits for gamma 0


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_threads_do_not_change_the_result(gamma: float):
    problem = random_problem(1500, 80, dtype=torch.float32)
    loss, grad = value_and_grad(class_focal_loss, *problem, gamma=gamma)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threaded, threaded_grad = value_and_grad(class_focal_loss, *problem, gamma=gamma)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(threaded, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(threaded_grad, grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.25, None])
def test_what_a_compiler_gets_is_the_same(alpha: float | None, monkeypatch: pytest.MonkeyPatch):
    """Truly compiled in `losses/test_detection` and `tools/benchmark.py focal`: the type checks here keep it out."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    problem = random_problem(2, 40, 5)
    loss, grad = value_and_grad(class_focal_loss, *problem, alpha=alpha)
    expected, slope = value_and_grad(oracle, *problem, alpha=alpha)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, slope)


def test_nothing_is_read_from_the_device_and_no_shape_depends_on_data():
    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item"}
            assert name not in {"index", "index_put"} or all(i is None or i.dtype != torch.bool for i in args[1])
            return func(*args, **(kwargs or {}))

    logits, *roles = random_problem(2, 40, 5)
    with Forbid():
        class_focal_loss(logits.requires_grad_(), *roles).backward()


def test_logits_of_any_layout():
    logits, labels, positive, negative = random_problem(2, 30, 6)
    strided = logits.mT.contiguous().mT
    assert not strided.is_contiguous()
    loss, grad = value_and_grad(class_focal_loss, strided, labels, positive, negative)
    expected, slope = value_and_grad(class_focal_loss, logits, labels, positive, negative)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, slope)


@pytest.mark.parametrize("garbage", [-1, 10**9])
def test_labels_are_read_at_positive_anchors_only(garbage: int):
    logits, labels, positive, negative = random_problem(2, 30, 6)
    loss, grad = value_and_grad(class_focal_loss, logits, labels.where(positive, garbage), positive, negative)
    expected, slope = value_and_grad(class_focal_loss, logits, labels, positive, negative)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, slope)


def test_a_retained_graph_can_be_walked_twice():
    logits, *roles = random_problem(5, 3)
    logits.requires_grad_()
    loss = class_focal_loss(logits, *roles)
    (first,) = torch.autograd.grad(2 * loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(5 * loss, logits)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2.5 * first)


@pytest.mark.parametrize("num_anchors", [100, 30_000])
def test_the_gradient_is_not_copied(num_anchors: int):
    """Forward and backward hold one tensor of the logits' size beside them, whatever the number of anchors."""
    logits, *roles = random_problem(2, num_anchors, 40, dtype=torch.float32)
    logits.requires_grad_()
    loss = class_focal_loss(logits, *roles)
    address = loss.grad_fn.grad.data_ptr()
    loss.backward()
    assert loss.grad_fn.grad is None
    assert logits.grad.data_ptr() == address


def test_a_freed_graph_says_so():
    logits, *roles = random_problem(5, 3)
    loss = class_focal_loss(logits.requires_grad_(), *roles)
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


def test_without_gradients_the_loss_is_the_same():
    problem = random_problem(2, 40, 5)
    expected, _ = value_and_grad(class_focal_loss, *problem)
    assert class_focal_loss(*problem) == expected
    with torch.no_grad():
        assert class_focal_loss(problem[0].requires_grad_(), *problem[1:]).grad_fn is None


@pytest.mark.parametrize(
    "settings", [{"alpha": -0.1}, {"alpha": 1.5}, {"alpha": [0.5, 1.5]}, {"gamma": -1.0}, {"gamma": float("inf")}]
)
def test_settings_out_of_range_are_refused(settings: dict):
    with pytest.raises(ValueError, match=r"alpha must be|gamma must be"):
        class_focal_loss(*random_problem(3, 2), **settings)
