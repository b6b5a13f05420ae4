import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from retina.losses.focal import binary_cross_entropy, focal_of_error, sigmoid_focal_loss

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]
ALPHAS = [None, 0.25, torch.tensor([0.1, 0.5, 0.9])]
EXTREMES = torch.tensor([-1e4, -1000, -100, -50, -20, -1, 0, 1, 20, 50, 100, 1000, 1e4])
SHAPES = [(7, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)]


def random_logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4).to(dtype)


def random_classes(*shape: int, num_classes: int = 3) -> Tensor:
    return torch.randint(0, num_classes, shape, generator=torch.Generator().manual_seed(1))


def published(logits: Tensor, targets: Tensor, alpha: float | Tensor | None, gamma: float) -> Tensor:
    """Equation 5 word by word, for 0 and 1 and logits that are not too large."""
    p = 1 / (1 + torch.exp(-logits))
    p_t = torch.where(targets == 1, p, 1 - p)
    alpha_t = 1 if alpha is None else torch.where(targets == 1, alpha, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * torch.log(p_t)


def value_and_grad(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = function(logits)
    (grad,) = torch.autograd.grad(3 * loss.sum(), logits)  # an upstream gradient other than 1
    return loss.detach(), grad


# The formula


@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, None])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_is_the_published_formula(gamma: float, alpha: float | None):
    logits, targets = random_logits(500), random_classes(500, num_classes=2).double()
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma),
        published(logits, targets, None if alpha is None else torch.tensor(alpha), gamma),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("alpha", [0.25, None])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
def test_equals_torchvision(gamma: float, alpha: float | None):
    logits, targets = random_logits(500), random_classes(500, num_classes=2).double()
    targets[::7] = 0.3
    theirs = {"alpha": -1 if alpha is None else alpha, "gamma": gamma}
    loss, grad = value_and_grad(lambda x: sigmoid_focal_loss(x, targets, alpha=alpha, gamma=gamma), logits)
    expected, slope = value_and_grad(lambda x: torchvision.ops.sigmoid_focal_loss(x, targets, **theirs), logits)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(), (50,), *SHAPES])
def test_gamma_zero_is_binary_cross_entropy(shape: tuple[int, ...]):
    logits = random_logits(*shape, dtype=torch.float32)
    targets = random_classes(*shape, num_classes=2).float()
    for reduction in ("none", "sum", "mean"):
        loss = sigmoid_focal_loss(logits, targets, alpha=None, gamma=0.0, reduction=reduction)
        expected = F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    weights = torch.where(targets > 0, 0.25, 0.75)
    balanced = F.binary_cross_entropy_with_logits(logits, targets, weights)
    loss = sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=0.0, reduction="mean")
    torch.testing.assert_close(loss, balanced, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_an_example_is_down_weighted_by_its_own_error(gamma: float):
    p_t = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    for target, logits in ((1.0, p_t.logit()), (0.0, -p_t.logit())):
        targets = torch.full_like(p_t, target)
        focal_loss = sigmoid_focal_loss(logits, targets, alpha=None, gamma=gamma)
        torch.testing.assert_close(focal_loss / -p_t.log(), (1 - p_t) ** gamma, rtol=1e-12, atol=0)


def test_the_numbers_of_the_paper():
    """Section 3.2: with gamma 2, 100 times lower than cross entropy at p_t 0.9, about 1000 times at 0.968, and at most
    4 times for p_t up to 0.5."""
    p_t = torch.tensor([0.9, 0.968, 0.5, 0.4, 0.01], dtype=torch.float64)
    times = -p_t.log() / sigmoid_focal_loss(p_t.logit(), torch.ones_like(p_t), alpha=None)
    assert times[0].item() == pytest.approx(100)
    assert times[1].item() == pytest.approx(1000, rel=0.03)
    assert times[2].item() == pytest.approx(4)
    assert (times[3:] < 4).all()


# Targets


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_class_indices_are_as_good_as_multi_hot(shape: tuple[int, ...], gamma: float, alpha):
    logits = random_logits(*shape)
    classes = random_classes(shape[0], *shape[2:])
    multi_hot = F.one_hot(classes, 3).movedim(-1, 1).double()
    settings = {"alpha": alpha, "gamma": gamma}
    expected, slope = value_and_grad(lambda x: sigmoid_focal_loss(x, multi_hot, **settings), logits)
    for targets in (classes, classes[:, None], classes.int(), classes.byte(), multi_hot.long(), multi_hot.bool()):
        loss, grad = value_and_grad(lambda x, t=targets: sigmoid_focal_loss(x, t, **settings), logits)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ignored_positions_count_for_nothing(shape: tuple[int, ...], alpha):
    logits = random_logits(*shape)
    classes = random_classes(shape[0], *shape[2:])
    ignored = torch.arange(classes.numel()).reshape(classes.shape) % 3 == 0
    flat, kept = logits.movedim(1, -1)[~ignored], classes[~ignored]
    for reduction in ("sum", "mean"):
        settings = {"alpha": alpha, "reduction": reduction}
        loss, grad = value_and_grad(
            lambda x, s=settings: sigmoid_focal_loss(x, classes.masked_fill(ignored, 255), ignore_index=255, **s),
            logits,
        )
        torch.testing.assert_close(loss, sigmoid_focal_loss(flat, kept, **settings))
        assert (grad.movedim(1, -1)[ignored] == 0).all()
        assert (grad.movedim(1, -1)[~ignored] != 0).all()


def test_ignored_elements_of_integer_masks_count_for_nothing():
    logits, masks = random_logits(4, 6, 6), random_classes(4, 6, 6, num_classes=2)
    ignored = random_classes(4, 6, 6) == 0
    for dtype, value in ((torch.int64, -100), (torch.uint8, 255)):
        targets = masks.to(dtype).masked_fill(ignored, value)
        loss = sigmoid_focal_loss(logits, targets, ignore_index=value, reduction="mean")
        expected = sigmoid_focal_loss(logits[~ignored], masks[~ignored], reduction="mean")
        torch.testing.assert_close(loss, expected)


def test_unsigned_targets_do_not_take_the_default_for_156():
    """-100 is 156 in eight bits."""
    assert sigmoid_focal_loss(torch.zeros(1, 200), torch.tensor([156], dtype=torch.uint8)).sum() > 0
    with pytest.raises(ValueError, match="got 156"):
        sigmoid_focal_loss(torch.zeros(1), torch.tensor([156], dtype=torch.uint8))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_where_everything_is_ignored_the_loss_is_zero(reduction: str):
    loss, grad = value_and_grad(
        lambda x: sigmoid_focal_loss(x, torch.full((4,), -100), reduction=reduction), random_logits(4, 3)
    )
    assert loss == 0
    assert grad.abs().sum() == 0


def test_no_logits_at_all():
    assert sigmoid_focal_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), reduction="mean") == 0
    assert sigmoid_focal_loss(torch.zeros(0), torch.zeros(0), reduction="mean") == 0


