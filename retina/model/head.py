"""Classification and box towers, shared over pyramid levels (Lin et al., arXiv 1708.02002, section 4)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retina.errors import ConfigError, check_choice
from retina.model.content import GroupNorm
from retina.model.guided_quality import GuidedQuality
from retina.model.layers import convolve
from retina.ops.distributions import even_distribution

Masks = Sequence[Float[Tensor, "B 1 _ _"] | None]


class Tower(nn.Module):
    """`num_convs` 3x3 convolutions, each with an optional GroupNorm (`group_bias`: and a bias before it) and a ReLU,
    then one 3x3 convolution that predicts `num_outputs` numbers for each anchor of a cell. With `quality` another one
    predicts one number for each anchor. Weights are drawn from N(0, 0.01), biases are 0."""

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int,
        num_convs: int,
        norm: str | None,
        num_anchors: int,
        num_outputs: int,
        quality: bool = False,
    ) -> None:
        super().__init__()
        check_choice(norm, (None, "group", "group_bias"), "head_norm")
        layers: list[nn.Module] = []
        for i in range(num_convs):
            layers.append(nn.Conv2d(channels if i else in_channels, channels, 3, padding=1, bias=norm != "group"))
            if norm:
                layers.append(GroupNorm(math.gcd(32, channels), channels))
            layers.append(nn.ReLU(inplace=True))
        self.convs = nn.Sequential(*layers)
        last_channels = channels if num_convs else in_channels
        self.predict = nn.Conv2d(last_channels, num_anchors * num_outputs, 3, padding=1)
        self.num_outputs = num_outputs
        self.apply(_initialize)
        self.quality = nn.Conv2d(last_channels, num_anchors, 3, padding=1).apply(_initialize) if quality else None

    def forward(
        self, features: tuple[Float[Tensor, "B C _ _"], ...], masks: Masks
    ) -> tuple[tuple[Float[Tensor, "B A_l _"], ...], tuple[Float[Tensor, "B A_l"], ...]]:
        """The numbers and the quality logits of every level; the second tuple is empty without `quality`.

        Anchors are in the order [H W cell-anchor], so that in channels_last memory the results are views."""
        hidden = tuple(features)
        for layer, following in pairwise(self.convs):
            if isinstance(layer, nn.Conv2d):
                norm = following if isinstance(following, GroupNorm) else None
                hidden = convolve(layer, hidden, masks, norm=norm, relu=True)
        unmasked = (None,) * len(hidden)
        numbers = tuple(by_anchor(x, self.num_outputs) for x in convolve(self.predict, hidden, unmasked))
        if self.quality is None:
            return numbers, ()
        return numbers, tuple(by_anchor(x, 1).squeeze(-1) for x in convolve(self.quality, hidden, unmasked))


def _initialize(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, std=0.01)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def by_anchor(x: Float[Tensor, "B _ _ _"], num_outputs: int) -> Float[Tensor, "B A_l _"]:
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, num_outputs)


class Outputs(NamedTuple):
    """What a head predicts beside the classes, and how it predicts boxes."""

    quality: bool = False
    """One more logit per anchor."""
    bins: int | None = None
    """Bins of the distribution that each side of a box is; None for four deltas."""
    guided: bool = False
    """Scores are multiplied by a quality that is read from the distributions."""


class Head(nn.Module):
    """A tower for class logits and one for boxes.

    The last classification bias is -log((1 - prior) / prior). So every anchor scores `prior` at the start, and the many
    easy negatives do not dominate the first steps (section 3.3 of the paper).

    The box tower predicts 4 deltas per anchor, or with `bins` = R the logits of R distances to each of 4 sides (Li et
    al., Generalized Focal Loss, NeurIPS 2020). With `quality`, a convolution of its own also predicts one logit of how
    well the box fits, like the centerness of ATSS (Zhang et al., CVPR 2020). With `scaled_levels`, the number of
    levels, the box numbers of each level are multiplied by a factor of its own, which is learned and starts at 1 (FCOS,
    Tian et al., ICCV 2019, section 3.2). With `guided`, scores are multiplied by a quality that is read from the
    distributions (`GuidedQuality`).

    Raises ConfigError for a prior or number of bins out of range."""

    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        num_anchors: int,
        channels: int,
        num_convs: int,
        norm: str | None,
        prior: float,
        scaled_levels: int | None = None,
        outputs: Outputs = Outputs(),  # noqa: B008  # it cannot change
    ) -> None:
        super().__init__()
        quality, bins, guided = outputs
        if not 0 < prior < 1:
            problem = f"{prior} is no probability - give a number between 0 and 1, e.g. 0.01"
            raise ConfigError(problem, code="out-of-range", key="prior")
        if bins is not None and not 2 <= bins <= 1000:
            problem = f"{bins} is no distribution - give 2 to 1000, e.g. 17, or null"
            raise ConfigError(problem, code="out-of-range", key="box_bins")
        self.bins = bins
        tower: dict[str, Any] = {"channels": channels, "num_convs": num_convs, "num_anchors": num_anchors}
        self.classification = Tower(in_channels, norm=norm, num_outputs=num_classes, **tower)
        self.box = Tower(in_channels, norm=norm, num_outputs=4 * (bins or 1), quality=quality, **tower)
        self.scales = nn.Parameter(torch.ones(scaled_levels)) if scaled_levels is not None else None
        self.guide = GuidedQuality(bins) if guided else None
        assert self.classification.predict.bias is not None
        nn.init.constant_(self.classification.predict.bias, -math.log((1 - prior) / prior))

    def start_from_anchors(self, sides: Float[Tensor, "A 2"]) -> None:
        """Sets the biases of the distributions so that every predicted box starts as its anchor, as with deltas.

        sides: widths and heights of a cell's anchors, in strides. Without this, every box starts R - 1 strides wide.
        Small objects, whose anchors are few, then wait long for a box that fits."""
        assert self.bins is not None
        assert self.box.predict.bias is not None
        with torch.no_grad():
            self.box.predict.bias.copy_(even_distribution(0.5 * sides.repeat(1, 2), self.bins).flatten())

    def forward(
        self, features: tuple[Float[Tensor, "B C _ _"], ...], masks: Masks | None = None
    ) -> tuple[tuple[Float[Tensor, "B A_l K"], ...], tuple[Float[Tensor, "B A_l _"], ...], tuple[Tensor, ...]]:
        """Class logits, box numbers (4 or 4 R), and quality logits (empty without the branch), each per level.

        masks: of each level, 1 in the cells that images cover, beyond which `features` are zero; None: in all."""
        masks = masks or (None,) * len(features)
        logits, _ = self.classification(features, masks)
        boxes, quality = self.box(features, masks)
        if self.scales is not None:
            boxes = tuple(level * scale for level, scale in zip(boxes, self.scales.unbind(), strict=True))
        if self.guide is not None:
            logits = tuple(self.guide(level, sides) for level, sides in zip(logits, boxes, strict=True))
        return logits, boxes, quality
