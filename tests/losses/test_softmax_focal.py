import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retina.losses.focal import sigmoid_focal_loss, softmax_focal_loss

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]
SHAPES = [(7, 4), (5, 4, 6), (2, 4, 5, 6), (2, 4, 2, 3, 4)]
WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.0])
EXTREMES = torch.tensor([-1e4, -100, -20, -1, 0, 1, 20, 100, 1e4])


def random_problem(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (N, C, ...) and class indices (N, ...)."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(dtype)
    return logits, torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)


def one_hot(classes: Tensor, num_classes: int = 4) -> Tensor:
    return F.one_hot(classes, num_classes).movedim(-1, 1)


def value_and_grad(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = function(logits)
    (grad,) = torch.autograd.grad(3 * loss.sum(), logits)
    return loss.detach(), grad


# The formula


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_published_formula(shape: tuple[int, ...], gamma: float):
    logits, classes = random_problem(*shape)
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    p_t = (p * one_hot(classes)).sum(1)
    loss = softmax_focal_loss(logits, classes, gamma=gamma)
    torch.testing.assert_close(loss, -((1 - p_t) ** gamma) * p_t.log(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_zero_is_weighted_cross_entropy(shape: tuple[int, ...], weight, reduction: str, dtype: torch.dtype):
    logits, classes = random_problem(*shape, dtype=dtype)
    classes = torch.where(torch.arange(classes.numel()).reshape(classes.shape) % 4 == 1, -100, classes)
    theirs = {"weight": None if weight is None else weight.to(dtype), "reduction": reduction}
    loss, grad = value_and_grad(
        lambda x: softmax_focal_loss(x, classes, weight=weight, gamma=0.0, reduction=reduction), logits
    )
    expected, slope = value_and_grad(lambda x: F.cross_entropy(x, classes, **theirs), logits)
    exact = {"rtol": 0, "atol": 0} if reduction == "none" else {}  # sums may go another way round
    torch.testing.assert_close(loss, expected, **exact)
    torch.testing.assert_close(grad, slope)


def test_the_mean_is_divided_by_the_weights_that_count():
    logits, classes = random_problem(7, 4)
    classes[2] = -100
    losses = softmax_focal_loss(logits, classes, weight=WEIGHT)
    divisor = sum(WEIGHT[c].item() for c in classes if c != -100)
    mean = softmax_focal_loss(logits, classes, weight=WEIGHT, reduction="mean")
    torch.testing.assert_close(mean, losses.sum() / divisor)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_an_example_is_down_weighted_by_its_own_error(gamma: float):
    logits, classes = random_problem(50, 4)
    ratio = softmax_focal_loss(logits, classes, gamma=gamma) / F.cross_entropy(logits, classes, reduction="none")
    p_t = logits.softmax(1).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(ratio, (1 - p_t) ** gamma, rtol=1e-9, atol=0)


def test_the_numbers_of_the_paper():
    p_t = torch.tensor([0.9, 0.968, 0.5, 0.4, 0.01], dtype=torch.float64)
    logits = torch.stack((p_t, (1 - p_t) / 2, (1 - p_t) / 2), dim=1).log()
    times = -p_t.log() / softmax_focal_loss(logits, torch.zeros(5, dtype=torch.int64))
    assert times[0].item() == pytest.approx(100)
    assert times[1].item() == pytest.approx(1000, rel=0.03)
    assert times[2].item() == pytest.approx(4)
    assert (times[3:] < 4).all()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_two_classes_are_the_sigmoid_of_their_difference(gamma: float):
    logits, classes = random_problem(50, 2)
    loss = softmax_focal_loss(logits, classes, gamma=gamma)
    expected = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], classes, alpha=None, gamma=gamma)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_log_probabilities_are_logits():
    logits, classes = random_problem(50, 4)
    log_p = logits.log_softmax(1)
    torch.testing.assert_close(softmax_focal_loss(log_p, classes), softmax_focal_loss(logits, classes))
    nll = softmax_focal_loss(log_p, classes, gamma=0.0, reduction="mean")
    torch.testing.assert_close(nll, F.nll_loss(log_p, classes))


# Targets


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_ways_to_write_a_target_are_one_loss(shape: tuple[int, ...], weight, reduction: str):
    logits, classes = random_problem(*shape)
    settings = {"weight": weight, "reduction": reduction}
    expected, slope = value_and_grad(lambda x: softmax_focal_loss(x, classes, **settings), logits)
    hot = one_hot(classes)
    for targets in (classes[:, None], classes.byte(), hot, hot.bool(), hot.float(), hot.double()):
        loss, grad = value_and_grad(lambda x, t=targets: softmax_focal_loss(x, t, **settings), logits)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("shape", SHAPES)
def test_ignored_positions_count_for_nothing(shape: tuple[int, ...], weight):
    logits, classes = random_problem(*shape)
    ignored = torch.arange(classes.numel()).reshape(classes.shape) % 3 == 0
    flat, kept = logits.movedim(1, -1)[~ignored], classes[~ignored]
    hot = one_hot(classes).masked_fill(ignored[:, None], 255)
    for reduction in ("sum", "mean"):
        settings = {"weight": weight, "reduction": reduction}
        expected = softmax_focal_loss(flat, kept, **settings)
        for targets in (classes.masked_fill(ignored, 255), hot):
            loss, grad = value_and_grad(
                lambda x, t=targets, s=settings: softmax_focal_loss(x, t, ignore_index=255, **s), logits
            )
            torch.testing.assert_close(loss, expected)
            assert (grad.movedim(1, -1)[ignored] == 0).all()


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_several_labels_are_their_mean(weight):
    logits, _ = random_problem(2, 4)
    targets = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]])
    loss = softmax_focal_loss(logits, targets, weight=weight)
    for row, labels in enumerate(([0, 2], [0, 1, 2, 3])):
        each = softmax_focal_loss(logits[[row] * len(labels)], torch.tensor(labels), weight=weight)
        torch.testing.assert_close(loss[row], each.mean())


