"""Kernels, waits, memory and traffic of a steady training step on a null CUDA device, which computes nothing: `make
null-gpu`. Counted exactly but for the traffic, and nothing is timed: see docs/performance.md."""

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.step import Parts, make_batch
from retina.engine.optim import set_learning_rate
from retina.lab.clock import Bench, Row, absolute
from retina.types import Batch, Targets, to_device

NUM_CLASSES = 80
CLAIMS = ("launches", "traffic", "peak", "waits")
RECIPES: dict[str, tuple[list[str], dict[str, tuple[float, float]]]] = {
    "default": ([], {"launches": (1800, 900), "traffic": (78, 60), "peak": (7, 7), "waits": (0, 0)}),
    "paper": (["experiment=paper"], {"launches": (1000, 500), "waits": (0, 0)}),
}
"""By name the words of `tools/train.py`, and the bars (must, goal)."""
WRITES_ONLY = ("copy_", "fill_", "zero_", "uniform_", "normal_", "random_")
READ_TWICE = ("retina::group_norm", "retina::group_norm_backward")
"""Operations that read their maps once more than the tensors they are given say."""


class Counts(NamedTuple):
    launches: int
    waits: int
    peak: float
    """GB allocated."""
    traffic: float
    """GB moved by operations beside the convolutions."""
    kernels: list[tuple[int, str]]
    """Launches by kernel, most first."""
    moved: Counter[str]
    """Bytes by operation."""


def run(bench: Bench) -> list[Row]:
    """No rows elsewhere than on the null device."""
    if bench.device.type != "cuda" or importlib.util.find_spec("nullgpu") is None:
        return []
    images, height, width = (2, 256, 256) if bench.quick else (16, 800, 1088)
    units = {"launches": "", "traffic": "GB", "peak": "GB", "waits": ""}
    rows = []
    for name, (words, bars) in RECIPES.items():
        counts = count(words, images, height, width)
        for claim in CLAIMS:
            must, goal = bars.get(claim, (None, None))
            measure = f"{name} recipe bf16, {images} x {height} x {width}: {claim}"
            rows.append(absolute(measure, float(getattr(counts, claim)), units[claim], must=must, goal=goal))
    return rows


def count(words: list[str], images: int, height: int, width: int, *, accumulate: int = 1) -> Counts:
    """Of a step of a recipe as from published weights (fixed statistics, two frozen stages), after some before it.

    Raises RuntimeError where the step waits for the device."""
    nullgpu: Any = importlib.import_module("nullgpu")
    nullgpu.quiet()
    step, load = steady_step(words, images, height, width, accumulate)
    for _ in range(2):
        step(load())
    batches, traffic = load(), Traffic(nullgpu)
    with traffic:
        step(batches)
    del batches
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    nullgpu.reset()
    step(load())
    counts = nullgpu.counts()
    torch.cuda.set_sync_debug_mode("default")
    return Counts(
        nullgpu.launches() + counts["triton"],
        sum(counts[name] for name in nullgpu.WAITS),
        torch.cuda.max_memory_allocated() / 1e9,
        sum(traffic.moved.values()) / 1e9,
        nullgpu.kernels(),
        traffic.moved,
    )


def steady_step(
    words: list[str], images: int, height: int, width: int, accumulate: int
) -> tuple[Callable[[list[Batch]], object], Callable[[], list[Batch]]]:
    """An update of the recipe, and what loads its micro-batches as the training loop does."""
    device = torch.device("cuda", 0)
    parts, cpu = Parts.of(words, device, NUM_CLASSES), torch.device("cpu")
    batches = [_pinned(make_batch(images, height, width, cpu, NUM_CLASSES)) for _ in range(accumulate)]

    def step(micro_batches: list[Batch]) -> object:
        set_learning_rate(parts.optimizer, 1.0)
        return parts.step(micro_batches, torch.bfloat16)()

    return step, lambda: [to_device(batch, device) for batch in batches]


def _pinned(batch: Batch) -> Batch:
    images, sizes, targets, *rest = batch
    return Batch(images.pin_memory(), sizes.pin_memory(), Targets(*(x.pin_memory() for x in targets)), *rest)


class Traffic(TorchDispatchMode):
    """Bytes of device memory that operations beside convolutions move: every operation that launches something is taken
    to read each tensor it is given, and to write each it returns or changes, once. A convolution's bias is added by a
    pass of its own. Operations that look at a part (gather, index) count in full."""

    def __init__(self, nullgpu: Any) -> None:
        super().__init__()
        self._nullgpu = nullgpu
        self.moved: Counter[str] = Counter()

    def _launched(self) -> int:
        counts = self._nullgpu.counts()
        return sum(counts[name] for name in ("torch", "triton", "library", "d2d", "memset"))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        before = self._launched()
        result = func(*args, **(kwargs or {}))
        if self._launched() > before:
            self._account(func, args, kwargs or {}, result)
        return result

    def _account(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        schema = function._schema
        read: list[Tensor] = []
        written: list[Tensor] = []
        for i, argument in enumerate(schema.arguments):
            given = _on_device(args[i] if i < len(args) else kwargs.get(argument.name))
            changes = argument.alias_info is not None and argument.alias_info.is_write
            written += given if changes else []
            read += [] if changes and (argument.kwarg_only or schema.name.endswith(WRITES_ONLY)) else given
        written += [x for x in _on_device(result) if not any(x is y for y in written)]
        if schema.name == "aten::convolution":
            self.moved["bias of convolutions"] += 2 * _size(written[0]) if args[2] is not None else 0
        elif schema.name == "aten::convolution_backward":
            self.moved["gradient of biases"] += _size(args[0]) if args[-1][2] else 0
        else:
            again = [x for x in read if x.dim() == 4] if schema.name in READ_TWICE else []
            self.moved[schema.name] += sum(map(_size, [*read, *again, *written]))


def _on_device(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_cuda]


def _size(tensor: Tensor) -> int:
    """Bytes of memory under it: an expanded tensor is read once."""
    number = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= length if stride else 1
    return number * tensor.element_size()
