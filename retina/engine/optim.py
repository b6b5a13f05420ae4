"""What the update needs beside the gradient: parameter groups, learning-rate schedules, gradient scaling."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retina.engine.config import Length, to_steps
from retina.errors import ConfigError, check


@runtime_checkable
class Schedule(Protocol):
    """A learning-rate schedule is a pure function of the step, so that resume needs no state of it."""

    def __call__(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        """Factor on the base learning rate for the update with this 0-based number."""
        ...


def constant(step: int, *, total: int, steps_per_epoch: int) -> float:
    """The schedule that leaves the learning rate as it is."""
    return 1.0


def as_schedule(schedule: Schedule | Callable[[int], float]) -> Schedule:
    """The schedule itself, or one made of a function of the step alone."""
    parameters = inspect.signature(schedule).parameters
    if "total" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return schedule  # type: ignore[return-value]
    plain: Callable[[int], float] = schedule  # type: ignore[assignment]
    return lambda step, *, total, steps_per_epoch: plain(step)


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """Linear warm-up, then a constant rate multiplied by `gamma` at each milestone (arXiv 1708.02002, section 4.1)."""

    warmup: Length = 500
    warmup_factor: float = 0.001
    milestones: Sequence[Length] = (8 / 12, 11 / 12)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check_numbers(warmup_factor=self.warmup_factor, gamma=self.gamma)
        for milestone in self.milestones:
            to_steps(milestone, key="milestones", total=1000, steps_per_epoch=100)
        _warmup(0, self.warmup, 0.0, total=1000, steps_per_epoch=100)

    def __call__(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        run = {"steps_per_epoch": steps_per_epoch, "total": total}
        num_passed = sum(step >= to_steps(m, key="milestones", **run) for m in self.milestones)
        return _warmup(step, self.warmup, self.warmup_factor, **run)[1] * self.gamma**num_passed


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `final_factor` (Loshchilov and Hutter, arXiv 1608.03983)."""

    warmup: Length = 500
    warmup_factor: float = 0.001
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(warmup_factor=self.warmup_factor, final_factor=self.final_factor)
        _warmup(0, self.warmup, 0.0, total=1000, steps_per_epoch=100)

    def __call__(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        start, factor = _warmup(step, self.warmup, self.warmup_factor, total=total, steps_per_epoch=steps_per_epoch)
        progress = min(1.0, max(0.0, (step - start) / max(1, total - start)))
        return factor * (self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress)))


def _check_numbers(**values: float) -> None:
    for name, value in values.items():
        check(value >= 0, name, value, "give 0 or more")


def _warmup(step: int, warmup: Length, start: float, *, total: int, steps_per_epoch: int) -> tuple[int, float]:
    """Steps of the warm-up, and its factor, which rises from `start` to 1."""
    steps = to_steps(warmup, steps_per_epoch=steps_per_epoch, total=total, key="warmup") if warmup else 0
    return steps, 1.0 if step >= steps else start + (1 - start) * (step + 1) / (steps + 1)


def build_optimizer(optimizer: Callable[..., Optimizer], model: nn.Module, *, scale: float = 1.0) -> Optimizer:
    """`optimizer(groups)`, a class or a function, with its learning rate multiplied by `scale`.

    Only convolution and linear weights are decayed: norms and biases, all the one-dimensional parameters, are not.
    It is fused, if it can be and its arguments leave that open.

    Raises ConfigError when nothing is left to train or the optimizer refuses its values."""
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    norms_and_biases = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    if not weights:
        fix = "freeze less, as with a smaller frozen_stages"
        raise ConfigError(f"nothing is left to train - {fix}", code="nothing-to-train", key="model")
    open_arguments = {name for name, p in inspect.signature(optimizer).parameters.items() if p.default is None}
    fused = {"fused": True} if {"fused", "foreach"} <= open_arguments else {}
    try:
        groups = [{"params": weights}, {"params": norms_and_biases, "weight_decay": 0.0}]
        instance = optimizer(groups, **fused)
    except (TypeError, ValueError) as fault:
        raise ConfigError(f"{fault} - correct this value", code="wrong-value", key="optimizer") from None
    for group in instance.param_groups:
        group["lr"] = group["initial_lr"] = group["lr"] * scale
    return instance


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Sets every group's rate to `factor` times its initial one; returns the first group's rate.

    The initial rate is `group["initial_lr"]`, as in PyTorch's own schedulers; without that key, the rate at the first
    call."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def norm_and_divisor(
    parameters: Iterable[nn.Parameter], divisor: Tensor, clip_norm: float | None
) -> tuple[Tensor, Tensor]:
    """The norm of all gradients divided by `divisor` (a scalar on the device), and the divisor that also clips that
    norm to `clip_norm`. One pass that reads the gradients; never waits for the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) / divisor
    if clip_norm is not None:
        divisor = divisor * ((norm + 1e-6) / clip_norm).clamp(min=1.0)
    return norm, divisor


@torch.no_grad()
def step_where(optimizer: Optimizer, finite: Tensor, divisor: Tensor) -> None:
    """Makes the update by the gradients divided by `divisor` if `finite` is True (both scalars on the device).

    A fused optimizer divides on its way and reads on the device whether to update, so nothing waits for that.
    Others wait. So does the first update, because it creates the optimizer's state: a skipped one would leave a fused
    SGD with momentum that was never set. Fused kernels take for granted that gradients lie in memory as their
    parameters do, which autograd sees to."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if not (optimizer.state and fused) and not bool(finite):
        return
    if not fused:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
        optimizer.step()
        return
    scaled: Any = optimizer  # torch's own GradScaler hands them over by these attributes too
    scaled.grad_scale, scaled.found_inf = divisor, (~finite).float()
    optimizer.step()
    del scaled.grad_scale, scaled.found_inf


class ExponentialMovingAverage:
    """A second copy of a model whose floating-point state follows the first: e <- d e + (1 - d) w.

    The decay d grows as (1 + t) / (10 + t) up to `decay`, so that the random start is soon forgotten. Buffers that are
    integers (counters) are copied. The model must stay where it is: its tensors are changed in place only."""

    floating: list[Tensor]
    """The averaged tensors."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.floating, self._counters = _by_kind(self.model)
        self._followed, self._followed_counters = _by_kind(model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """`step` is the 0-based number of the update just made."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.floating, self._followed, 1 - decay)
        if self._counters:
            torch._foreach_copy_(self._counters, self._followed_counters)


def _by_kind(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a model's state, floating-point ones and others."""
    values = list(model.state_dict().values())
    return [v for v in values if v.is_floating_point()], [v for v in values if not v.is_floating_point()]
