import pytest
import torch
from torchvision.ops import box_iou, complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from retina.losses.boxes import ciou, diou, giou, iou, l1, smooth_l1
from retina.ops.anchors import AnchorGenerator
from retina.ops.boxes import decode

ANCHORS = AnchorGenerator((32.0, 64.0))(((16, 24), (8, 12)), (8, 16), "cpu")


def test_smooth_l1_of_literals():
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    deltas = torch.tensor([[0.05, -0.2, 0.0, 1.0]])
    assert smooth_l1(deltas, anchors, anchors).item() == pytest.approx(1.25)
    expected = 0.05**2 / 0.2 + (0.2 - 0.05) + (1 - 0.05)
    assert smooth_l1(deltas, anchors, anchors, beta=0.1).item() == pytest.approx(expected)


def test_l1_of_literals():
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    assert l1(torch.tensor([[0.05, -0.2, 0.0, 1.0]]), anchors, anchors).item() == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(giou, generalized_box_iou_loss), (diou, distance_box_iou_loss), (ciou, complete_box_iou_loss)],
)
def test_overlap_losses_equal_torchvision(ours, theirs):
    anchors = ANCHORS[1][100:110]
    boxes = anchors.roll(1, dims=0)
    torch.testing.assert_close(ours(torch.zeros(10, 4), anchors, boxes), theirs(anchors, boxes))


def test_iou_loss_is_what_does_not_overlap():
    anchors = ANCHORS[1][100:110]
    boxes = anchors.roll(1, dims=0)
    torch.testing.assert_close(iou(torch.zeros(10, 4), anchors, boxes), 1 - box_iou(anchors, boxes).diagonal())


@pytest.mark.parametrize("loss", [smooth_l1, l1, iou, giou, diou, ciou])
def test_losses_of_wild_deltas_and_boxes_without_area_are_finite_with_their_gradients(loss):
    anchors = ANCHORS[0][200:208]
    deltas = torch.tensor([[0.0] * 4, [1e4] * 4, [-1e4] * 4, [0, 0, -50, 50]]).repeat(2, 1).requires_grad_()
    boxes = torch.cat((anchors[:4], anchors[4:, :2].repeat(1, 2)))
    values = loss(deltas, anchors, boxes)
    values.sum().backward()
    assert values.isfinite().all()
    assert (values >= 0).all()
    assert deltas.grad.isfinite().all()


@pytest.mark.parametrize("loss", [smooth_l1, l1, iou, giou, diou, ciou])
def test_every_loss_leads_to_the_box(loss):
    anchors = ANCHORS[0][200:202]
    boxes = anchors + torch.tensor([[9.0, -6, 4, 8], [3, 3, -3, -3]])
    deltas = torch.zeros(2, 4, requires_grad=True)
    optimizer = torch.optim.Adam([deltas], lr=0.1)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 50)
        optimizer.zero_grad()
        loss(deltas, anchors, boxes).sum().backward()
        optimizer.step()
    torch.testing.assert_close(decode(deltas, anchors).detach(), boxes, rtol=0, atol=0.5)