def test_alpha_per_class_is_alpha_of_each_class():
    logits, targets = random_logits(5, 3, 4), random_classes(5, 3, 4, num_classes=2)
    alpha = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    loss = sigmoid_focal_loss(logits, targets, alpha=alpha)
    for c, value in enumerate((0.1, 0.5, 0.9)):
        torch.testing.assert_close(loss[:, c], sigmoid_focal_loss(logits[:, c], targets[:, c], alpha=value))


# Precision


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("target", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 2.0, 50.0])
def test_finite_far_out(gamma: float, target: float, indices: bool):
    logits, targets = EXTREMES[:, None].expand(-1, 2), torch.full((len(EXTREMES), 2), target)
    if indices:
        targets = targets[:, 0].long()
    loss, grad = value_and_grad(lambda x: sigmoid_focal_loss(x, targets, gamma=gamma), logits)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("level", [-80.0, -17.0, -10.0, -4.6, 0.0, 4.6, 17.0, 80.0])
def test_float32_keeps_its_digits(level: float):
    """`F.binary_cross_entropy_with_logits` has 0.8 % error at -10 and 0 at -17."""
    logits = torch.tensor(level)
    for target in (0.0, 1.0):
        z = level if target == 0 else -level
        expected = max(z, 0.0) + math.log1p(math.exp(-abs(z)))
        assert binary_cross_entropy(logits, torch.tensor(target)).item() == pytest.approx(expected, rel=1e-6)
    s = 1 / (1 + math.exp(-level))
    expected = s**0.5 * (max(level, 0.0) + math.log1p(math.exp(-abs(level))))
    assert focal_of_error(logits, 0.5).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["soft", "indices"])
def test_gradcheck(kind: str, gamma: float, alpha):
    logits = random_logits(3, 3).requires_grad_()
    targets = torch.linspace(0, 1, 9, dtype=torch.float64).reshape(3, 3) if kind == "soft" else random_classes(3)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets, alpha=alpha, gamma=gamma), logits)
    assert torch.autograd.gradgradcheck(lambda x: sigmoid_focal_loss(x, targets, alpha=alpha, gamma=gamma), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32(dtype: torch.dtype):
    logits = random_logits(100, 3, dtype=dtype)
    for targets in (torch.zeros_like(logits), random_classes(100)):
        loss = sigmoid_focal_loss(logits, targets, alpha=torch.tensor([0.1, 0.5, 0.9]))
        assert loss.dtype == torch.float32
        assert torch.equal(loss, sigmoid_focal_loss(logits.float(), targets, alpha=torch.tensor([0.1, 0.5, 0.9])))


# Values that do not fit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha must be"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"alpha": torch.tensor([0.5, 1.5, 0.5])}, "alpha must be in"),
        ({"alpha": torch.tensor([0.5, 0.5])}, "alpha must have one value per class, 3, got shape"),
        ({"gamma": -1.0}, "gamma must be"),
        ({"gamma": math.inf}, "gamma must be"),
        ({"gamma": math.nan}, "gamma must be"),
        ({"reduction": "batchmean"}, "reduction must be none, sum or mean, got 'batchmean'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str):
    for targets in (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=message):
            sigmoid_focal_loss(torch.zeros(2, 3), targets, **settings)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(3), "got \\[3\\]"),
        (torch.zeros(2, 4), "got \\[2, 4\\]"),
        (torch.zeros(2), "class indices must be integers"),
        (torch.tensor([0, 3]), "class indices must be in 0..2 or ignore_index -100, got 3"),
        (torch.tensor([0, -1]), "class indices must be in 0..2 or ignore_index -100, got -1"),
        (torch.full((2, 3), 1.5), "must be in \\[0, 1\\], got 1.5"),
        (torch.full((2, 3), math.nan), "must be in \\[0, 1\\], got nan"),
        (torch.full((2, 3), 255), "must be 0, 1 or ignore_index -100, got 255"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(torch.zeros(2, 3), targets)
