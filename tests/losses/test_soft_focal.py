import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retina.losses.focal import sigmoid_focal_loss
from retina.losses.soft_targets import distribution_focal_loss, ghm_loss, quality_focal_loss, varifocal_loss

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]
EXTREMES = torch.tensor([-1e4, -100, -20, -1, 0, 1, 20, 100, 1e4])


def random_problem(size: int = 200, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which a third are 0, a third 1 and a third between."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, generator=generator, dtype=dtype) * 4
    targets = torch.rand(size, generator=generator, dtype=dtype)
    targets[::3], targets[1::3] = 0, 1
    return logits, targets


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return -(targets * p.log() + (1 - targets) * (1 - p).log())


# Quality focal


@pytest.mark.parametrize("gamma", GAMMAS)
def test_quality_focal_is_the_published_formula(gamma: float):
    logits, targets = random_problem()
    expected = (targets - torch.sigmoid(logits)).abs() ** gamma * bce(logits, targets)
    torch.testing.assert_close(quality_focal_loss(logits, targets, gamma=gamma), expected, rtol=1e-9, atol=1e-12)


def test_quality_focal_on_zeros_and_ones_is_the_focal_loss():
    logits, targets = random_problem()
    hard = targets.round()
    torch.testing.assert_close(quality_focal_loss(logits, hard), sigmoid_focal_loss(logits, hard, alpha=None))


def test_quality_focal_is_smallest_where_the_score_is_the_quality():
    logits = torch.linspace(-4, 4, 801, dtype=torch.float64)
    loss = quality_focal_loss(logits, torch.full_like(logits, 0.7))
    assert torch.sigmoid(logits[loss.argmin()]).item() == pytest.approx(0.7, abs=3e-3)


# Varifocal


@pytest.mark.parametrize("gamma", GAMMAS)
def test_varifocal_is_the_published_formula(gamma: float):
    logits, targets = random_problem()
    p = torch.sigmoid(logits)
    negative = -0.6 * p**gamma * (1 - p).log()
    expected = torch.where(targets > 0, targets * bce(logits, targets), negative)
    loss = varifocal_loss(logits, targets, alpha=0.6, gamma=gamma)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_varifocal_with_gamma_zero_weighs_only():
    logits, targets = random_problem()
    expected = torch.where(targets > 0, targets, 0.75) * F.binary_cross_entropy_with_logits(
        logits, targets, reduction="none"
    )
    torch.testing.assert_close(varifocal_loss(logits, targets, gamma=0.0), expected)


# GHM-C


def test_ghm_by_counting():
    logits, targets = random_problem()
    valid = torch.arange(len(logits)) % 5 > 0
    gradient = (torch.sigmoid(logits) - targets).abs()
    expected = torch.zeros_like(logits)
    for i in range(len(logits)):
        if valid[i]:
            bin_of_i = min(int(gradient[i] * 30), 29)
            count = sum(min(int(g * 30), 29) == bin_of_i for g, v in zip(gradient, valid, strict=True) if v)
            expected[i] = bce(logits[i], targets[i]) / (count * 30)
    torch.testing.assert_close(ghm_loss(logits, targets, valid), expected, rtol=1e-9, atol=1e-15)


def test_ghm_of_evenly_spread_gradients_is_the_mean_cross_entropy():
    """Which is what harmony means: where every bin holds as many, nothing is weighted up or down."""
    gradient = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    logits, targets, valid = gradient.logit(), torch.zeros_like(gradient), torch.ones_like(gradient).bool()
    torch.testing.assert_close(ghm_loss(logits, targets, valid).sum(), bce(logits, targets).mean())


def test_ghm_with_one_bin_is_the_mean_cross_entropy():
    logits, targets = random_problem()
    valid = torch.ones_like(logits, dtype=torch.bool)
    loss = ghm_loss(logits, targets, valid, num_bins=1).sum()
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, targets))


def test_ghm_of_copies_counts_each_bin_once():
    logits, targets = random_problem()
    valid = torch.ones_like(logits, dtype=torch.bool)
    once = ghm_loss(logits, targets, valid).sum()
    seven_times = ghm_loss(logits.repeat(7), targets.repeat(7), valid.repeat(7)).sum()
    torch.testing.assert_close(seven_times, once)


