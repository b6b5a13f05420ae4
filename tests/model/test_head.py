import math

import pytest
import torch
from torch import Tensor

from faults import refused
from retina.model.head import Head, Outputs

SETTINGS = {"num_classes": 3, "channels": 32, "num_convs": 2, "norm": None, "prior": 0.01}


def features() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)


@pytest.mark.parametrize("norm", [None, "group"])
@pytest.mark.parametrize("num_anchors", [1, 3])
@pytest.mark.parametrize("quality", [False, True])
@pytest.mark.parametrize("bins", [None, 5])
def test_shapes_parameters_and_gradients(bins: int | None, quality: bool, num_anchors: int, norm: str | None) -> None:
    head = Head(8, **SETTINGS | {"norm": norm}, num_anchors=num_anchors, outputs=Outputs(bins=bins, quality=quality))
    logits, boxes, fits = head(features())
    cells = (24, 6)
    assert [x.shape for x in logits] == [(2, n * num_anchors, 3) for n in cells]
    assert [x.shape for x in boxes] == [(2, n * num_anchors, 4 * (bins or 1)) for n in cells]
    assert [x.shape for x in fits] == ([(2, n * num_anchors) for n in cells] if quality else [])
    plain = Head(8, **SETTINGS | {"norm": norm}, num_anchors=num_anchors)
    more = num_anchors * (4 * ((bins or 1) - 1) + quality) * (32 * 9 + 1)  # outputs x (weights and a bias)
    assert sum(p.numel() for p in head.parameters()) == sum(p.numel() for p in plain.parameters()) + more
    torch.cat([x.flatten() for x in (*logits, *boxes, *fits)]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_quality_is_of_the_anchor_that_it_stands_beside() -> None:
    """It comes from the box tower, one number per anchor in the order [H W cell-anchor]."""
    head = Head(8, **SETTINGS, num_anchors=3, outputs=Outputs(quality=True))
    assert head.box.quality is not None
    with torch.no_grad():
        head.box.quality.weight.zero_()
        head.box.quality.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    *_, fits = head(features())
    assert fits[1].tolist() == [[1.0, 2.0, 3.0] * 6] * 2
    towers = head.box.convs(features()[0])
    with torch.no_grad():
        head.box.quality.weight.normal_()
    *_, fits = head(features())
    expected = head.box.quality(towers)  # [B anchors H W]
    assert torch.equal(fits[0].view(2, 4, 6, 3).permute(0, 3, 1, 2), expected)
    fits[0].sum().backward()
    trained = {name for name, p in head.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in head.named_parameters() if name.startswith(("box.convs", "box.quality"))}


def test_the_factor_of_a_level_is_its_own_and_learned() -> None:
    torch.manual_seed(0)
    plain = Head(8, **SETTINGS, num_anchors=3, outputs=Outputs(bins=5, quality=True))
    torch.manual_seed(0)
    scaled = Head(8, **SETTINGS, num_anchors=3, scaled_levels=2, outputs=Outputs(bins=5, quality=True))
    logits, boxes, fits = plain(features())
    for one, other in zip((logits, boxes, fits), scaled(features()), strict=True):
        assert all(map(torch.equal, one, other))  # it starts at 1
    with torch.no_grad():
        scaled.scales.copy_(torch.tensor([2.0, 0.5]))
    results = scaled(features())
    assert torch.equal(results[1][0], 2 * boxes[0])
    assert torch.equal(results[1][1], 0.5 * boxes[1])
    assert all(map(torch.equal, (*logits, *fits), (*results[0], *results[2])))
    results[1][1].square().sum().backward()
    assert scaled.scales.grad[0] == 0 < scaled.scales.grad[1]


def test_what_is_added_leaves_the_start_of_the_others_alone() -> None:
    heads = []
    for quality in (False, True):
        torch.manual_seed(0)
        heads.append(Head(8, **SETTINGS, num_anchors=3, outputs=Outputs(quality=quality)).state_dict())
    assert set(heads[1]) - set(heads[0]) == {"box.quality.weight", "box.quality.bias"}
    assert all(torch.equal(heads[1][key], value) for key, value in heads[0].items())
    prior = heads[0]["classification.predict.bias"].sigmoid()
    torch.testing.assert_close(prior, torch.full_like(prior, 0.01))
    assert heads[1]["box.quality.bias"].eq(0).all()
    assert heads[1]["box.quality.weight"].std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"outputs": Outputs(bins=1)}, "box_bins"), ({"outputs": Outputs(bins=0)}, "box_bins"),
     ({"norm": "batch"}, "head_norm"),
     ({"prior": math.nan}, "prior")],
)  # fmt: skip
def test_values_out_of_range_are_named(wrong: dict[str, object], named: str) -> None:
    with refused("unknown-value" if named == "head_norm" else "out-of-range", f"{named}: "):
        Head(8, **SETTINGS | {"num_anchors": 1} | wrong)
