"""Losses of every logit by itself on a CPU: value and slope from one pass over the logits, in chunks that stay in the
cache. A function of torch's operations reads and writes all of the memory some thirty times for the same.

With x a logit, y its target, e = exp(-|x|), p = 1 / (1 + exp(-x)), q = 1 - p, and no difference of numbers that are
nearly equal:

    BCE(p, y)      = log(1 + e) + y max(-x, 0) + (1 - y) max(x, 0)          slope   p - y = (1 - y) p - y q
    1 - p_t        = (1 - y) p + y q                                        slope   p q (1 - 2 y)
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from retina.ops.kernels.focal_cpu import CHUNK, empty_like, focal_terms

Chunk = Float[Tensor, "n"]
_NUM_BUFFERS = 8
_LEAST_PROBABILITY = 1e-30  # below it, float32 loses digits


Terms = Callable[[Chunk, Chunk, Chunk, Chunk, Sequence[Chunk]], None]
"""A loss as a closed form. Of logits and targets it writes the loss, and its slope against the logits, into the third
and the fourth tensor; whatever the buffers hold, and then will hold, is of no use."""


def is_fusable(logits: Tensor, targets: Tensor) -> bool:
    """Whether the closed form may take the place of the plain one: on a CPU, for derivatives by the logits alone, and
    with no compiler or transformation of `torch.func` that wants to see torch's operations."""
    return (
        logits.device.type == "cpu"
        and targets.device.type == "cpu"
        and not targets.requires_grad
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def fused(
    terms: Terms,
    plain: Callable[[Tensor, Tensor], Tensor],
    logits: Float[Tensor, "*shape"],
    targets: Float[Tensor, "*shape"],
    *,
    summed: bool,
) -> Float[Tensor, "..."]:
    """The loss of every logit, or the sum of them. `plain` is the same in torch's operations, not summed: second
    derivatives are taken of it. Logits and targets are of one dtype, float32 or float64."""
    return _Fused.apply(logits, targets, terms, plain, summed)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, terms: Terms, plain: Any, summed: bool) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.plain = plain
        x, y = logits.reshape(-1), targets.reshape(-1)
        ctx.grad = empty_like(x, x.dtype) if ctx.needs_input_grad[0] else None
        losses = None if summed else empty_like(x, x.dtype)
        length = min(len(x), CHUNK * torch.get_num_threads())
        buffers = [x.new_empty(length) for _ in range(_NUM_BUFFERS + 2)]
        outs = (repeat(None) if out is None else out.split(length or 1) for out in (losses, ctx.grad))
        sums = []
        for part, target, loss, slope in zip(x.split(length or 1), y.split(length or 1), *outs, strict=False):
            if len(part) < length:
                buffers = [buffer[: len(part)] for buffer in buffers]
            loss = buffers[-1] if loss is None else loss
            terms(part, target, loss, buffers[-2] if slope is None else slope, buffers[:_NUM_BUFFERS])
            if summed:
                sums.append(loss.sum())
        if losses is not None:
            return losses.view(logits.shape)
        return torch.stack(sums).sum() if sums else x.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the derivative of the derivative
            loss = ctx.plain(logits, targets)
            grad = torch.autograd.grad(loss, logits, upstream.expand_as(loss), create_graph=True)[0]
        elif torch._C._autograd._get_current_graph_task_keep_graph():
            grad = ctx.grad.view(logits.shape) * upstream
        else:
            grad, ctx.grad = ctx.grad.view(logits.shape), None  # autograd takes the tensor over, and need not copy
            grad = grad if upstream.dim() == 0 and upstream == 1 else grad.mul_(upstream)
        return grad, None, None, None, None


def log_softmax_of_classes(
    logits: Float[Tensor, "*shape"], index: Int64[Tensor, "*positions"], axis: int
) -> Float[Tensor, "*positions"]:
    """`logits.log_softmax(axis).gather(axis, index)` up to rounding, for one class at each position. The exponentials
    are computed once, and become the gradient: (one-hot classes - softmax) times the upstream gradient."""
    if is_fusable(logits, index) and logits.requires_grad and torch.is_grad_enabled():
        return _LogSoftmaxOfClasses.apply(logits, index, axis)
    return logits.log_softmax(axis).gather(axis, index)


class _LogSoftmaxOfClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(logits, index)
        ctx.axis = axis
        ctx.p = logits.softmax(axis)
        p = ctx.p.gather(axis, index)
        log_p = p.log()
        if bool((p >= _LEAST_PROBABILITY).all()):
            return log_p
        return torch.where(p >= _LEAST_PROBABILITY, log_p, logits.log_softmax(axis).gather(axis, index))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, index = ctx.saved_tensors
        if torch.is_grad_enabled():
            log_p = logits.log_softmax(ctx.axis).gather(ctx.axis, index)
            return torch.autograd.grad(log_p, logits, upstream, create_graph=True)[0], None, None
        if torch._C._autograd._get_current_graph_task_keep_graph():
            grad = ctx.p * -upstream
        else:
            grad, ctx.p = ctx.p.mul_(-upstream), None
        return grad.scatter_add_(ctx.axis, index, upstream), None, None


