import math

import pytest
import torch
import torchvision.ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retina.losses.boxes import complete_iou, distance_iou, generalized_iou
from retina.ops.boxes import (
    box_area,
    clip_boxes,
    paired_iou,
    pairwise_intersection,
    pairwise_iou,
)


def random_boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 100
    return torch.cat((corner, corner + 1 + torch.rand(*shape, 2, generator=generator) * 60), dim=-1)


DEGENERATE = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 9], [5, 5, 9, 5], [9, 9, 3, 3], [0, 0, 10, 10]])


def test_area_is_width_times_height_and_never_negative():
    assert box_area(DEGENERATE).tolist() == [0, 0, 0, 0, 100]


def test_iou_of_a_literal_pair():
    boxes1 = torch.tensor([[0.0, 0, 10, 10]])
    boxes2 = torch.tensor([[5.0, 0, 15, 10], [0, 0, 10, 10], [10, 0, 20, 10]])
    assert pairwise_intersection(boxes1, boxes2).tolist() == [[50, 100, 0]]
    assert pairwise_iou(boxes1, boxes2).tolist() == [[pytest.approx(1 / 3), 1, 0]]


def test_iou_equals_torchvision_bit_by_bit():
    boxes1, boxes2 = random_boxes(50), random_boxes(70, seed=1)
    assert torch.equal(pairwise_iou(boxes1, boxes2), torchvision.ops.box_iou(boxes1, boxes2))


def test_iou_is_batched_and_broadcasts():
    boxes1, boxes2 = random_boxes(3, 5), random_boxes(7, seed=1)
    iou = pairwise_iou(boxes1, boxes2)
    assert iou.shape == (3, 5, 7)
    assert all(torch.equal(iou[b], pairwise_iou(boxes1[b], boxes2)) for b in range(3))


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_iou_of_nothing_is_empty(n: int, m: int):
    assert pairwise_iou(random_boxes(2, n), random_boxes(2, m)).shape == (2, n, m)


def test_iou_of_boxes_without_area_is_zero():
    iou = pairwise_iou(DEGENERATE, DEGENERATE)
    assert iou[-1, -1] == 1
    assert iou.sum() == 1  # nothing else, and no NaN


coordinate = st.floats(0, 2000, width=32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=6))
def test_iou_and_giou_stay_in_range_for_any_boxes(rows: list[tuple[float, ...]]):
    x1, y1, x2, y2 = torch.tensor(rows, dtype=torch.float32).unbind(-1)
    boxes = torch.stack((x1.minimum(x2), y1.minimum(y2), x1.maximum(x2), y1.maximum(y2)), dim=-1)
    iou = pairwise_iou(boxes, boxes)
    giou = generalized_iou(boxes[:, None], boxes[None])
    assert ((iou >= 0) & (iou <= 1)).all()
    assert ((giou >= -1) & (giou <= 1 + 1e-6)).all()
    assert (giou <= iou + 1e-6).all()


def test_giou_equals_torchvision():
    boxes1, boxes2 = random_boxes(40).double(), random_boxes(40, seed=1).double()
    torch.testing.assert_close(
        1 - generalized_iou(boxes1, boxes2), torchvision.ops.generalized_box_iou_loss(boxes1, boxes2, eps=0)
    )


def test_paired_iou_is_the_diagonal_of_the_pairwise_one():
    boxes1, boxes2 = random_boxes(40), random_boxes(40, seed=1)
    assert torch.equal(paired_iou(boxes1, boxes2), pairwise_iou(boxes1, boxes2).diagonal())


def test_diou_and_ciou_equal_torchvision():
    boxes1, boxes2 = random_boxes(40).double(), random_boxes(40, seed=1).double()
    for ours, theirs in (
        (distance_iou, torchvision.ops.distance_box_iou_loss),
        (complete_iou, torchvision.ops.complete_box_iou_loss),
    ):
        boxes1.requires_grad_()
        expected = theirs(boxes1, boxes2, eps=1e-12)
        loss = 1 - ours(boxes1, boxes2)
        torch.testing.assert_close(loss, expected)
        grads = [torch.autograd.grad(value.sum(), boxes1)[0] for value in (loss, expected)]
        torch.testing.assert_close(*grads)


def test_diou_and_ciou_of_literal_pairs():
    """Side by side: no overlap, centres 10 apart, hull 20 x 10. One half the other: v = (2 / pi atan(1/3))^2."""
    square, beside, half = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [0, 0, 10, 5]])
    assert distance_iou(square, beside).item() == pytest.approx(-100 / 500)
    assert complete_iou(square, beside).item() == pytest.approx(-100 / 500)
    assert distance_iou(square, half).item() == pytest.approx(0.5 - 6.25 / 200)
    v = (2 / math.pi * math.atan(1 / 3)) ** 2
    assert complete_iou(square, half).item() == pytest.approx(0.5 - 6.25 / 200 - v * v / (0.5 + v))


@pytest.mark.parametrize("overlap", [paired_iou, generalized_iou, distance_iou])
def test_gradients(overlap):
    """Not of the complete IoU, whose factor a is held constant on purpose."""
    boxes1, boxes2 = random_boxes(6).double().requires_grad_(), random_boxes(6, seed=1).double()
    assert torch.autograd.gradcheck(lambda boxes: overlap(boxes, boxes2), boxes1)


@pytest.mark.parametrize("overlap", [paired_iou, generalized_iou, distance_iou, complete_iou])
def test_overlaps_are_finite_with_their_gradients_for_boxes_without_area_and_far_away(overlap):
    far = torch.tensor(
        [[1e6, -1e6, 1e6 + 1, -1e6 + 2], [-1e9, -1e9, 1e9, 1e9], [3, 3, 3 + 1e-5, 1e8], [0, 0, 2e-20, 2e-20]]
    )
    boxes = torch.cat((DEGENERATE, far))
    boxes1 = boxes[:, None].clone().requires_grad_()
    values = overlap(boxes1, boxes[None])
    values.sum().backward()
    assert values.isfinite().all()
    assert boxes1.grad.isfinite().all()
    proper = (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)
    assert ((values[proper][:, proper] >= -1.5) & (values[proper][:, proper] <= 1 + 1e-6)).all()


def test_clip_uses_the_size_of_each_image():
    boxes = torch.tensor([[[-5.0, -5, 50, 50]], [[30, 30, 90, 90]]])
    sizes = torch.tensor([[10, 20], [40, 60]])
    assert clip_boxes(boxes, sizes[:, None]).tolist() == [[[0, 0, 20, 10]], [[30, 30, 60, 40]]]


def test_clip_leaves_a_box_outside_without_area():
    assert box_area(clip_boxes(torch.tensor([50.0, 50, 60, 60]), torch.tensor([10, 20]))) == 0
