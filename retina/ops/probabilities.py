"""Logits of probabilities, for models that end in a sigmoid or a softmax: so every loss of logits takes those too.

From the smallest normal number of float32 (float64 for that dtype) to the greatest number below 1, the loss is that of
the exact logit up to rounding. At 0 (for a sigmoid, at 1 too) it is that of the smallest number, with logit -87.3 in
float32. The gradient is always finite: it is 0 for probabilities that are no normal numbers of their own dtype, where
1 / p might overflow and the saturated sigmoid or softmax below would make it 0 anyway.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from retina.ops.loss_common import at_least_float32, refuse


def logits_of_sigmoid(probabilities: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log p - log(1 - p). float32 for narrower dtypes. Raises ValueError for values outside [0, 1] (on a CPU)."""
    p = _checked(probabilities)
    smallest = torch.finfo(probabilities.dtype).tiny
    return _log(p, smallest) - _log(1 - p, smallest)


def logits_of_softmax(probabilities: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log p, a logit up to a constant of the position. float32 for narrower dtypes.

    Probabilities that do not sum to 1 are scaled to it by the softmax of the loss. Raises ValueError for values outside
    [0, 1] (on a CPU)."""
    return _log(_checked(probabilities), torch.finfo(probabilities.dtype).tiny)


def _checked(probabilities: Tensor) -> Tensor:
    refuse(~((probabilities >= 0) & (probabilities <= 1)), probabilities, "probabilities must be in [0, 1]")
    return at_least_float32(probabilities)


def _log(p: Tensor, smallest: float) -> Tensor:
    """The value goes on below the smallest number at which the gradient, 1 / p, is sure to fit the probabilities."""
    log = p.clamp(min=smallest).log()
    return log + (p.detach().clamp(min=torch.finfo(p.dtype).tiny).log() - log.detach())
