import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

import matching_cases
from retina.ops.anchors import AnchorGenerator
from retina.ops.kernels.matching_forms import _match_boxes, match_boxes
from retina.ops.matching import match


def everything(num_objects: int) -> Tensor:
    return torch.ones(num_objects, dtype=torch.bool)


def test_literal_matrix():
    iou = torch.tensor([[0.9, 0.1, 0.0], [0.45, 0.2, 0.0], [0.3, 0.5, 0.0], [0.1, 0.0, 0.2]])  # 4 anchors, 3 objects
    matches = match(iou, everything(3))
    assert matches.index.tolist() == [0, 0, 1, 2]
    assert matches.positive.tolist() == [True, False, True, True]  # the last is object 2's best anchor
    assert matches.negative.tolist() == [False, False, False, False]  # the second lies between 0.4 and 0.5
    strict = match(iou, everything(3), low_quality=False)
    assert strict.positive.tolist() == [True, False, True, False]
    assert strict.negative.tolist() == [False, False, False, True]


def test_thresholds_are_inclusive_below():
    iou = torch.tensor([[0.5], [0.4], [0.39]])
    matches = match(iou, everything(1), low_quality=False)
    assert matches.positive.tolist() == [True, False, False]
    assert matches.negative.tolist() == [False, False, True]


def test_all_anchors_that_tie_for_an_objects_best_are_positive():
    matches = match(torch.tensor([[0.2], [0.2], [0.1]]), everything(1))
    assert matches.positive.tolist() == [True, True, False]


def test_a_rescued_anchor_keeps_its_own_best_object():
    # Anchor 0 is the best that object 1 has (0.3), but overlaps object 0 more (0.45); object 0's own best is anchor 1.
    matches = match(torch.tensor([[0.45, 0.3], [0.8, 0.0]]), everything(2))
    assert matches.index.tolist() == [0, 0]
    assert matches.positive.tolist() == [True, True]


def test_an_object_that_overlaps_no_anchor_matches_none():
    """Here torchvision makes every anchor positive, as all of them tie at IoU 0."""
    iou = torch.tensor([[0.6, 0.0], [0.1, 0.0], [0.0, 0.0]])
    matches = match(iou, everything(2))
    assert matches.positive.tolist() == [True, False, False]
    assert matches.negative.tolist() == [False, True, True]
    assert (Matcher(0.5, 0.4, allow_low_quality_matches=True)(iou.T) >= 0).all()


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_random_matrices_equal_torchvision(seed: int, low_quality: bool):
    generator = torch.Generator().manual_seed(seed)
    # A coarse grid of values gives many ties, both along anchors and along objects.
    iou = torch.randint(0, 12, (60, 9), generator=generator) / 12
    iou[0] = iou[0].clamp(min=1 / 12)  # no object without overlap: there we differ on purpose
    iou[:, seed % 9] *= 0.5
    expected = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)(iou.T)
    matches = match(iou, everything(9), low_quality=low_quality)
    assert torch.equal(matches.positive, expected >= 0)
    assert torch.equal(matches.negative, expected == Matcher.BELOW_LOW_THRESHOLD)
    assert torch.equal(matches.index[matches.positive], expected[expected >= 0])


def test_padding_does_not_count_and_images_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    iou = torch.rand(3, 40, 6, generator=generator)
    valid = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    matches = match(iou, valid)
    for b in range(3):
        objects = valid[b].nonzero().squeeze(1)
        alone = match(iou[b][:, objects], everything(len(objects)))
        assert torch.equal(matches.positive[b], alone.positive)
        assert torch.equal(matches.negative[b], alone.negative)
        if len(objects):
            assert torch.equal(matches.index[b], objects[alone.index])
    assert matches.negative[1].all()


def test_a_transposed_matrix_gives_the_same():
    iou = torch.rand(2, 5, 30, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 5, dtype=torch.bool)
    for one, other in zip(match(iou.mT, valid), match(iou.mT.contiguous(), valid), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(2, 7, 0), (2, 0, 3), (0, 7, 3)])
def test_without_objects_anchors_or_images(shape: tuple[int, int, int]):
    matches = match(torch.zeros(shape), torch.ones(shape[0], shape[2], dtype=torch.bool))
    assert matches.index.shape == matches.positive.shape == matches.negative.shape == shape[:2]
    assert matches.negative.all()
    assert not matches.positive.any()
    assert matches.index.dtype == torch.int64


def test_boxes_of_literals():
    """Three anchors of 10 x 10: on the object, beside everything, and 6/10 inside the crowd region."""
    anchors = (torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), torch.tensor([[94.0, 0, 104, 10]]))
    boxes = torch.tensor([[[1.0, 0, 11, 10], [98, -50, 300, 300], [94, 0, 104, 10]]])
    valid, crowd = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    matches = match_boxes(anchors, boxes, valid, crowd)
    assert matches.index[0, 0] == 0
    assert matches.positive.tolist() == [[True, False, False]]
    assert matches.negative.tolist() == [[False, True, False]]
    assert match_boxes(anchors, boxes, valid, crowd, positive_iou=0.7).negative.tolist() == [[False, True, True]]


def test_a_crowd_ignores_no_positive_anchor():
    anchors = (torch.tensor([[0.0, 0, 10, 10], [0, 0, 9, 5]]),)
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 100, 100]]])
    matches = match_boxes(
        anchors, boxes, torch.tensor([[True, False]]), torch.tensor([[False, True]]), negative_iou=0.5
    )
    assert matches.positive.tolist() == [[True, False]]
    assert matches.negative.tolist() == [[False, False]]


@pytest.mark.parametrize("with_grid", [True, False])
def test_boxes_are_one_operation_that_a_compiler_can_look_through(with_grid: bool):
    anchors, boxes, valid, crowd, *rule = matching_cases.random_case(3)
    grid = [
        number for shape, stride in zip(anchors.shapes, anchors.strides, strict=True) for number in (*shape, stride)
    ]
    arguments = (list(anchors), grid if with_grid else [], boxes, valid, crowd, *rule)
    torch.library.opcheck(_match_boxes, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("num_objects", [0, 3])
def test_boxes_without_any_object_leave_every_anchor_negative(num_objects: int):
    anchors = AnchorGenerator((32.0,))(((4, 5),), (8,), "cpu")
    nothing = torch.zeros(2, num_objects, dtype=torch.bool)
    for levels in (anchors, tuple(anchors)):
        matches = match_boxes(levels, torch.rand(2, num_objects, 4), nothing, nothing, negative_iou=0.0)
        assert matches.negative.shape == (2, 180)
        assert matches.negative.all()
        assert not matches.positive.any()


@pytest.mark.parametrize(("positive", "negative"), [(0.4, 0.5), (1.1, 0.4), (0.5, -0.1), (0.0, 0.0)])
def test_thresholds_out_of_order_are_refused(positive: float, negative: float):
    with pytest.raises(ValueError, match="negative_iou <= positive_iou"):
        match(torch.zeros(1, 1), everything(1), positive_iou=positive, negative_iou=negative)
    nothing = torch.zeros(1, 0, dtype=torch.bool)
    with pytest.raises(ValueError, match="negative_iou <= positive_iou"):
        match_boxes((), torch.zeros(1, 0, 4), nothing, nothing, positive_iou=positive, negative_iou=negative)
