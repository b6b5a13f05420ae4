import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import matching_cases
from retina.ops.anchors import AnchorGenerator, Anchors
from retina.ops.kernels import matching_cpu
from retina.ops.kernels.matching_cpu import match_in_windows
from retina.ops.kernels.matching_forms import match_boxes
from retina.ops.matching import Matches

PYRAMID = AnchorGenerator((32.0, 64.0, 128.0, 256.0, 512.0))
STRIDES = (8, 16, 32, 64, 128)


def pyramid(height: int, width: int, generator: AnchorGenerator = PYRAMID) -> Anchors:
    return generator([(-(-height // stride), -(-width // stride)) for stride in STRIDES], STRIDES, "cpu")


def match_all(anchors: tuple[torch.Tensor, ...], *boxes: list[float], **rule: float) -> Matches:
    objects = torch.tensor([boxes])
    return match_boxes(anchors, objects, torch.ones(1, len(boxes)).bool(), torch.zeros(1, len(boxes)).bool(), **rule)


@pytest.mark.parametrize("seed", range(8))
def test_random_cases_equal_the_matrix(seed: int):
    for number in range(seed * 40, seed * 40 + 40):
        case = matching_cases.random_case(number)
        matching_cases.assert_same(match_in_windows(*case), matching_cases.from_matrix(case), number)


@pytest.mark.parametrize("rounded", [False, True])
def test_equals_torchvision_on_a_whole_pyramid(rounded: bool):
    anchors = pyramid(400, 608, AnchorGenerator(PYRAMID.sizes, rounded=rounded))
    everything = torch.cat(list(anchors))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        centre = torch.rand(30, 2, generator=generator) * torch.tensor([608, 400])
        side = torch.exp(torch.rand(30, 2, generator=generator) * 7)  # 1 px to twice the image
        boxes = torch.cat((centre - side / 2, centre + side / 2), dim=1)
        boxes[::5] = boxes[::5].round()
        boxes[7] = boxes[3]
        expected = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, everything))
        index, positive, negative = (part[0] for part in match_all(anchors, *boxes.tolist()))
        assert torch.equal(positive, expected >= 0)
        assert torch.equal(negative, expected == Matcher.BELOW_LOW_THRESHOLD)
        assert torch.equal(index[positive], expected[positive])


@pytest.mark.parametrize(
    ("box", "ties"),
    [
        ([100.0, 100.0, 104.0, 104.0], 8),  # inside several anchors of the smallest area
        ([0.0, 0.0, 2.0, 2.0], 6),  # the same in a corner of the grid
        ([-4000.0, -4000.0, 4600.0, 4400.0], 24),  # around all anchors of the largest area
        ([300.0, 10.0, 300.5, 390.0], 2),  # a line
        ([96.0, 92.0, 104.0, 116.0], 2),  # centred between two cells
        ([640.0, 150.0, 644.0, 160.0], 1),  # beside the image, reached by anchors on its border
    ],
)
def test_all_anchors_that_tie_for_a_low_quality_match_are_found(box: list[float], ties: int):
    anchors = pyramid(400, 608)
    matches = match_all(anchors, box)
    matching_cases.assert_same(matches, match_all(tuple(anchors), box), box)
    assert matches.positive.sum() >= ties


def test_a_rescued_anchor_finds_its_own_best_object_outside_that_ones_window():
    """The sliver's best anchor (IoU 0.05) overlaps the other object more (0.31), which has anchors of its own at 1."""
    anchors = AnchorGenerator((32.0,), scales=(1.0,), ratios=(1.0,))(((8, 8),), (32,), "cpu")
    sliver, other = [34.0, 32.0, 36.0, 58.0], [16.0, 16.0, 48.0, 48.0]
    matches = match_all(anchors, sliver, other)
    matching_cases.assert_same(matches, match_all(tuple(anchors), sliver, other))
    assert matches.positive.sum() == 1


def test_an_object_that_overlaps_no_anchor_matches_none():
    anchors = pyramid(64, 64)
    edge = max(level[:, 2].max().item() for level in anchors)
    away, touching, line = [9000.0, 0.0, 9100.0, 80.0], [edge, 0.0, edge + 5, 20.0], [20.0, 20.0, 20.0, 50.0]
    matches = match_all(anchors, away, touching, line)
    assert not matches.positive.any()
    assert matches.negative.all()


def test_far_from_the_origin_float32_is_coarse():
    """Anchors with gaps between them up to 16,000 px away, where a float32 step is 1/1000 px; objects touch them."""
    generator = AnchorGenerator((1.0,), scales=(1.0, 1.3), ratios=(0.7, 1.0))
    anchors = generator(((2, 8000),), (2,), "cpu")
    random = torch.Generator().manual_seed(0)
    left, top, right, bottom = anchors[0][torch.randint(0, len(anchors[0]), (80,), generator=random)].unbind(1)
    touch = 0.001 * torch.randint(1, 4, (80,), generator=random)
    after = torch.stack((right - touch, top, right + 0.3, bottom), dim=1)
    before = torch.stack((left - 0.3, top, left + touch, bottom), dim=1)
    equal = torch.stack((left, top, right, bottom), dim=1)
    for boxes in (after, before, equal):
        for rule in ({}, {"positive_iou": 1.0, "negative_iou": 1.0, "low_quality": False}):
            expected = match_all(tuple(anchors), *boxes.tolist(), **rule)
            matching_cases.assert_same(match_all(anchors, *boxes.tolist(), **rule), expected, rule)


def test_few_pairs_are_looked_at(monkeypatch):
    """That is what makes it fast: some thousand of 10 million."""
    looked_at = []
    overlap = matching_cpu._elementwise
    monkeypatch.setattr(
        matching_cpu,
        "_elementwise",
        lambda *arguments: looked_at.append(overlap(*arguments)) or looked_at[-1],
    )
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(50, 2, generator=generator) * torch.tensor([1200, 700])
    boxes = torch.cat((corner, corner + 10 + torch.rand(50, 2, generator=generator) * 200), dim=1)
    anchors = pyramid(800, 1344)
    matching_cases.assert_same(match_all(anchors, *boxes.tolist()), match_all(tuple(anchors), *boxes.tolist()))
    assert sum(part.size for part in looked_at) < 20_000
