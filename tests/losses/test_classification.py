"""Each loss against its plain formula on the whole matrix of logits and targets."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, nms, sigmoid_focal_loss

from retina.losses.classification import GHM, OHEM, ClassLoss, Focal, QualityFocal, Varifocal
from retina.losses.soft_targets import ghm_loss, quality_focal_loss, varifocal_loss
from retina.losses.summed_ghm import summed_ghm_loss
from retina.ops.anchors import AnchorGenerator
from retina.types import Assignment, Predictions

K = 5
ANCHORS = AnchorGenerator((32.0, 64.0))(((8, 12), (4, 6)), (8, 16), "cpu")
A = sum(map(len, ANCHORS))
LOSSES = [Focal(), QualityFocal(), Varifocal(), GHM(), OHEM(batch_size=16), OHEM(batch_size=16, one_to_three=True)]


def predict(num_images: int = 2, *, scale: float = 2.0, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = tuple(scale * torch.randn(num_images, len(a), K, generator=generator) - 2 for a in ANCHORS)
    for level in logits:
        level.requires_grad_()
    return Predictions(logits, tuple(torch.zeros(num_images, len(a), 4) for a in ANCHORS), ANCHORS)


def assign(num_images: int = 2, *, positives: float = 0.05, seed: int = 0) -> tuple[Tensor, Assignment]:
    """Labels and what every anchor is; a fifth is ignored. Labels mean nothing where an anchor is not positive."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(num_images, A, generator=generator)
    positive, negative = kind < positives, kind > 0.2 + positives
    labels = torch.randint(0, K, (num_images, A), generator=generator)
    quality = torch.where(positive, torch.rand(num_images, A, generator=generator), 0)
    labels = torch.where(positive, labels, -1)
    return labels, Assignment(torch.zeros_like(labels), positive, negative, quality)


def whole(predictions: Predictions, labels: Tensor, assigned: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """All logits, multi-hot targets, and which anchors count."""
    targets = F.one_hot(labels.clamp(min=0), K) * assigned.positive[..., None]
    return torch.cat(predictions.logits, dim=1), targets.float(), assigned.positive | assigned.negative


def assert_same(ours: Tensor, expected: Tensor, predictions: Predictions) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(loss, predictions.logits) for loss in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_focal_with_an_alpha_for_each_class():
    predictions, (labels, assigned) = predict(), assign()
    logits, targets, counts = whole(predictions, labels, assigned)
    alpha = [0.1, 0.25, 0.5, 0.75, 0.9]
    columns = [sigmoid_focal_loss(logits[..., k], targets[..., k], alpha=alpha[k])[counts].sum() for k in range(K)]
    assert_same(Focal(alpha=alpha)(predictions, labels, assigned), sum(columns), predictions)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.75, 0.0), (None, 0.0)])
def test_focal_and_the_cross_entropies_at_its_end(alpha: float | None, gamma: float):
    predictions, (labels, assigned) = predict(), assign()
    logits, targets, counts = whole(predictions, labels, assigned)
    expected = sigmoid_focal_loss(logits, targets, alpha=-1 if alpha is None else alpha, gamma=gamma)
    assert_same(Focal(alpha=alpha, gamma=gamma)(predictions, labels, assigned), expected[counts].sum(), predictions)


@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
def test_quality_focal_is_the_plain_formula_on_soft_targets(gamma: float):
    predictions, (labels, assigned) = predict(), assign()
    logits, targets, counts = whole(predictions, labels, assigned)
    expected = quality_focal_loss(logits, targets * assigned.target_scores[..., None], gamma=gamma)[counts].sum()
    assert_same(QualityFocal(gamma=gamma)(predictions, labels, assigned), expected, predictions)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.75, 2.0), (0.25, 1.0)])
