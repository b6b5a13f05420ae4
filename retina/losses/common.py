"""What the losses share: precision, targets of either kind, weights of classes, and the last sum.

Logits are (N, C, d1, d2, ...) as in torch: the class axis is 1, or 0 if there is no other. What a target says is looked
at on a CPU only, where that costs no waiting.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retina.ops.kernels.elementwise_cpu import Terms, fused, is_fusable


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def class_axis(logits: Tensor) -> int:
    return min(1, logits.dim() - 1)


def element_targets(logits: Tensor, targets: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Targets of the logits' shape as numbers in [0, 1], in float32 at least, and which of them count (None: all).

    Floating-point targets may be soft. Integers are 0, 1 or `ignore_index`, which is given back as 0.

    Raises ValueError for another shape, and for values out of range; on other devices than a CPU these become NaN, and
    so does the loss.
    """
    if targets.shape != logits.shape:
        raise ValueError(f"targets must have the shape of the logits {list(logits.shape)}, got {list(targets.shape)}")
    counted = None
    allowed = "in [0, 1]"
    if ignore_index is not None and not targets.is_floating_point() and targets.dtype != torch.bool:
        targets = targets.long()  # or uint8 would take -100 for 156
        counted = targets != ignore_index
        targets = torch.where(counted, targets, 0)
        allowed = f"0, 1 or ignore_index {ignore_index}"
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if is_fusable(logits, targets) and targets.numel():
        values = targets.to(dtype)
        low, high = values.aminmax()
        if low >= 0 and high <= 1:  # NaN is neither
            return values, counted
    wrong = ~((targets >= 0) & (targets <= 1))
    refuse(wrong, targets, f"targets of the logits' shape must be {allowed}")
    return targets.to(dtype).masked_fill(wrong, torch.nan), counted


def class_indices(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Class indices as int64 with a class axis of length 1, 0 where ignored; and which of them are not.

    Args:
        targets: integers (N, d1, ...) or (N, 1, d1, ...) for logits (N, C, d1, ...), in 0..C-1 or `ignore_index`.

    Raises ValueError for another shape or dtype, or a class out of range. (Not on a GPU, where the device's own
    assertion stops the program, as in torch's cross entropy.)
    """
    axis, whole = class_axis(logits), list(logits.shape)
    positions, single = whole[:axis] + whole[axis + 1 :], [*whole[:axis], 1, *whole[axis + 1 :]]
    if logits.dim() == 0 or list(targets.shape) not in (positions, single):
        raise ValueError(
            f"targets must have the shape of the logits {whole}, or be class indices of shape {positions} or {single}, "
            f"got {list(targets.shape)}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"class indices must be integers, got {targets.dtype}")
    targets = targets.reshape(single).long()
    counted = targets != ignore_index
    wrong = counted & ((targets < 0) | (targets >= whole[axis]))
    refuse(wrong, targets, f"class indices must be in 0..{whole[axis] - 1} or ignore_index {ignore_index}")
    return torch.where(counted, targets, 0), counted


def refuse(wrong: Tensor, values: Tensor, message: str) -> None:
    """Raises ValueError where `wrong` is true anywhere.

    Silent on a GPU, which should not wait, and within `torch.compile` and `torch.func.vmap`, where values are unknown.
    """
    if wrong.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
        return
    if wrong.any():
        raise ValueError(f"{message}, got {values[wrong][0].item():g}")


def along_classes(values: Tensor, logits: Tensor, name: str) -> Tensor:
    """One value per class, on the logits' device and shaped to be multiplied with them.

    Raises ValueError if there are more or fewer of them than classes."""
    if logits.dim() == 0:
        raise ValueError(f"{name} per class needs logits with a class axis, got a single number")
    axis = class_axis(logits)
    if list(values.shape) != [logits.shape[axis]]:
        raise ValueError(f"{name} must have one value per class, {logits.shape[axis]}, got shape {list(values.shape)}")
    return values.to(logits.device, logits.dtype).reshape([-1 if i == axis else 1 for i in range(logits.dim())])


def per_class(values: Tensor | Sequence[float], name: str, *, high: float | int = math.inf) -> Tensor:
    """One number per class as a float tensor with all its digits, for logits of any precision.

    Raises ValueError unless all are finite and in [0, high]."""
    if not (isinstance(values, Tensor) and values.is_floating_point()):
        values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"{name} must be one number per class, got shape {list(values.shape)}")
    refuse(~((values >= 0) & (values <= high) & values.isfinite()), values, f"{name} must be {_range(0, high)}")
    return values


def check_range(name: str, value: float | int, low: float | int = 0, high: float | int = math.inf) -> None:
    """Raises ValueError unless the number is finite and in [low, high]."""
    if not low <= value <= high or value == math.inf:
        raise ValueError(f"{name} must be {_range(low, high)}, got {value}")


def _range(low: float | int, high: float | int) -> str:
    return f"finite and at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"


def reduce_loss(loss: Tensor, reduction: str, divisor: Tensor | int) -> Tensor:
    """The loss itself for "none", else its sum; divided by the divisor for "mean" (by 1 if that is 0: nothing counted).

    Raises ValueError for another word."""
    check_reduction(reduction)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if isinstance(divisor, Tensor):
        return total / torch.where(divisor == 0, 1, divisor)
    return total / max(1, divisor)


def fused_loss(
    terms: Terms, plain: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, reduction: str
) -> Tensor:
    """A loss of every logit from its closed form, reduced as `reduce_loss` does where all of them count."""
    check_reduction(reduction)
    loss = fused(terms, plain, logits, targets, summed=reduction != "none")
    return loss / max(1, logits.numel()) if reduction == "mean" else loss


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, got {reduction!r}")


class LossModule(nn.Module):
    """A function of logits and targets with its settings, which are attributes of the module as well.

    Raises ValueError for a `reduction` other than none, sum and mean."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        check_reduction(settings.get("reduction", "none"))
        self._names = tuple(settings)
        for name, value in settings.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.function(logits, targets, **self.settings())

    def extra_repr(self) -> str:
        settings = {n: value.tolist() if isinstance(value, Tensor) else value for n, value in self.settings().items()}
        return ", ".join(f"{name}={value}" for name, value in settings.items())


class SoftTargetLoss(LossModule):
    """A loss of targets of the logits' shape, which are in [0, 1]."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits, element_targets(logits, targets)[0])


# Logits of probabilities, for models that end in a sigmoid or a softmax: so every loss of logits takes those too.
#
# From the smallest normal number of float32 (float64 for that dtype) to the greatest number below 1, the loss is that
# of the exact logit up to rounding. At 0 (for a sigmoid, at 1 too) it is that of the smallest number, with logit -87.3
# in float32. The gradient is always finite: it is 0 for probabilities that are no normal numbers of their own dtype,
# where 1 / p might overflow and the saturated sigmoid or softmax below would make it 0 anyway.
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


class FromSigmoid(nn.Module):
    """Another loss, for a model that ends in a sigmoid: takes probabilities and gives the loss `logits_of_sigmoid`."""

    to_logits = staticmethod(logits_of_sigmoid)

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.to_logits(probabilities), targets)


class FromSoftmax(FromSigmoid):
    """Another loss, for a model that ends in a softmax: takes probabilities and gives the loss `logits_of_softmax`."""

    to_logits = staticmethod(logits_of_softmax)
