import copy
import doctest
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retina.losses.balance import OHEMLoss, class_balanced_weights
from retina.losses.common import FromSigmoid, FromSoftmax
from retina.losses.dice import FocalPlusDiceLoss, SigmoidDiceLoss, SoftmaxDiceLoss
from retina.losses.focal import SigmoidFocalLoss, SoftmaxFocalLoss
from retina.losses.soft_targets import (
    DistributionFocalLoss,
    GHMLoss,
    QualityFocalLoss,
    VarifocalLoss,
    distribution_focal_loss,
    ghm_loss,
    quality_focal_loss,
    varifocal_loss,
)

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 3, 5, generator=GENERATOR) * 3
CLASSES = torch.randint(0, 3, (6, 5), generator=GENERATOR)
HOT = F.one_hot(CLASSES, 3).movedim(-1, 1).float()
MASKS = (LOGITS[:, 0].cos() > 0).float()
WEIGHT = [0.2, 1.0, 3.0]

# one of each, with what it is called with
EVERY = [
    (SigmoidFocalLoss(), LOGITS, CLASSES),
    (SigmoidFocalLoss(alpha=[0.1, 0.5, 0.9]), LOGITS, HOT),
    (SoftmaxFocalLoss(weight=WEIGHT), LOGITS, CLASSES),
    (SigmoidDiceLoss(beta=2.0), LOGITS[:, 0], MASKS),
    (SoftmaxDiceLoss(beta=2.0), LOGITS, CLASSES),
    (FocalPlusDiceLoss(SoftmaxFocalLoss(weight=WEIGHT), SoftmaxDiceLoss()), LOGITS, CLASSES),
    (FromSigmoid(SigmoidFocalLoss()), LOGITS.sigmoid(), HOT),
    (FromSoftmax(SoftmaxFocalLoss()), LOGITS.softmax(1), CLASSES),
    (OHEMLoss(SoftmaxFocalLoss(reduction="none"), fraction=0.3), LOGITS, CLASSES),
    (OHEMLoss(SigmoidFocalLoss(reduction="none"), negatives_per_positive=3.0), LOGITS, HOT),
    (QualityFocalLoss(), LOGITS, HOT * 0.7),
    (VarifocalLoss(), LOGITS, HOT * 0.7),
    (GHMLoss(), LOGITS, HOT),
    (DistributionFocalLoss(), LOGITS, HOT[..., 0] * 3.3),
]


def name_of(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, nn.Module) else ""


@pytest.mark.parametrize(("module", "logits", "targets"), EVERY, ids=name_of)
def test_no_state_a_number_and_a_gradient(module: nn.Module, logits: Tensor, targets: Tensor):
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    logits = logits.clone().requires_grad_()
    loss = module(logits, targets)
    assert loss.shape == ()
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss > 0
    assert grad.abs().sum() > 0
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin(logits, targets) == loss


@pytest.mark.parametrize(("module", "logits", "targets"), EVERY, ids=name_of)
def test_follows_the_device_of_the_logits(module: nn.Module, logits: Tensor, targets: Tensor):
    """The meta device stands for any other: nothing made on a CPU may meet its tensors, nothing may be read."""
    assert module(logits.to("meta"), targets.to("meta")).device.type == "meta"


def test_settings_can_be_read():
    module = SoftmaxFocalLoss(weight=[0.5, 2.0], gamma=1.5)
    assert repr(module) == "SoftmaxFocalLoss(weight=[0.5, 2.0], gamma=1.5, ignore_index=-100, reduction=mean)"
    assert module.gamma == 1.5


def test_in_the_place_of_bce_with_logits():
    for reduction in ("none", "sum", "mean"):
        expected = nn.BCEWithLogitsLoss(reduction=reduction)(LOGITS, HOT)
        loss = SigmoidFocalLoss(alpha=None, gamma=0.0, reduction=reduction)(LOGITS, HOT)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_in_the_place_of_cross_entropy():
    targets = CLASSES.masked_fill(CLASSES == 1, 255)
    for reduction in ("none", "sum", "mean"):
        settings = {"ignore_index": 255, "reduction": reduction}
        expected = nn.CrossEntropyLoss(torch.tensor(WEIGHT), **settings)(LOGITS, targets)
        torch.testing.assert_close(SoftmaxFocalLoss(WEIGHT, gamma=0.0, **settings)(LOGITS, targets), expected)
    log_p = LOGITS.log_softmax(1)
    torch.testing.assert_close(SoftmaxFocalLoss(gamma=0.0)(log_p, CLASSES), nn.NLLLoss()(log_p, CLASSES))


