"""Generalized focal loss V2's quality against its description, written out in float64 with a loop over anchors."""

import math

import pytest
import torch

from faults import refused
from retina.model.guided_quality import GuidedQuality
from retina.model.head import Head, Outputs
from retina.ops.joint_scores import geometric_mean_logits, product_logits

SETTINGS = {"num_classes": 3, "channels": 16, "num_convs": 1, "norm": None, "prior": 0.01}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@torch.no_grad()
def test_it_is_what_the_paper_describes() -> None:
    torch.manual_seed(0)
    guide = GuidedQuality(6).double()
    for parameter in guide.parameters():
        parameter.normal_()
    logits, sides = torch.randn(2, 5, 3).double(), 3 * torch.randn(2, 5, 4 * 6).double()
    found = guide(logits, sides).sigmoid()
    for image in range(2):
        for anchor in range(5):
            statistics: list[float] = []
            for side in range(4):
                weights = [math.exp(x) for x in sides[image, anchor, 6 * side : 6 * side + 6].tolist()]
                highest = sorted((w / sum(weights) for w in weights), reverse=True)[:4]
                statistics += [*highest, sum(highest) / 4]
            hidden = []
            for row, bias in zip(guide.hidden.weight.tolist(), guide.hidden.bias.tolist(), strict=True):
                hidden.append(max(0.0, sum(w * s for w, s in zip(row, statistics, strict=True)) + bias))
            out = sum(w * h for w, h in zip(guide.out.weight[0].tolist(), hidden, strict=True)) + float(guide.out.bias)
            for k in range(3):
                expected = sigmoid(float(logits[image, anchor, k])) * sigmoid(out)
                assert float(found[image, anchor, k]) == pytest.approx(expected, rel=1e-9)


def test_the_head_multiplies_by_it_and_trains_it() -> None:
    torch.manual_seed(0)
    head, features = (
        Head(8, **SETTINGS, num_anchors=2, outputs=Outputs(bins=5, guided=True)),
        (torch.randn(2, 8, 3, 4),),
    )
    (logits,), (sides,), _ = head(features)
    guide, head.guide = head.guide, None
    (plain,), (same,), _ = head(features)
    assert torch.equal(sides, same)
    torch.testing.assert_close(logits, guide(plain, sides))
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.005), rtol=0.2, atol=0)
    logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (*guide.parameters(), *head.box.predict.parameters()))


@pytest.mark.parametrize("bins", [None, 3])
def test_it_needs_distributions_of_four_bins(bins: int | None) -> None:
    with refused("contradiction", "guided_quality"):
        Head(8, **SETTINGS, num_anchors=1, outputs=Outputs(bins=bins, guided=True))


def test_joint_scores_are_exact_and_finite_for_any_logits() -> None:
    x, y = torch.meshgrid(*[torch.linspace(-30, 30, 25, dtype=torch.float64)] * 2, indexing="ij")
    product = x.sigmoid() * y.sigmoid()
    torch.testing.assert_close(product_logits(x, y).sigmoid(), product, rtol=1e-12, atol=0)
    torch.testing.assert_close(geometric_mean_logits(x, y).sigmoid(), product.sqrt(), rtol=1e-12, atol=0)
    for function in (product_logits, geometric_mean_logits):
        extreme = torch.tensor([-1e4, -80.0, 0.0, 80.0, 1e4]).requires_grad_()
        values = function(extreme[:, None], extreme)
        (gradient,) = torch.autograd.grad(values.sum(), extreme)
        assert values.isfinite().all()
        assert gradient.isfinite().all()
        assert function(extreme.bfloat16(), extreme.bfloat16()).dtype == torch.float32
