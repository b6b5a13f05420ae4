import copy
import pickle
from itertools import product

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from retina.ops.anchors import AnchorGenerator, Anchors
from retina.ops.boxes import box_area
from retina.ops.kernels.matching_forms import match_boxes

SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
STRIDES = (8, 16, 32, 64, 128)


def shapes_of(height: int, width: int) -> tuple[tuple[int, int], ...]:
    return tuple((height // stride, width // stride) for stride in STRIDES)


@pytest.mark.parametrize(("height", "width"), [(256, 384), (512, 256), (128, 128)])
def test_rounded_anchors_equal_torchvision(height: int, width: int):
    shapes = shapes_of(height, width)
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    expected = _default_anchorgen()(images, [torch.zeros(1, 1, h, w) for h, w in shapes])[0]
    assert torch.equal(torch.cat(AnchorGenerator(SIZES, rounded=True)(shapes, STRIDES, "cpu")), expected)


def test_nine_anchors_per_cell_as_in_the_paper():
    generator = AnchorGenerator(SIZES)
    assert generator.num_per_cell == 9
    assert [len(level) for level in generator(shapes_of(256, 384), STRIDES, "cpu")] == [
        9 * 32 * 48, 9 * 16 * 24, 9 * 8 * 12, 9 * 4 * 6, 9 * 2 * 3
    ]  # fmt: skip


def test_area_ratio_and_order():
    generator = AnchorGenerator((32.0, 100.0), scales=(1.0, 1.5), ratios=(0.5, 1.0, 3.0))
    for size, anchors in zip(generator.sizes, generator(((2, 3), (1, 2)), (8, 16), "cpu"), strict=True):
        anchors = anchors.reshape(-1, 3, 2, 4)  # [cell ratio scale 4]
        area = torch.tensor([(size * scale) ** 2 for scale in generator.scales])
        torch.testing.assert_close(box_area(anchors), area.expand(len(anchors), 3, 2), rtol=1e-5, atol=0)
        width, height = (anchors[..., 2:] - anchors[..., :2]).unbind(-1)
        ratio = torch.tensor(generator.ratios)[:, None].expand_as(width)
        torch.testing.assert_close(height / width, ratio, rtol=1e-5, atol=0)


def test_centres_are_multiples_of_the_stride_row_by_row():
    (anchors,) = AnchorGenerator((32.0,), scales=(1.0,), ratios=(1.0,))(((2, 3),), (8,), "cpu")
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres.tolist() == [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8]]
    assert anchors.dtype == torch.float32


def test_an_offset_moves_every_centre_by_a_share_of_the_stride():
    shapes, strides = ((2, 3), (1, 2)), (8, 16)
    plain = AnchorGenerator((32.0, 100.0), rounded=True)(shapes, strides, "cpu")
    moved = AnchorGenerator((32.0, 100.0), rounded=True, offset=0.5)(shapes, strides, "cpu")
    for one, other, stride in zip(plain, moved, strides, strict=True):
        assert torch.equal(one + stride / 2, other)
    (anchors,) = AnchorGenerator((32.0,), scales=(1.0,), ratios=(1.0,), offset=0.5)(((2, 2),), (8,), "cpu")
    assert ((anchors[:, :2] + anchors[:, 2:]) / 2).tolist() == [[4, 4], [12, 4], [4, 12], [12, 12]]


@pytest.mark.parametrize("offset", [-0.1, 1.1, float("nan")])
def test_an_offset_is_within_a_stride(offset: float):
    with pytest.raises(ValueError, match="offset must be between 0 and 1 stride"):
        AnchorGenerator((32.0,), offset=offset)


@pytest.mark.parametrize("offset", [0.5, 0.3, 1.0])
def test_matching_in_windows_equals_the_matrix_with_an_offset(offset: float):
    generator = AnchorGenerator(SIZES, offset=offset)
    anchors = generator(shapes_of(256, 384), STRIDES, "cpu")
    for seed in range(10):
        random = torch.Generator().manual_seed(seed)
        centre = torch.rand(2, 12, 2, generator=random) * torch.tensor([400, 270])
        side = torch.exp(torch.rand(2, 12, 2, generator=random) * 6.5)  # 1 to 665 px
        boxes = torch.cat((centre - side / 2, centre + side / 2), dim=-1)
        boxes[0, ::3] = boxes[0, ::3].round()
        boxes[1, ::4] = torch.cat(list(anchors))[torch.randint(0, 5000, (3,), generator=random)]
        kind = torch.rand(2, 12, generator=random)
        valid, crowd = kind > 0.2, kind < 0.1
        found, expected = (match_boxes(kept, boxes, valid, crowd) for kept in (anchors, tuple(anchors)))
        assert torch.equal(found.positive, expected.positive)
        assert torch.equal(found.negative, expected.negative)
        assert torch.equal(found.index[found.positive], expected.index[expected.positive])
        assert found.positive.any()


def test_a_level_is_its_first_cell_moved_over_the_grid():
    """What matching in windows builds on, to the last bit."""
    for rounded, offset in ((False, 0.0), (True, 0.0), (False, 0.5), (False, 0.3)):
        generator = AnchorGenerator((32.0, 41.3), rounded=rounded, offset=offset)
        anchors = generator(((5, 7), (3, 2)), (8, 12), "cpu")
        for level, (height, width), stride in zip(anchors, anchors.shapes, anchors.strides, strict=True):
            for row, column, n in product(range(height), range(width), range(9)):
                shift = torch.tensor([column, row, column, row]) * stride
                assert torch.equal(level[(row * width + column) * 9 + n], level[n] + shift)


def test_copies_know_their_grid():
    anchors = AnchorGenerator((32.0,))(((4, 4),), (8,), "cpu")
    for copied in (copy.copy(anchors), copy.deepcopy(anchors), pickle.loads(pickle.dumps(anchors))):
        assert (copied.shapes, copied.strides) == (((4, 4),), (8,))
        assert torch.equal(copied[0], anchors[0])


def test_cached_per_generator_shape_and_stride():
    shapes, strides = ((4, 4),), (8,)
    first = AnchorGenerator((32.0,))(shapes, strides, "cpu")
    assert AnchorGenerator((32.0,))(shapes, strides, "cpu")[0] is first[0]
    assert AnchorGenerator((32.0,), rounded=True)(shapes, strides, "cpu")[0] is not first[0]
    assert AnchorGenerator((32.0,), offset=0.5)(shapes, strides, "cpu")[0] is not first[0]
    assert not torch.equal(AnchorGenerator((32.0,))(shapes, (16,), "cpu")[0], first[0])


def test_anchors_first_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        (anchors,) = AnchorGenerator((33.0,))(((3, 3),), (8,), "cpu")
    deltas = torch.zeros_like(anchors).requires_grad_()
    (anchors * deltas).sum().backward()
    assert torch.equal(deltas.grad, anchors)


def test_a_level_without_cells_is_empty():
    (anchors,) = AnchorGenerator((32.0,))(((0, 3),), (8,), "cpu")
    assert anchors.shape == (0, 4)


@pytest.mark.parametrize(
    "settings", [{"sizes": ()}, {"sizes": (0.0,)}, {"sizes": (32.0,), "ratios": (-1.0,)}, {"sizes": (float("inf"),)}]
)
def test_settings_out_of_range_are_refused(settings: dict):
    with pytest.raises(ValueError, match="must be positive numbers"):
        AnchorGenerator(**settings)


def test_one_size_shape_and_stride_per_level():
    with pytest.raises(ValueError, match="not one per level"):
        AnchorGenerator(SIZES)(((4, 4),), (8,), "cpu")


def test_anchors_with_strides_from_the_canvas_are_where_torchvision_guesses() -> None:
    theirs = _default_anchorgen()
    shapes = [(100, 137), (50, 69), (25, 35), (13, 18), (7, 9)]
    images = ImageList(torch.empty(1, 3, 800, 1088), [(800, 1088)])
    expected = theirs(images, [torch.empty(1, 1, *shape) for shape in shapes])[0]
    generator, strides = AnchorGenerator(SIZES, rounded=True), (8, 16, 32, 64, 128)
    ours = generator(shapes, [(800 // h, 1088 // w) for h, w in shapes], "cpu")
    assert torch.equal(torch.cat(ours), expected)
    assert not isinstance(ours, Anchors)
    shapes = [(256 // s, 384 // s) for s in strides]
    pairs = [(256 // h, 384 // w) for h, w in shapes]
    assert generator(shapes, pairs, "cpu") is generator(shapes, strides, "cpu")