def test_ghm_without_anything_valid_is_zero():
    logits, targets = random_problem()
    logits.requires_grad_()
    loss = ghm_loss(logits, targets, torch.zeros_like(targets, dtype=torch.bool)).sum()
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().sum() == 0


# Distribution focal


def test_distribution_focal_is_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, 9, generator=generator, dtype=torch.float64) * 3
    distances = torch.rand(4, 50, generator=generator, dtype=torch.float64) * 8
    softmax = logits.softmax(dim=-1)
    left = distances.long()
    s_left, s_right = (softmax.gather(-1, i[..., None])[..., 0] for i in (left, left + 1))
    expected = -((left + 1 - distances) * s_left.log() + (distances - left) * s_right.log())
    torch.testing.assert_close(distribution_focal_loss(logits, distances), expected)


@pytest.mark.parametrize("distance", [-3.0, 0.0, 3.0, 7.0, 9.5])
def test_a_whole_distance_is_the_cross_entropy_of_its_bin_and_the_ends_are_clamped(distance: float):
    logits = torch.linspace(-2, 5, 8, dtype=torch.float64).sin() * 3
    loss = distribution_focal_loss(logits, torch.tensor(distance, dtype=torch.float64))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(int(min(max(distance, 0), 7)))))


def test_the_mean_of_the_best_distribution_is_the_distance():
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distribution_focal_loss(logits, torch.tensor(2.3, dtype=torch.float64))
        loss.backward()
        return loss

    optimizer.step(closure)
    mean = (logits.softmax(dim=0) * torch.arange(6)).sum()
    assert mean.item() == pytest.approx(2.3, abs=1e-3)


# All of them


def every_loss(gamma: float) -> dict:
    return {
        "quality": lambda x, y: quality_focal_loss(x, y, gamma=gamma),
        "varifocal": lambda x, y: varifocal_loss(x, y, gamma=gamma),
        "ghm": lambda x, y: ghm_loss(x, y, torch.ones_like(x, dtype=torch.bool)),
        "distribution": lambda x, y: distribution_focal_loss(torch.stack((x, -x, x / 2), dim=-1), y * 2),
    }


@pytest.mark.parametrize("name", every_loss(0.0))
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck(name: str, gamma: float):
    logits, targets = random_problem(21)
    loss = every_loss(gamma)[name]
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.requires_grad_())


@pytest.mark.parametrize("name", every_loss(0.0))
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 2.0])
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_finite_far_out(name: str, gamma: float, target: float):
    logits = EXTREMES.clone().requires_grad_()
    loss = every_loss(gamma)[name](logits, torch.full_like(EXTREMES, target))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", every_loss(0.0))
def test_bfloat16_is_computed_in_float32(name: str):
    logits, targets = (tensor.bfloat16() for tensor in random_problem())
    loss = every_loss(2.0)[name]
    assert torch.equal(loss(logits, targets), loss(logits.float(), targets.float()))
    assert loss(logits, targets).dtype == torch.float32


@pytest.mark.parametrize("gamma", [-1.0, float("inf"), float("nan")])
def test_gamma_out_of_range_is_refused(gamma: float):
    logits, targets = random_problem()
    for loss in (quality_focal_loss, varifocal_loss):
        with pytest.raises(ValueError, match="gamma must be"):
            loss(logits, targets, gamma=gamma)


def test_other_settings_out_of_range_are_refused():
    logits, targets = random_problem()
    with pytest.raises(ValueError, match="alpha must be"):
        varifocal_loss(logits, targets, alpha=-0.1)
    with pytest.raises(ValueError, match="num_bins must be"):
        ghm_loss(logits, targets, targets > 2, num_bins=0)
    with pytest.raises(ValueError, match="at least 2 bins"):
        distribution_focal_loss(logits[:, None], targets)


def test_shapes_are_never_stretched():
    logits, targets = random_problem(6)
    for loss in (quality_focal_loss, varifocal_loss):
        with pytest.raises(ValueError, match=r"shape of the logits \[6, 1\], got \[6\]"):
            loss(logits[:, None], targets)
    with pytest.raises(ValueError, match="one distance per distribution"):
        distribution_focal_loss(logits.reshape(2, 3), targets)
