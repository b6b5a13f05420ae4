"""Quality of a box, read from the shape of its predicted distributions. Beside the road."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retina.errors import ConfigError
from retina.ops.joint_scores import product_logits

_HIGHEST = 4
"""Bins of a side whose probabilities are looked at."""
_HIDDEN = 64


class GuidedQuality(nn.Module):
    """Multiplies class scores by a quality in 0..1 that tells a sharp distribution of box sides from a flat one.

    Of each side, the 4 highest probabilities and their mean go through 20 -> 64 -> 1 fully connected layers with a
    ReLU between and a sigmoid behind. Weights are drawn from N(0, 0.01), biases are 0: every quality starts near 0.5.

    Raises ConfigError for fewer than 4 bins.
    Source: Li et al., Generalized Focal Loss V2, CVPR 2021, section 3.2; the authors' code (gfocal_head.py), whose 1x1
    convolutions are these layers."""

    def __init__(self, bins: int | None) -> None:
        super().__init__()
        if bins is None or bins < _HIGHEST:
            problem = (
                f"reads {_HIGHEST} bins of a distribution, there are {bins or 'none'} - give box_bins=17, or false"
            )
            raise ConfigError(problem, code="contradiction", key="guided_quality")
        self.hidden, self.out = nn.Linear(4 * (_HIGHEST + 1), _HIDDEN), nn.Linear(_HIDDEN, 1)
        for layer in (self.hidden, self.out):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, logits: Float[Tensor, "B A_l K"], sides: Float[Tensor, "B A_l _"]) -> Float[Tensor, "B A_l K"]:
        """The logits of the multiplied scores. sides: logits of the bins of all four sides of each box."""
        dtype = torch.promote_types(sides.dtype, torch.float32)
        highest = sides.unflatten(-1, (4, -1)).softmax(dim=-1, dtype=dtype).topk(_HIGHEST, dim=-1).values
        statistics = torch.cat((highest, highest.mean(dim=-1, keepdim=True)), dim=-1).flatten(-2)
        return product_logits(logits, self.out(self.hidden(statistics).relu()))