def test_a_position_with_one_ignored_label_is_ignored():
    logits, _ = random_problem(2, 4)
    targets = torch.tensor([[1, 0, -100, 0], [0, 1, 0, 0]])
    assert softmax_focal_loss(logits, targets)[0] == 0


@pytest.mark.parametrize("labels", [False, True])
def test_what_does_not_count_may_be_anything(labels: bool):
    """A masked class at minus infinity; a position that is ignored, with a logit that is no number."""
    logits = torch.tensor([[0.5, -torch.inf, 1.0], [torch.nan, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[1, 0, 0], [-100, -100, -100]]) if labels else torch.tensor([0, -100])
    loss = softmax_focal_loss(logits, targets, reduction="sum")
    expected = softmax_focal_loss(logits[:1, [0, 2]], torch.tensor([0]), reduction="sum")
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits)
    (slope,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad[0], slope[0])


def test_soft_labels_are_those_of_cross_entropy():
    logits, classes = random_problem(50, 4)
    smooth = one_hot(classes) * 0.9 + 0.025
    loss = softmax_focal_loss(logits, smooth, gamma=0.0, reduction="mean")
    torch.testing.assert_close(loss, F.cross_entropy(logits, classes, label_smoothing=0.1))


def test_positions_without_a_label_count_for_nothing():
    logits, classes = random_problem(6, 4)
    targets = one_hot(classes)
    targets[::2] = 0
    loss, grad = value_and_grad(lambda x: softmax_focal_loss(x, targets, reduction="mean"), logits)
    torch.testing.assert_close(loss, softmax_focal_loss(logits[1::2], classes[1::2], reduction="mean"))
    assert grad[::2].abs().sum() == 0


@pytest.mark.parametrize("targets", [torch.full((3,), -100), torch.zeros(3, 4)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_where_nothing_counts_the_loss_is_zero(reduction: str, targets: Tensor):
    loss, grad = value_and_grad(
        lambda x: softmax_focal_loss(x, targets, weight=WEIGHT, reduction=reduction), torch.zeros(3, 4)
    )
    assert loss == 0
    assert grad.abs().sum() == 0


def test_one_position_without_a_batch():
    logits = torch.tensor([0.5, -1.0, 2.0])
    loss = softmax_focal_loss(logits, torch.tensor(2))
    torch.testing.assert_close(loss, softmax_focal_loss(logits[None], torch.tensor([2]))[0])


# Precision


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 2.0, 50.0])
def test_finite_far_out(gamma: float, labels: bool):
    logits = torch.cartesian_prod(EXTREMES, EXTREMES, EXTREMES)
    targets = torch.full((len(logits), 3), 0.5) if labels else torch.zeros(len(logits), dtype=torch.int64)
    loss, grad = value_and_grad(lambda x: softmax_focal_loss(x, targets, gamma=gamma), logits)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("labels", [False, True])
def test_gradcheck(labels: bool, weight, gamma: float):
    logits, classes = random_problem(2, 4, 2)
    targets = torch.tensor([[1.0, 0, 0, 0.5]]).double()[..., None].expand(2, -1, 2) if labels else classes
    assert torch.autograd.gradcheck(
        lambda x: softmax_focal_loss(x, targets, weight=weight, gamma=gamma), logits.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32(dtype: torch.dtype):
    logits, classes = random_problem(50, 4, dtype=dtype)
    loss = softmax_focal_loss(logits, classes, weight=WEIGHT)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, softmax_focal_loss(logits.float(), classes, weight=WEIGHT))


def test_class_indices_build_no_one_hot_tensor():
    """One tensor of the logits' size is kept for the gradient: the log-softmax, as by cross entropy itself."""
    kept = set()
    logits, classes = random_problem(3, 4, 50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add((t.data_ptr(), t.numel())) or t, lambda t: t):
        softmax_focal_loss(logits.requires_grad_(), classes, weight=WEIGHT, reduction="mean")
    assert sum(size >= logits.numel() for _, size in kept) == 1


# Values that do not fit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1.0}, "gamma must be"),
        ({"gamma": math.nan}, "gamma must be"),
        ({"weight": torch.ones(3)}, "weight must have one value per class, 4, got shape \\[3\\]"),
        ({"weight": torch.tensor([1.0, -1, 1, 1])}, "weight must be finite and at least 0, got -1"),
        ({"reduction": "average"}, "reduction must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str):
    for targets in (torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=message):
            softmax_focal_loss(torch.zeros(2, 4), targets, **settings)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(3), "targets must have the shape of the logits \\[2, 4\\], or be class indices of shape \\[2\\]"),
        (torch.zeros(2), "class indices must be integers, got torch.float32"),
        (torch.tensor([0, 4]), "class indices must be in 0..3 or ignore_index -100, got 4"),
        (torch.full((2, 4), -0.5), "must be in \\[0, 1\\], got -0.5"),
        (torch.full((2, 4), 7), "must be 0, 1 or ignore_index -100, got 7"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        softmax_focal_loss(torch.zeros(2, 4), targets)