def test_balanced_cross_entropies():
    expected = F.binary_cross_entropy_with_logits(LOGITS, HOT, torch.where(HOT > 0, 0.25, 0.75))
    torch.testing.assert_close(SigmoidFocalLoss(gamma=0.0)(LOGITS, HOT), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(SigmoidFocalLoss([0.25] * 3, gamma=0.0)(LOGITS, HOT), expected, rtol=1e-6, atol=1e-6)
    weight = class_balanced_weights(CLASSES.flatten().bincount())
    expected = F.cross_entropy(LOGITS, CLASSES, weight)
    torch.testing.assert_close(SoftmaxFocalLoss(weight, gamma=0.0)(LOGITS, CLASSES), expected)


def test_probabilities_instead_of_logits():
    for module in (SigmoidFocalLoss(), QualityFocalLoss(), GHMLoss()):
        torch.testing.assert_close(FromSigmoid(module)(LOGITS.double().sigmoid(), HOT), module(LOGITS.double(), HOT))
    for module in (SoftmaxFocalLoss(WEIGHT), SoftmaxDiceLoss()):
        expected = module(LOGITS.double(), CLASSES)
        torch.testing.assert_close(FromSoftmax(module)(LOGITS.double().softmax(1), CLASSES), expected)


def test_focal_plus_dice_is_their_sum():
    focal, dice = SoftmaxFocalLoss(), SoftmaxDiceLoss()
    expected = focal(LOGITS, CLASSES) + 0.5 * dice(LOGITS, CLASSES)
    assert FocalPlusDiceLoss(focal, dice, dice_weight=0.5)(LOGITS, CLASSES) == expected


def test_ohem_is_the_mean_of_the_hardest():
    losses = F.cross_entropy(LOGITS, CLASSES, reduction="none")
    loss = OHEMLoss(nn.CrossEntropyLoss(reduction="none"), fraction=0.1)(LOGITS, CLASSES)
    torch.testing.assert_close(loss, losses.flatten().topk(3).values.mean())
    everything = OHEMLoss(nn.CrossEntropyLoss(reduction="none"), fraction=1.0)(LOGITS, CLASSES)
    torch.testing.assert_close(everything, losses.mean())


def test_ohem_with_three_negatives_for_a_positive():
    targets = torch.zeros_like(LOGITS)
    targets[0, 0, :2] = 1
    losses = F.binary_cross_entropy_with_logits(LOGITS, targets, reduction="none")
    loss = OHEMLoss(SigmoidFocalLoss(alpha=None, gamma=0.0, reduction="none"), negatives_per_positive=3.0)
    expected = (losses[targets > 0].sum() + losses[targets == 0].topk(6).values.sum()) / 8
    torch.testing.assert_close(loss(LOGITS, targets), expected)
    indices = OHEMLoss(SoftmaxFocalLoss(gamma=0.0, reduction="none"), negatives_per_positive=3.0)
    background = torch.zeros_like(CLASSES)
    assert indices(LOGITS, background) == 0
    background[0, 0] = 2
    losses = F.cross_entropy(LOGITS, background, reduction="none")
    hardest = losses[background == 0].topk(3).values.sum()
    torch.testing.assert_close(indices(LOGITS, background[:, None]), (losses[0, 0] + hardest) / 4)


def test_ignored_elements_are_no_positives_of_ohem():
    """Whatever the index is that says so: with 255 it is above 0."""
    targets = torch.full_like(CLASSES, 255)
    targets[:, :3] = 0
    targets[0, 0] = 2
    loss = OHEMLoss(SoftmaxFocalLoss(gamma=0.0, reduction="none", ignore_index=255), negatives_per_positive=3.0)
    losses = F.cross_entropy(LOGITS, targets, reduction="none", ignore_index=255)
    expected = (losses[0, 0] + losses[targets == 0].topk(3).values.sum()) / 4
    torch.testing.assert_close(loss(LOGITS, targets), expected)


SMOOTH = [case for case in EVERY if not isinstance(case[0], GHMLoss)]  # whose densities carry no gradient, as published


@pytest.mark.parametrize(("module", "logits", "targets"), SMOOTH, ids=name_of)
def test_gradients_are_those_of_the_values(module: nn.Module, logits: Tensor, targets: Tensor):
    targets = targets[:2].double() if targets.is_floating_point() else targets[:2]
    assert torch.autograd.gradcheck(lambda x: module(x, targets), logits[:2].double().requires_grad_())


@pytest.mark.parametrize(("module", "logits", "targets"), EVERY, ids=name_of)
def test_gradients_per_sample_by_vmap_are_those_of_a_loop(module: nn.Module, logits: Tensor, targets: Tensor):
    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(lambda x: module(x[None], y[None]))(x)

    x = logits[:1].clone().requires_grad_()
    (first,) = torch.autograd.grad(module(x, targets[:1]), x)
    gradients = torch.func.vmap(gradient)(logits, targets)
    torch.testing.assert_close(gradients[:1], first)
    looped = torch.stack([gradient(x, y) for x, y in zip(logits, targets, strict=True)])
    torch.testing.assert_close(gradients, looped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_targets_beside_narrow_logits_keep_their_digits(dtype: torch.dtype):
    """A target of 0.901 is 0.9023 in bfloat16, 14 times the loss where p is 0.9."""
    logits, targets = torch.tensor([2.197]).to(dtype), torch.tensor([0.901])
    for module in (QualityFocalLoss(), VarifocalLoss(), GHMLoss(), SigmoidFocalLoss(), SigmoidFocalLoss([0.3])):
        assert torch.equal(module(logits, targets), module(logits.float(), targets))


def test_numbers_per_class_keep_the_digits_of_float64_logits():
    logits, weight = LOGITS.double(), torch.tensor([0.1, 0.7, 0.3], dtype=torch.float64)
    for settings in (weight, weight.tolist()):
        cross_entropy = SoftmaxFocalLoss(settings, gamma=0.0)(logits, CLASSES)
        torch.testing.assert_close(cross_entropy, F.cross_entropy(logits, CLASSES, weight), rtol=1e-14, atol=0)
        alphas = weight[:, None].expand(3, 5)
        expected = F.binary_cross_entropy_with_logits(logits, HOT.double(), torch.where(HOT > 0, alphas, 1 - alphas))
        torch.testing.assert_close(SigmoidFocalLoss(settings, gamma=0.0)(logits, HOT), expected, rtol=1e-14, atol=0)


def test_successors_are_reduced():
    targets = HOT * 0.7
    for module, function in ((QualityFocalLoss, quality_focal_loss), (VarifocalLoss, varifocal_loss)):
        for reduction, expected in (("none", lambda x: x), ("sum", Tensor.sum), ("mean", Tensor.mean)):
            loss = module(gamma=1.5, reduction=reduction)(LOGITS, targets)
            torch.testing.assert_close(loss, expected(function(LOGITS, targets, gamma=1.5)))
    every = torch.ones_like(HOT, dtype=torch.bool)
    torch.testing.assert_close(GHMLoss(num_bins=7)(LOGITS, HOT), ghm_loss(LOGITS, HOT, every, num_bins=7).sum())
    distances = HOT[..., 0] * 3.3
    torch.testing.assert_close(
        DistributionFocalLoss()(LOGITS, distances), distribution_focal_loss(LOGITS, distances).mean()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SigmoidFocalLoss(gamma=-1.0), "gamma must be"),
        (lambda: SigmoidFocalLoss(alpha=1.1), "alpha must be in"),
        (lambda: SigmoidFocalLoss(alpha=[0.5, 1.1]), "alpha must be in"),
        (lambda: SigmoidFocalLoss(reduction="max"), "reduction must be"),
        (lambda: SoftmaxFocalLoss(gamma=-1.0), "gamma must be"),
        (lambda: SoftmaxFocalLoss([1.0, -1.0]), "weight must be"),
        (lambda: SoftmaxFocalLoss(reduction="max"), "reduction must be"),
        (lambda: SigmoidDiceLoss(beta=0.9), "beta must be"),
        (lambda: SoftmaxDiceLoss(smooth=0.0), "smooth must be"),
        (lambda: SigmoidDiceLoss(reduction="max"), "reduction must be"),
        (lambda: SoftmaxDiceLoss(reduction="max"), "reduction must be"),
        (lambda: FocalPlusDiceLoss(SoftmaxFocalLoss(), SoftmaxDiceLoss(), dice_weight=-1.0), "dice_weight must be"),
        (lambda: OHEMLoss(SoftmaxFocalLoss()), "either"),
        (lambda: OHEMLoss(SoftmaxFocalLoss(), fraction=0.1, negatives_per_positive=3.0), "either"),
        (lambda: OHEMLoss(SoftmaxFocalLoss(), fraction=0.0), "fraction must be"),
        (lambda: OHEMLoss(SoftmaxFocalLoss(), negatives_per_positive=-1.0), "ratio must be"),
        (lambda: QualityFocalLoss(gamma=-1.0), "gamma must be"),
        (lambda: VarifocalLoss(alpha=-1.0), "alpha must be"),
        (lambda: VarifocalLoss(reduction="max"), "reduction must be"),
        (lambda: GHMLoss(num_bins=0), "num_bins must be"),
        (lambda: DistributionFocalLoss(reduction="max"), "reduction must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(make, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "logits", "targets", "message"),
    [
        (SigmoidFocalLoss(), LOGITS, HOT[:, :2], "shape of the logits"),
        (SigmoidFocalLoss(), LOGITS, CLASSES + 1, "got 3"),
        (SigmoidFocalLoss([0.5, 0.5]), LOGITS, HOT, "one value per class, 3"),
        (SoftmaxFocalLoss(), LOGITS, CLASSES - 1, "got -1"),
        (SoftmaxFocalLoss([0.5, 0.5]), LOGITS, CLASSES, "one value per class, 3"),
        (SigmoidDiceLoss(), LOGITS, HOT * 2, "got 2"),
        (SoftmaxDiceLoss(), LOGITS, CLASSES + 1, "got 3"),
        (FromSigmoid(SigmoidFocalLoss()), LOGITS, HOT, "probabilities must be in"),
        (FromSoftmax(SoftmaxFocalLoss()), LOGITS, CLASSES, "probabilities must be in"),
        (OHEMLoss(SoftmaxFocalLoss(), fraction=0.5), LOGITS, CLASSES, "reduction='none'"),
        (
            OHEMLoss(SigmoidFocalLoss(reduction="none"), negatives_per_positive=3.0),
            *(LOGITS, CLASSES, "targets must be one per"),
        ),
        (
            FocalPlusDiceLoss(SoftmaxFocalLoss(reduction="none"), SoftmaxDiceLoss(reduction="none")),
            *(LOGITS, CLASSES, "reduce both"),
        ),
        (QualityFocalLoss(), LOGITS, HOT[:, :1], "shape of the logits"),
        (QualityFocalLoss(), LOGITS, HOT * 2, "got 2"),
        (VarifocalLoss(), LOGITS, HOT - 1, "got -1"),
        (GHMLoss(), LOGITS, HOT + 1, "got 2"),
        (DistributionFocalLoss(), LOGITS, HOT[:, 0, :2], "one distance per distribution"),
        (DistributionFocalLoss(), LOGITS, HOT[..., 0] * torch.nan, "targets must be numbers"),
        (DistributionFocalLoss(), LOGITS[..., :1], HOT[..., 0], "at least 2 bins"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(module: nn.Module, logits: Tensor, targets: Tensor, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        module(logits, targets)
    assert "\n" not in str(caught.value)


COMPILED = """
import torch
from tests.losses.test_modules import EVERY

for module, logits, targets in EVERY:
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    loss, compiled = module(x, targets), torch.compile(module, backend="aot_eager", fullgraph=True)(y, targets)
    torch.testing.assert_close(compiled, loss)
    loss.backward()
    compiled.backward()
    torch.testing.assert_close(y.grad, x.grad)
print("all", len(EVERY))
"""


@pytest.mark.slow
def test_compiles_without_a_break():
    """In a process of its own: the type checks of these tests cannot be compiled."""
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert run.stdout == f"all {len(EVERY)}\n", run.stderr


def test_the_page_about_losses_tells_the_truth():
    page = Path(__file__).parents[2] / "docs" / "losses.md"
    results = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert results.attempted > 30
    assert results.failed == 0
