"""A box loss, an assigner and a backbone of one's own."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retina.ops.boxes import encode, pairwise_iou
from retina.types import Assignment, Predictions, Targets


def log_cosh(deltas: Tensor, anchors: Tensor, boxes: Tensor, *, scale: float = 1.0) -> Tensor:
    """log(cosh(d / scale)) of the difference d of deltas, summed over the 4 coordinates: [... A 4] to [... A].

    It is quadratic near 0 and linear far away."""
    d = ((deltas - encode(boxes, anchors)) / scale).abs()
    return (d + nn.functional.softplus(-2 * d) - 0.6931471805599453).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class TopIoU:
    """Positive are the `topk` anchors of each object with the highest IoU, unless that is below `least`."""

    topk: int = 9
    least: float = 0.2

    def __call__(self, predictions: Predictions, targets: Targets) -> Assignment:
        iou = pairwise_iou(torch.cat(tuple(predictions.anchors)), targets.boxes)  # [B A M]
        objects = (targets.valid & ~targets.crowd)[:, None]
        iou = iou.masked_fill(~objects, -1)
        needed = iou.topk(min(self.topk, iou.shape[1]), dim=1).values[:, -1:].clamp(min=self.least)
        matched = iou.masked_fill(iou < needed, -1).argmax(dim=-1)
        positive = (iou >= needed).any(dim=-1)
        return Assignment(matched, positive, ~positive)


class TinyNet(nn.Module):
    """Stages of strided convolutions. Takes normalised images [B 3 H W], gives maps of strides 4 to 2^last_level."""

    def __init__(self, width: int = 16, *, last_level: int = 5) -> None:
        super().__init__()
        self.strides = tuple(2**level for level in range(2, last_level + 1))
        self.channels = tuple(width * stride // 4 for stride in self.strides)
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        inputs = (width, *self.channels[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.ReLU())
            for a, b in zip(inputs, self.channels, strict=True)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = torch.relu(self.stem(images))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)
