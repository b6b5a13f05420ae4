import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from retina.losses.boxes import giou, smooth_l1
from retina.ops.anchors import AnchorGenerator

ANCHORS = AnchorGenerator((32.0, 64.0))(((16, 24), (8, 12)), (8, 16), "cpu")


def test_smooth_l1_of_literals():
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    deltas = torch.tensor([[0.05, -0.2, 0.0, 1.0]])
    assert smooth_l1(deltas, anchors, anchors).item() == pytest.approx(1.25)
    expected = 0.05**2 / 0.2 + (0.2 - 0.05) + (1 - 0.05)
    assert smooth_l1(deltas, anchors, anchors, beta=0.1).item() == pytest.approx(expected)


def test_giou_loss_equals_torchvision():
    anchors = ANCHORS[1][100:110]
    boxes = anchors.roll(1, dims=0)
    expected = generalized_box_iou_loss(anchors, boxes)
    torch.testing.assert_close(giou(torch.zeros(10, 4), anchors, boxes), expected)
