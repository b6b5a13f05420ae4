import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retina.losses.dice import sigmoid_dice_loss, softmax_dice_loss

EXTREMES = torch.tensor([-1e4, -100, -20, 0, 20, 100, 1e4])


def random_masks(*shape: int, num_classes: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    return logits, torch.randint(0, num_classes, shape, generator=generator)


def random_classes(*shape: int) -> tuple[Tensor, Tensor]:
    logits, _ = random_masks(*shape)
    classes = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    return logits, classes


def dice(p: Tensor, t: Tensor, smooth: float) -> float:
    """Pixel by pixel."""
    both = sum(a * b for a, b in zip(p.flatten().tolist(), t.flatten().tolist(), strict=True))
    return (2 * both + smooth) / (p.sum().item() + t.sum().item() + smooth)


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("smooth", [1e-3, 1.0])
@pytest.mark.parametrize("shape", [(3, 20), (3, 5, 4), (3, 1, 5, 4), (2, 3, 3, 4)])
def test_binary_is_the_published_formula(shape: tuple[int, ...], smooth: float, beta: float):
    logits, masks = random_masks(*shape)
    expected = [1 - dice(p.sigmoid(), t, smooth) ** (1 / beta) for p, t in zip(logits, masks, strict=True)]
    for targets in (masks, masks.bool(), masks.float()):
        losses = sigmoid_dice_loss(logits, targets, beta=beta, smooth=smooth, reduction="none")
        assert losses.tolist() == pytest.approx(expected, rel=1e-9)
    assert sigmoid_dice_loss(logits, masks, beta=beta, smooth=smooth).item() == pytest.approx(
        sum(expected) / len(expected)
    )


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 3, 20), (2, 3, 5, 4), (1, 4, 2, 3, 3)])
def test_multi_class_is_the_formula_of_every_class(shape: tuple[int, ...], beta: float):
    logits, classes = random_classes(*shape)
    p = logits.softmax(1)
    expected = [
        [1 - dice(p[n, c], classes[n] == c, 1.0) ** (1 / beta) for c in range(shape[1])] for n in range(shape[0])
    ]
    hot = F.one_hot(classes, shape[1]).movedim(-1, 1)
    for targets in (classes, classes[:, None], hot, hot.float()):
        losses = softmax_dice_loss(logits, targets, beta=beta, reduction="none")
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


def test_two_classes_have_the_binary_loss_of_both_masks():
    logits, classes = random_classes(2, 2, 5, 4)
    difference = logits[:, 1] - logits[:, 0]
    losses = softmax_dice_loss(logits, classes, reduction="none")
    torch.testing.assert_close(losses[:, 1], sigmoid_dice_loss(difference, classes, reduction="none"))
    torch.testing.assert_close(losses[:, 0], sigmoid_dice_loss(-difference, 1 - classes, reduction="none"))


def test_perfect_masks_cost_nothing_and_empty_masks_are_finite():
    masks = torch.zeros(3, 4, 4)
    masks[0, :2] = 1
    losses = sigmoid_dice_loss((masks - 0.5) * 200, masks, reduction="none")
    assert losses.tolist() == [0, 0, 0]
    everything = sigmoid_dice_loss(torch.full((3, 4, 4), 100.0), masks, reduction="none")
    assert everything.tolist() == pytest.approx([1 - 17 / 25, 1 - 1 / 17, 1 - 1 / 17])


def test_focal_dice_tells_found_masks_from_missed_ones_more_than_dice():
    """The gradient of D^(1/beta) by D is D^(1/beta - 1) / beta: beta 2 halves it at D = 1 and raises it below 1/4."""
    masks = torch.ones(2, 10_000)
    logits = torch.tensor([0.99, 0.01]).logit()[:, None].expand(-1, 10_000).clone().requires_grad_()
    slopes = []
    for beta in (1.0, 2.0):
        (grad,) = torch.autograd.grad(sigmoid_dice_loss(logits, masks, beta=beta, reduction="sum"), logits)
        slopes.append(grad[:, 0])
    found, missed = slopes[1] / slopes[0]
    assert found.item() == pytest.approx(0.5, abs=0.01)
    assert missed.item() == pytest.approx(0.5 / math.sqrt(2 * 0.01 / 1.01), rel=0.01)


def test_ignored_pixels_count_for_nothing():
    logits, masks = random_masks(1, 6, 6)
    ignored = torch.arange(36).reshape(1, 6, 6) % 3 == 0
    loss = sigmoid_dice_loss(logits, masks.masked_fill(ignored, 255), ignore_index=255)
    torch.testing.assert_close(loss, sigmoid_dice_loss(logits[~ignored][None], masks[~ignored][None]))
    logits, classes = random_classes(1, 3, 6, 6)
    expected = softmax_dice_loss(logits.movedim(1, -1)[~ignored].T[None], classes[~ignored][None])
    hot = F.one_hot(classes, 3).movedim(-1, 1)
    partly = hot.clone()
    partly[:, 0][ignored] = 255  # one ignored label of a pixel is enough
    for targets in (classes.masked_fill(ignored, 255), hot.masked_fill(ignored[:, None], 255), partly):
        torch.testing.assert_close(softmax_dice_loss(logits, targets, ignore_index=255), expected)


@pytest.mark.parametrize("beta", [1.0, 1.5, 50.0])
def test_finite_far_out_and_gradcheck(beta: float):
    logits = torch.cartesian_prod(EXTREMES, EXTREMES).T.requires_grad_()
    for target in (0.0, 1.0):
        loss = sigmoid_dice_loss(logits, torch.full_like(logits, target), beta=beta)
        loss = loss + softmax_dice_loss(logits[None], torch.full((1, 49), int(target)), beta=beta)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert grad.isfinite().all()
    masks = random_masks(2, 6)
    assert torch.autograd.gradcheck(lambda x: sigmoid_dice_loss(x, masks[1], beta=beta), masks[0].requires_grad_())
    logits, classes = random_classes(2, 3, 4)
    assert torch.autograd.gradcheck(lambda x: softmax_dice_loss(x, classes, beta=beta), logits.requires_grad_())


def test_bfloat16_is_computed_in_float32():
    logits, masks = random_masks(2, 300)
    loss = sigmoid_dice_loss(logits.bfloat16(), masks)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sigmoid_dice_loss(logits.bfloat16().float(), masks))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"beta": 0.5}, "beta must be"), ({"smooth": 0.0}, "smooth must be"), ({"reduction": "all"}, "reduction must be")],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sigmoid_dice_loss(torch.zeros(2, 3), torch.zeros(2, 3), **settings)
    with pytest.raises(ValueError, match=message):
        softmax_dice_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64), **settings)


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"of one shape, got \[2, 3\] and \[2, 1, 3\]"):
        sigmoid_dice_loss(torch.zeros(2, 3), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=r"must be \(N, C, d1, \.\.\.\)"):
        softmax_dice_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 3"):
        softmax_dice_loss(torch.zeros(2, 3, 4), torch.full((2, 4), 3))
    with pytest.raises(ValueError, match="got 2"):
        sigmoid_dice_loss(torch.zeros(2, 3), torch.full((2, 3), 2.0))