def sigmoid_focal_terms(alpha: float | None, gamma: float) -> Terms:
    """alpha_t (1 - p_t)^gamma BCE(p, y)."""

    def terms(x: Chunk, y: Chunk, loss: Chunk, slope: Chunk, buffers: Sequence[Chunk]) -> None:
        if torch.equal(torch.mul(y, y, out=loss), y):  # all are 0 or 1
            sign, z, *buffers = buffers
            torch.mul(y, -2, out=sign).add_(1)
            torch.mul(x, sign, out=z)
            power, factor, softplus = focal_terms(z, gamma, buffers[:4])
            if alpha is not None:  # alpha_t is linear in the sign
                power.mul_(torch.mul(sign, 0.5 - alpha, out=z).add_(0.5))
            torch.mul(power, softplus, out=loss)
            torch.mul(power, factor, out=slope).mul_(sign)
            return
        wrong, rest, power, buffer = buffers[4:]
        p, q, difference, cross_entropy = _soft_terms(x, y, [*buffers[:4], rest])
        torch.addcmul(torch.mul(y, q, out=buffer), p, torch.neg(y, out=rest).add_(1), out=wrong)
        wrong.clamp_(min=torch.finfo(x.dtype).tiny)
        torch.pow(wrong, gamma - 1, out=power)
        if alpha is not None:
            power.mul_(torch.mul(y, 2 * alpha - 1, out=rest).add_(1 - alpha))
        # slope: alpha_t wrong^(gamma - 1) (gamma p q (1 - 2 y) BCE + wrong (p - y))
        torch.mul(wrong, difference, out=slope)
        p.mul_(q).mul_(cross_entropy).mul_(torch.mul(y, -2 * gamma, out=rest).add_(gamma))
        slope.add_(p).mul_(power)
        torch.mul(power.mul_(wrong), cross_entropy, out=loss)

    return terms


def quality_focal_terms(gamma: float) -> Terms:
    """|p - y|^gamma BCE(p, y). At p = y the slope is 0, also for a gamma below 1."""

    def terms(x: Chunk, y: Chunk, loss: Chunk, slope: Chunk, buffers: Sequence[Chunk]) -> None:
        distance, power = buffers[5:7]
        p, q, difference, cross_entropy = _soft_terms(x, y, buffers[:5])
        torch.abs(difference, out=distance).clamp_(min=torch.finfo(x.dtype).tiny)
        torch.pow(distance, gamma - 1, out=power)
        # slope: sign |p - y|^(gamma - 1) (gamma p q BCE + (p - y)^2)
        torch.mul(p, q, out=slope).mul_(cross_entropy).mul_(gamma).addcmul_(difference, difference)
        slope.mul_(power).mul_(difference.sign_())
        torch.mul(power.mul_(distance), cross_entropy, out=loss)

    return terms


def varifocal_terms(alpha: float, gamma: float) -> Terms:
    """y BCE(p, y) where y > 0, alpha p^gamma BCE(p, 0) where it is 0."""

    def terms(x: Chunk, y: Chunk, loss: Chunk, slope: Chunk, buffers: Sequence[Chunk]) -> None:
        weight, negative = buffers[5:7]
        p, q, difference, cross_entropy = _soft_terms(x, y, buffers[:5])
        torch.pow(p, gamma, out=negative).mul_(alpha).mul_(torch.sign(y, out=weight).neg_().add_(1))
        torch.add(y, negative, out=weight)
        # slope: weight (p - y), and for a negative the slope alpha gamma p^gamma q of its weight
        torch.mul(weight, difference, out=slope).addcmul_(negative.mul_(q), cross_entropy, value=gamma)
        torch.mul(weight, cross_entropy, out=loss)

    return terms


def _soft_terms(x: Chunk, y: Chunk, buffers: Sequence[Chunk]) -> tuple[Chunk, Chunk, Chunk, Chunk]:
    """p, q, p - y and BCE(p, y), in the first four of five buffers."""
    p, q, difference, cross_entropy, minus = buffers
    torch.log1p(torch.abs(x, out=p).neg_().exp_(), out=cross_entropy)
    torch.neg(x, out=minus)
    cross_entropy.addcmul_(torch.clamp(minus, min=0, out=p), y)
    torch.neg(y, out=difference).add_(1)
    cross_entropy.addcmul_(torch.clamp(x, min=0, out=p), difference)
    torch.sigmoid(x, out=p)
    torch.sigmoid(minus, out=q)
    difference.mul_(p).addcmul_(y, q, value=-1)
    return p, q, difference, cross_entropy
