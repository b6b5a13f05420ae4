"""The task-aligned head of TOOD, in which classification and boxes share their layers. Beside the road."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retina.errors import ConfigError, check_choice
from retina.model.content import GroupNorm
from retina.model.head import Masks, by_anchor
from retina.ops.boxes import LARGEST_LOG_SCALE, encode
from retina.ops.joint_scores import geometric_mean_logits


class TaskAlignedHead(nn.Module):
    """One tower of `num_convs` 3x3 convolutions for both tasks, each with an optional GroupNorm and a ReLU; then:

    - *Decomposition*: all its maps, of which each task weighs every layer by an attention of its own to their means
      over the image, are reduced to `channels` by a 1x1 convolution.
    - *Predictions* of the tasks by a 3x3 convolution: a class score, and distances exp(x) in strides from the anchor's
      centre to the four sides.
    - *Alignment*: a map of one probability for each cell, of which the score is the geometric mean with that of each
      class; and for each coordinate of a box an offset, from where in the map of that coordinate it is then read
      (bilinearly, 0 outside). A box whose corners change sides thereby stays as it was.

    For one anchor per cell. Logits and deltas come out as `Head` gives them. What is beyond the content of an image
    counts as outside the map, so that an image does not depend on its padding.

    Differences from the authors' code: the exponent of a distance is at most log 62.5, as that of a delta is, and boxes
    are written as deltas of the anchors, which cuts sides at 62.5 anchors.
    Raises ConfigError for a prior out of range, more than one anchor per cell, and no layers.
    Source: Feng et al., TOOD: Task-aligned One-stage Object Detection, ICCV 2021, section 3.1; the authors' code, which
    is in mmdetection (tood_head.py)."""

    bins: int | None = None

    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        anchor_sides: Float[Tensor, "L N 2"],
        channels: int,
        num_convs: int,
        norm: str | None,
        prior: float,
        scaled_levels: int | None = None,
    ) -> None:
        """anchor_sides: width and height of a cell's anchors on each level, in strides."""
        super().__init__()
        check_choice(norm, (None, "group"), "head_norm")
        for wrong, problem, key in (
            (not 0 < prior < 1, f"{prior} is no probability - give a number between 0 and 1, e.g. 0.01", "prior"),
            (
                num_convs < 1,
                f"{num_convs} layers leave nothing to align - give at least 1, 6 in the paper",
                "head_convs",
            ),
            (
                anchor_sides.shape[1] != 1,
                f"predicts one box per cell, there are {anchor_sides.shape[1]} anchors - give anchor_scales=[2.0] and "
                "anchor_ratios=[1.0]",
                "head",
            ),
        ):
            if wrong:
                raise ConfigError(problem, code="out-of-range", key=key)
        self.anchor_sides = anchor_sides[:, 0].tolist()
        self.convs = nn.ModuleList(
            _Layer(nn.Conv2d(channels if i else in_channels, channels, 3, padding=1, bias=norm is None), norm)
            for i in range(num_convs)
        )
        self.classification = _Task(channels, num_convs, norm, num_classes)
        self.box = _Task(channels, num_convs, norm, 4)
        self.align_classes = _Alignment(channels, num_convs, 1)
        self.align_box = _Alignment(channels, num_convs, 8)
        self.scales = nn.Parameter(torch.ones(scaled_levels)) if scaled_levels is not None else None
        self._initialize(-math.log((1 - prior) / prior))

    def _initialize(self, bias: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        attentions = (*self.classification.attention, *self.box.attention)
        for module in (*attentions, self.align_box.reduce, self.align_box.predict):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)
        for conv in (self.classification.predict, self.align_classes.predict):
            assert conv.bias is not None
            nn.init.constant_(conv.bias, bias)

    def forward(
        self, features: tuple[Float[Tensor, "B C _ _"], ...], masks: Masks | None = None
    ) -> tuple[tuple[Float[Tensor, "B A_l K"], ...], tuple[Float[Tensor, "B A_l 4"], ...], tuple[Tensor, ...]]:
        """Class logits and deltas of each level, and no quality. masks: as of `Head`."""
        logits, deltas = [], []
        for level, (x, mask) in enumerate(zip(features, masks or (None,) * len(features), strict=True)):
            layers = []
            for layer in self.convs:
                x = layer(x, mask)
                layers.append(x)
            shared = torch.cat(layers, dim=1)
            means = _mean_over_content(shared, mask)
            classes = self.classification(shared, means, mask)
            logits.append(by_anchor(geometric_mean_logits(classes, self.align_classes(shared, mask)), classes.shape[1]))
            distances = _wide(self.box(shared, means, mask)).clamp(max=LARGEST_LOG_SCALE).exp()
            if self.scales is not None:
                distances = distances * self.scales[level]
            deltas.append(self._deltas(distances, _wide(self.align_box(shared, mask)), mask, self.anchor_sides[level]))
        return tuple(logits), tuple(deltas), ()

    def _deltas(
        self, distances: Float[Tensor, "B 4 H W"], offsets: Float[Tensor, "B 8 H W"], mask: Any, sides: Sequence[float]
    ) -> Float[Tensor, "B A_l 4"]:
        """Those of the aligned boxes, all in strides: an anchor's centre is its (column, row)."""
        height, width = distances.shape[-2:]
        y, x = (torch.arange(n, device=distances.device, dtype=distances.dtype) for n in (height, width))
        centre = torch.stack((x.expand(height, width), y[:, None].expand(height, width)))
        boxes = torch.cat((centre - distances[:, :2], centre + distances[:, 2:]), dim=1)
        aligned = _read_at(boxes if mask is None else boxes * mask, offsets.unflatten(1, (4, 2)))
        crossed = (aligned[:, :2] > aligned[:, 2:]).any(dim=1, keepdim=True)
        aligned = torch.where(crossed, boxes, aligned)
        half = 0.5 * centre.new_tensor(sides)[:, None, None]
        anchors = torch.cat((centre - half, centre + half))
        return encode(by_anchor(aligned, 4), by_anchor(anchors[None], 4))