def test_varifocal_is_the_plain_formula_on_soft_targets(alpha: float, gamma: float):
    predictions, (labels, assigned) = predict(), assign()
    logits, targets, counts = whole(predictions, labels, assigned)
    soft = targets * assigned.target_scores[..., None]
    expected = varifocal_loss(logits, soft, alpha=alpha, gamma=gamma)[counts].sum()
    assert_same(Varifocal(alpha=alpha, gamma=gamma)(predictions, labels, assigned), expected, predictions)


def test_ghm_is_the_published_mean_times_the_positives():
    predictions, (labels, assigned) = predict(), assign()
    logits, targets, counts = whole(predictions, labels, assigned)
    expected = ghm_loss(logits, targets, counts[..., None].expand_as(logits), num_bins=10).sum()
    assert_same(GHM(num_bins=10)(predictions, labels, assigned), expected * assigned.positive.sum(), predictions)
    nothing = assigned._replace(positive=torch.zeros_like(assigned.positive))
    assert GHM()(predictions, labels, nothing) > 0  # times 1


def hardest(loss: Tensor, eligible: Tensor, count: int, nms_iou: float) -> Tensor:
    """Anchors of one image by torchvision's NMS."""
    index = eligible.nonzero().squeeze(1)
    return index[nms(torch.cat(list(ANCHORS))[index], loss[index], nms_iou)[:count]]


@pytest.mark.parametrize(("batch_size", "nms_iou"), [(16, 0.5), (64, 0.7), (4, 0.3), (12, 0.05)])
def test_ohem_takes_the_hardest_after_nms(batch_size: int, nms_iou: float):
    predictions, (labels, assigned) = predict(), assign()
    logits, targets, counts = whole(predictions, labels, assigned)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1)
    taken = [hardest(loss[b].detach(), counts[b], batch_size, nms_iou) for b in range(2)]
    assert all(len(index) == batch_size or nms_iou < 0.1 for index in taken)
    assert box_iou(*[torch.cat(list(ANCHORS))[taken[0]]] * 2).fill_diagonal_(0).max() <= nms_iou
    expected = torch.stack([loss[b, index].sum() for b, index in enumerate(taken)]).sum()
    assert_same(OHEM(batch_size=batch_size, nms_iou=nms_iou)(predictions, labels, assigned), expected, predictions)


@pytest.mark.parametrize("positives", [0.003, 0.3])
def test_ohem_with_three_negatives_to_a_positive(positives: float):
    """With fewer positives than a quarter, and with more."""
    predictions, (labels, assigned) = predict(), assign(positives=positives)
    logits, targets, _ = whole(predictions, labels, assigned)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1)
    expected = torch.zeros(())
    for b in range(2):
        first = hardest(loss[b].detach(), assigned.positive[b], 8, 0.5)
        assert len(first) == 8 or positives < 0.1
        second = hardest(loss[b].detach(), assigned.negative[b], 3 * len(first), 0.5)
        expected = expected + loss[b, first].sum() + loss[b, second].sum()
    loss = OHEM(batch_size=32, one_to_three=True)(predictions, labels, assigned)
    assert_same(loss, expected, predictions)


@pytest.mark.parametrize("one_to_three", [False, True])
def test_ohem_where_there_is_too_little(one_to_three: bool):
    """One positive and two negatives in one image, 40 negatives and no positive in the other; 60 are wanted."""
    predictions, labels = predict(), torch.full((2, A), 3)
    positive, negative = torch.zeros(2, A, dtype=torch.bool), torch.zeros(2, A, dtype=torch.bool)
    positive[0, 5], negative[0, 300:302] = True, True
    negative[1, :40] = True
    assigned = Assignment(torch.zeros_like(labels), positive, negative)
    loss = OHEM(one_to_three=one_to_three, nms_iou=1.0, batch_size=60)(predictions, labels, assigned)
    grads = torch.cat(torch.autograd.grad(loss, predictions.logits), dim=1).abs().sum(dim=-1) > 0
    assert torch.equal(grads[0], positive[0] | negative[0])
    assert grads[1].sum() == (3 if one_to_three else 40)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_ignored_anchors_and_labels_elsewhere_change_nothing(loss: ClassLoss):
    predictions, (labels, assigned) = predict(), assign()
    expected = loss(predictions, labels, assigned)
    ignored = ~(assigned.positive | assigned.negative)
    counts = [len(level) for level in ANCHORS]
    logits = tuple(
        torch.where(part[..., None], 50.0, level.detach()).requires_grad_()
        for level, part in zip(predictions.logits, ignored.split(counts, dim=1), strict=True)
    )
    other = loss(predictions._replace(logits=logits), torch.where(assigned.positive, labels, 2), assigned)
    torch.testing.assert_close(other, expected, rtol=1e-6, atol=0)
    grads = torch.cat(torch.autograd.grad(other, logits), dim=1)
    assert (grads[ignored] == 0).all()
    assert grads.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("size", [0.0, 100.0, -100.0])
