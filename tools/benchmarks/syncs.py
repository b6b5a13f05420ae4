"""What a training step makes the host wait for, and how many operations it dispatches, counted and not timed."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import make_batch, our_step, torchvision_step
from benchmarks.torchvision_model import pair
from retina.lab.clock import Bench, Row
from retina.ops.kernels import focal_cpu

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "is_nonzero", "equal.default")
"""Operations whose result the host must have before it can go on."""


class Operations(TorchDispatchMode):
    """Counts what is dispatched; `waiting` has those whose shape or value the host needs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.waiting: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.total += 1
        name = str(func).removeprefix("aten.")
        if name.startswith(WAITING) or self._indexes_by_mask(name, args):
            self.waiting[name] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _indexes_by_mask(name: str, args: tuple[Any, ...]) -> bool:
        if not name.startswith(("index.", "index_put", "_index_put", "_unsafe_index")):
            return False
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def run(bench: Bench) -> list[Row]:
    height, width = (128, 128) if bench.quick else (256, 256)
    ours, theirs = pair()
    ours.to(bench.device).to(memory_format=torch.channels_last)
    theirs.to(bench.device)
    batches = [make_batch(images, height, width, bench.device) for images in (2, 4)]
    chunk = focal_cpu._CHUNK
    focal_cpu._CHUNK = 2**40  # as on a GPU; a CPU computes the loss in chunks, the more the more images
    try:
        counted = {
            "ours": [count(our_step(ours, batch, torch.bfloat16)) for batch in batches],
            "reference": [count(torchvision_step(theirs, batch, amp=False)) for batch in batches],
        }
    finally:
        focal_cpu._CHUNK = chunk
    values: dict[str, list[float]] = {}
    for side, (two, four) in counted.items():
        values[side] = [
            float(two.waiting.total()),
            (four.waiting.total() - two.waiting.total()) / 2,
            (four.total - two.total) / 2,
            float(two.total),
        ]
    names = (
        "operations that wait for the device, per step of two images",
        "operations that wait for the device, per further image",
        "operations dispatched, per further image",
        "operations dispatched, per step of two images",
    )
    bars = ((None, 0.0), (0.0, 0.0), (0.0, 0.0), (None, None))
    return [
        Row(measure=name, ours=one, reference=other, unit="", ratio=one, must=must, goal=goal, lower_is_better=True)
        for name, one, other, (must, goal) in zip(names, values["ours"], values["reference"], bars, strict=True)
    ]


def count(step: Callable[[], object]) -> Operations:
    """Of the third step: the first makes the optimizer's state and the anchors."""
    step()
    step()
    with Operations() as operations:
        step()
    return operations
