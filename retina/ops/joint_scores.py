"""Logits of scores that are made of two probabilities, so that every loss and threshold may go on taking logits. Beside
the road.

With a = sigmoid(x) and b = sigmoid(y): 1 - a b = (1 - a) + a (1 - b), which no rounding makes 0 for logits that are
finite."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def product_logits(x: Float[Tensor, "*#shape"], y: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """The logit of a b. float32 for narrower logits."""
    log_product, log_rest = _logs(x, y)
    return log_product - log_rest


def geometric_mean_logits(x: Float[Tensor, "*#shape"], y: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """The logit of p = sqrt(a b). float32 for narrower logits.

    1 - p = (1 - a b) / (1 + p)."""
    log_product, log_rest = _logs(x, y)
    log_mean = 0.5 * log_product
    return log_mean - log_rest + log_mean.exp().log1p()


def _logs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """log a b, log (1 - a b)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    log_a = F.logsigmoid(x)
    return log_a + F.logsigmoid(y), torch.logaddexp(F.logsigmoid(-x), log_a + F.logsigmoid(-y))