def test_saturated_logits_and_no_positives_are_finite(loss: ClassLoss, size: float):
    predictions, (labels, assigned) = predict(), assign()
    logits = tuple((level.detach() * 0 + size).requires_grad_() for level in predictions.logits)
    nothing = assigned._replace(positive=torch.zeros_like(assigned.positive), target_scores=torch.zeros(2, A))
    for what in (assigned, nothing):
        value = loss(predictions._replace(logits=logits), labels, what)
        assert value.isfinite()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, logits))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_bfloat16_logits_are_computed_in_float32(loss: ClassLoss):
    predictions, (labels, assigned) = predict(), assign()
    narrow = tuple(level.detach().bfloat16() for level in predictions.logits)
    wide = tuple(level.float() for level in narrow)
    one, other = (loss(predictions._replace(logits=logits), labels, assigned) for logits in (narrow, wide))
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [QualityFocal(), Varifocal()], ids=str)
def test_without_target_scores_there_is_nothing_to_learn(loss: ClassLoss):
    predictions, (labels, assigned) = predict(), assign()
    with pytest.raises(ValueError, match="target scores"):
        loss(predictions, labels, assigned._replace(target_scores=None))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Focal, {"alpha": 1.5}, "alpha"),
        (Focal, {"alpha": [0.5, 1.5]}, "alpha"),
        (Focal, {"alpha": []}, "alpha"),
        (Focal, {"gamma": -1.0}, "gamma"),
        (QualityFocal, {"gamma": -1.0}, "gamma"),
        (Varifocal, {"alpha": -0.1}, "alpha"),
        (Varifocal, {"gamma": float("nan")}, "gamma"),
        (GHM, {"num_bins": 0}, "num_bins"),
        (OHEM, {"batch_size": 3}, "batch_size"),
        (OHEM, {"nms_iou": 1.1}, "nms_iou"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ghm_in_parts_is_ghm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over levels and its gradient, of which a part is computed at a time, without a copy of all logits."""
    monkeypatch.setattr("retina.losses.summed_ghm._LOGITS", 40)
    generator = torch.Generator().manual_seed(0)
    levels = [4 * torch.randn(2, anchors, 3, generator=generator, dtype=dtype) for anchors in (17, 5, 1)]
    levels = [level.requires_grad_() for level in levels]
    role = torch.randint(0, 3, (2, 23), generator=generator)
    labels = torch.randint(0, 3, (2, 23), generator=generator)
    assigned = Assignment(labels, role == 0, role == 1)
    loss = summed_ghm_loss(levels, labels, assigned, num_bins=10)
    grads = torch.autograd.grad(3 * loss, levels)
    targets = (role == 0)[..., None] & (labels[..., None] == torch.arange(3))
    valid = (role < 2)[..., None].expand_as(targets)
    expected = ghm_loss(torch.cat(levels, dim=1), targets.to(dtype), valid, num_bins=10).sum()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(grads, torch.autograd.grad(3 * expected, levels), strict=True):
        torch.testing.assert_close(one, other)
