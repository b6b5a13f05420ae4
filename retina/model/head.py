"""Classification and box towers, shared over pyramid levels (Lin et al., arXiv 1708.02002, section 4)."""

import math

from jaxtyping import Float
from torch import Tensor, nn

from retina.errors import ConfigError


class Tower(nn.Module):
    """`num_convs` 3x3 convolutions with ReLU (GroupNorm between them as an option), then one 3x3 convolution that gives
    `num_outputs` numbers for each of a cell's anchors. Weights N(0, 0.01), biases 0."""

    def __init__(
        self, in_channels: int, *, channels: int, num_convs: int, norm: str | None, num_anchors: int, num_outputs: int
    ) -> None:
        super().__init__()
        if norm not in (None, "group"):
            raise ConfigError(f"model.head_norm: {norm!r} is not known - choose null or group")
        layers: list[nn.Module] = []
        for i in range(num_convs):
            layers.append(nn.Conv2d(channels if i else in_channels, channels, 3, padding=1, bias=norm is None))
            if norm:
                layers.append(nn.GroupNorm(math.gcd(32, channels), channels))
            layers.append(nn.ReLU(inplace=True))
        self.convs = nn.Sequential(*layers)
        self.predict = nn.Conv2d(channels if num_convs else in_channels, num_anchors * num_outputs, 3, padding=1)
        self.num_outputs = num_outputs
        for layer in (*self.convs, self.predict):
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, features: tuple[Float[Tensor, "B C _ _"], ...]) -> tuple[Float[Tensor, "B A_l _"], ...]:
        """One entry per level, anchors in the order [H W cell-anchor]: in channels_last memory that is a free view."""
        maps = (self.predict(self.convs(feature)) for feature in features)
        return tuple(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.num_outputs) for x in maps)


class Head(nn.Module):
    """A tower for class logits and one for box deltas.

    The last classification bias is -log((1 - prior) / prior), so that at the start every anchor scores `prior` and the
    many easy negatives do not swamp the first steps (section 3.3 of the paper)."""

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
    ) -> None:
        super().__init__()
        if not 0 < prior < 1:
            raise ConfigError(f"model.prior: {prior} is no probability - give a number between 0 and 1, e.g. 0.01")
        tower = {"channels": channels, "num_convs": num_convs, "num_anchors": num_anchors}
        self.classification = Tower(in_channels, norm=norm, num_outputs=num_classes, **tower)
        self.box = Tower(in_channels, norm=norm, num_outputs=4, **tower)
        assert self.classification.predict.bias is not None
        nn.init.constant_(self.classification.predict.bias, -math.log((1 - prior) / prior))

    def forward(
        self, features: tuple[Float[Tensor, "B C _ _"], ...]
    ) -> tuple[tuple[Float[Tensor, "B A_l K"], ...], tuple[Float[Tensor, "B A_l 4"], ...]]:
        return self.classification(features), self.box(features)
