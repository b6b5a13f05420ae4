"""Matching of anchors with objects, low-quality matches included, against torchvision's `box_iou` and `Matcher`."""

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retina.lab.clock import Bench, Row, speedup
from retina.ops.anchors import AnchorGenerator
from retina.ops.kernels.matching_forms import match_boxes
from retina.ops.matching import Matches

STRIDES = (8, 16, 32, 64, 128)


def run(bench: Bench) -> list[Row]:
    height, width, num_objects, batch = (160, 224, 10, 2) if bench.quick else (800, 1344, 50, 16)
    generator = AnchorGenerator(tuple(4.0 * stride for stride in STRIDES))
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    anchors = generator(shapes, STRIDES, bench.device)
    boxes = random_boxes(batch, num_objects, height, width).to(bench.device)
    bars = {"must": 8.0, "goal": 60.0} if bench.device.type == "cpu" else {}
    return [compare(bench, anchors, boxes[:1], **bars), compare(bench, anchors, boxes)]


def random_boxes(batch: int, num_objects: int, height: int, width: int) -> Tensor:
    """[B M 4], centres anywhere in the image, sides log-uniform from 12 px to half the image, clipped."""
    limit = torch.tensor([width, height])
    centre = torch.rand(batch, num_objects, 2) * limit
    side = 12 * (limit / 24) ** torch.rand(batch, num_objects, 2)
    low, high = (centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, limit)
    return torch.cat((low, high), dim=-1)


def compare(bench: Bench, anchors: tuple[Tensor, ...], boxes: Tensor, **bars: float) -> Row:
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    crowd = torch.zeros_like(valid)
    together = torch.cat(list(anchors))
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def match_all() -> Matches:
        return match_boxes(anchors, boxes, valid, crowd, positive_iou=0.5, negative_iou=0.4, low_quality=True)

    def match_each() -> list[Tensor]:
        return [matcher(box_iou(image, together)) for image in boxes]

    index, positive, negative = match_all()
    expected = torch.stack(match_each())
    assert torch.equal(positive, expected >= 0)
    assert torch.equal(negative, expected == Matcher.BELOW_LOW_THRESHOLD)
    assert torch.equal(index[positive], expected[positive])
    images = f", {len(boxes)} images" if len(boxes) > 1 else ""
    times = bench.time({"ours": match_all, "reference": match_each})
    return speedup(f"matching {len(together):,} x {boxes.shape[1]}{images}", times, **bars)