class _Layer(nn.Module):
    """A convolution with an optional GroupNorm and a ReLU, zero beyond the content."""

    def __init__(self, conv: nn.Conv2d, norm: str | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = GroupNorm(math.gcd(32, conv.out_channels), conv.out_channels) if norm else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.finish(self.conv(x), mask)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x if self.norm is None else self.norm(x, mask)
        return x.relu() if mask is None else (x * mask.to(x.dtype)).relu()


class _Task(nn.Module):
    """Decomposition and prediction of one task: [B outputs H W] from the maps [B N C H W] of all N layers."""

    def __init__(self, channels: int, num_convs: int, norm: str | None, num_outputs: int) -> None:
        super().__init__()
        hidden = max(1, channels // 8)
        self.attention = nn.Sequential(
            nn.Conv2d(channels * num_convs, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, num_convs, 1), nn.Sigmoid()
        )
        self.reduce = _Layer(nn.Conv2d(channels * num_convs, channels, 1, bias=norm is None), norm)
        self.predict = nn.Conv2d(channels, num_outputs, 3, padding=1)

    def forward(self, shared: Tensor, means: Tensor, mask: Tensor | None) -> Tensor:
        weights = self.attention(means)  # [B N 1 1]
        conv = self.reduce.conv
        # The attention scales the weights of the small convolution, not the large maps.
        kernels = conv.weight.unflatten(1, (weights.shape[1], -1)) * weights[:, None, ..., None]
        reduced = torch.bmm(kernels.flatten(2), shared.flatten(2)).unflatten(2, shared.shape[2:])
        reduced = reduced if conv.bias is None else reduced + conv.bias[:, None, None]
        return self.predict(self.reduce.finish(reduced, mask))


class _Alignment(nn.Module):
    """A 1x1 convolution, a ReLU and a 3x3 convolution over the maps of all layers."""

    def __init__(self, channels: int, num_convs: int, num_outputs: int) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        self.reduce = nn.Conv2d(channels * num_convs, hidden, 1)
        self.predict = nn.Conv2d(hidden, num_outputs, 3, padding=1)

    def forward(self, shared: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.reduce(shared).relu()
        return self.predict(hidden if mask is None else hidden * mask.to(hidden.dtype))


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_over_content(x: Float[Tensor, "B C H W"], mask: Tensor | None) -> Float[Tensor, "B C 1 1"]:
    """`x` is zero beyond the content."""
    if mask is None:
        return x.mean(dim=(2, 3), keepdim=True)
    return x.sum(dim=(2, 3), keepdim=True) / mask.sum(dim=(2, 3), keepdim=True).to(x.dtype)


def _read_at(maps: Float[Tensor, "B C H W"], offsets: Float[Tensor, "B C 2 H W"]) -> Float[Tensor, "B C H W"]:
    """Every map, read at (row, column) plus its offset between cells: bilinear, 0 outside. (`deform_conv2d` with a
    kernel of one weight 1, in operations that a compiler and every device know.)"""
    height, width = maps.shape[-2:]
    y = torch.arange(height, device=maps.device, dtype=maps.dtype)[:, None] + offsets[:, :, 0]
    x = torch.arange(width, device=maps.device, dtype=maps.dtype) + offsets[:, :, 1]
    total = torch.zeros_like(maps)
    for row in (y.detach().floor(), y.detach().floor() + 1):
        for column in (x.detach().floor(), x.detach().floor() + 1):
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            cell = torch.where(inside, row * width + column, 0).long()
            values = maps.flatten(2).gather(2, cell.flatten(2)).view_as(maps)
            total = total + torch.where(inside, weight, 0) * values
    return total
