import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from retina.ops.boxes import (
    LARGEST_LOG_SCALE,
    decode,
    encode,
    encode_distances,
)
from retina.ops.distributions import _MeanDistances, distances_to_deltas, even_distribution, mean_distances

TORCHVISION = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 500
    return torch.cat((corner, corner + 1 + torch.rand(count, 2, generator=generator) * 300), dim=-1)


def test_a_box_equal_to_its_anchor_has_zero_deltas():
    boxes = random_boxes(5, 0)
    assert encode(boxes, boxes).abs().max() == 0
    assert torch.allclose(decode(torch.zeros(5, 4), boxes), boxes)


def test_encode_of_a_literal():
    anchors = torch.tensor([[0.0, 0, 10, 20]])
    boxes = torch.tensor([[5.0, 10, 25, 20]])  # centre (15, 15) against (5, 10), sides (20, 10) against (10, 20)
    torch.testing.assert_close(encode(boxes, anchors), torch.tensor([[1.0, 0.25, 2.0, 0.5]]).log().where(
        torch.tensor([False, False, True, True]), torch.tensor([1.0, 0.25, 0.0, 0.0])
    ))  # fmt: skip


def test_encode_equals_torchvision():
    boxes, anchors = random_boxes(200, 0), random_boxes(200, 1)
    torch.testing.assert_close(encode(boxes, anchors), TORCHVISION.encode_single(boxes, anchors), rtol=0, atol=0)


def test_decode_equals_torchvision_beyond_the_clamp():
    anchors = random_boxes(200, 1)
    deltas = torch.randn(200, 4, generator=torch.Generator().manual_seed(2)) * 4
    assert (deltas > LARGEST_LOG_SCALE).any()
    torch.testing.assert_close(decode(deltas, anchors), TORCHVISION.decode_single(deltas, anchors), rtol=0, atol=0)


def test_decode_inverts_encode_in_a_batch():
    boxes, anchors = random_boxes(60, 0).reshape(3, 20, 4).double(), random_boxes(20, 1).double()
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes)


def test_a_wild_prediction_decodes_to_a_finite_box():
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    deltas = torch.tensor([[0.0, 0, 1e4, 1e4]], requires_grad=True)
    box = decode(deltas, anchors)
    torch.testing.assert_close(box, torch.tensor([[-492.0, -492, 508, 508]]))  # 1000 pixels wide
    box.sum().backward()
    assert deltas.grad.isfinite().all()


def test_encode_is_finite_for_padding():
    anchors = torch.tensor([[0.0, 0, 32, 32], [300, 300, 812, 812]])
    assert encode(torch.zeros(2, 4), anchors).isfinite().all()


def test_bfloat16_deltas_give_float32_boxes():
    anchors = random_boxes(4, 0)
    deltas = torch.full((4, 4), 0.3, dtype=torch.bfloat16)
    boxes = decode(deltas, anchors)
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, decode(deltas.float(), anchors))


def test_distances_of_a_literal():
    anchor, box = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[4.0, -2, 8, 50]])  # centre (5, 10)
    assert encode_distances(box, anchor).tolist() == [[1.0, 12.0, 3.0, 40.0]]
    outside = torch.tensor([[6.0, 11, 8, 12]])
    assert encode_distances(outside, anchor).tolist() == [[-1.0, -1.0, 3.0, 2.0]]
    deltas = distances_to_deltas(torch.tensor([1.0, 12.0, 3.0, 40.0]), torch.tensor([10.0, 20.0]))
    torch.testing.assert_close(deltas, torch.tensor([0.1, 0.7, math.log(0.4), math.log(2.6)]))


def test_deltas_of_distances_are_those_of_the_box():
    """Whether or not the anchor's centre is inside, and in any unit."""
    boxes, anchors = random_boxes(60, 0).reshape(3, 20, 4).double(), random_boxes(20, 1).double()
    distances, sides = encode_distances(boxes, anchors), anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(distances_to_deltas(distances, sides), encode(boxes, anchors))
    torch.testing.assert_close(distances_to_deltas(distances / 8, sides / 8), encode(boxes, anchors))
    torch.testing.assert_close(decode(distances_to_deltas(distances, sides), anchors), boxes)
    assert torch.autograd.gradcheck(lambda d: distances_to_deltas(d, sides), distances.requires_grad_())


def test_mean_distances():
    logits = torch.zeros(2, 3, 5)
    logits[1, 2, 3] = 100.0
    expected = torch.full((2, 3), 2.0)
    expected[1, 2] = 3.0
    torch.testing.assert_close(mean_distances(logits), expected)
    assert mean_distances(torch.randn(4, 9).bfloat16()).dtype == torch.float32
    inputs = torch.randn(4, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(mean_distances, inputs)
    weighted = sum(k * share for k, share in enumerate(inputs.softmax(dim=-1).unbind(-1)))
    torch.testing.assert_close(mean_distances(inputs), weighted)


@pytest.mark.parametrize("num_bins", [2, 3, 17])
def test_even_distributions_have_the_means_they_are_asked_for(num_bins: int):
    means = torch.linspace(0.5, num_bins - 1.5, 24).reshape(2, 3, 4)
    logits = even_distribution(means, num_bins)
    assert logits.shape == (2, 3, 4, num_bins)
    torch.testing.assert_close(mean_distances(logits), means, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.diff(n=2), torch.zeros(2, 3, 4, num_bins - 2), rtol=0, atol=1e-5)
    middle = even_distribution(torch.tensor([0.5 * (num_bins - 1)]), num_bins)
    torch.testing.assert_close(middle, torch.zeros(1, num_bins), rtol=0, atol=1e-5)


def test_even_distributions_exclude_no_distance():
    means = mean_distances(even_distribution(torch.tensor([-1.0, 0.0, 100.0]), 17))
    torch.testing.assert_close(means, torch.tensor([0.5, 0.5, 15.5]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_gradients_through_distributions_are_finite(scale: float):
    """Also of a box without any side, whose distances are all 0."""
    logits = torch.randn(50, 4, 17, generator=torch.Generator().manual_seed(0)) * scale
    logits[0, :, 0] = logits[0].max() + 3 * scale
    logits.requires_grad_()
    deltas = distances_to_deltas(mean_distances(logits), torch.tensor([4.0, 4.0]))
    assert deltas.isfinite().all()
    decode(deltas, torch.tensor([0.0, 0.0, 32.0, 32.0])).square().sum().backward()
    deltas = distances_to_deltas(mean_distances(logits), torch.tensor([4.0, 4.0]))
    deltas.square().sum().backward()
    assert logits.grad.isfinite().all()


def test_mean_distances_without_their_probabilities() -> None:
    """What a GPU computes again in the backward pass, it need not keep."""
    logits = torch.randn(5, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_MeanDistances.apply, logits)
    torch.testing.assert_close(_MeanDistances.apply(logits), mean_distances(logits))
