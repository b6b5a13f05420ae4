"""What a training step makes the host wait for, and how many operations it dispatches, counted and not timed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import make_batch, our_step, torchvision_step
from benchmarks.torchvision_model import pair
from retina.lab.clock import Bench, Row, absolute
from retina.ops.kernels import focal_cpu

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "is_nonzero", "equal.default")
"""Operations whose result the host must have before it can go on; so it is with indexing by a mask."""
INDEXING = ("index.", "index_put", "_index_put", "_unsafe_index")
MASKS = (torch.bool, torch.uint8)


class Operations(TorchDispatchMode):
    """Counts what is dispatched; `waiting` counts what has a shape or value that the host needs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.waiting = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.total += 1
        name = str(func).removeprefix("aten.")
        by_mask = name.startswith(INDEXING) and any(i is not None and i.dtype in MASKS for i in args[1])
        self.waiting += name.startswith(WAITING) or by_mask
        return func(*args, **(kwargs or {}))


def run(bench: Bench) -> list[Row]:
    # no smaller: on maps of one cell, torch's weight gradients of a strided convolution in bfloat16 are left to chance
    # on a CPU (2.14.1), and a step whose gradients are not finite is left out
    height, width = (128, 128) if bench.quick else (256, 256)
    model, reference = pair(device=bench.device)
    batches = [make_batch(images, height, width, bench.device) for images in (2, 3)]
    chunk = focal_cpu.CHUNK
    focal_cpu.CHUNK = 2**40  # as on a GPU; a CPU computes the loss in chunks, the more the more images
    try:
        counted = {
            "ours": [count(our_step(model, batch, torch.bfloat16)) for batch in batches],
            "reference": [count(torchvision_step(reference, batch, amp=False)) for batch in batches],
        }
    finally:
        focal_cpu.CHUNK = chunk
    measures = (
        ("operations that wait for the device, per step of two images", None, 0.0),
        ("operations that wait for the device, per further image", 0.0, 0.0),
        ("operations dispatched, per further image", 0.0, 0.0),
        ("operations dispatched, per step of two images", None, None),
    )
    values = [
        (two.waiting, three.waiting - two.waiting, three.total - two.total, two.total)
        for two, three in (counted["ours"], counted["reference"])
    ]
    return [
        replace(absolute(name, float(value), must=must, goal=goal), reference=float(reference))
        for (name, must, goal), value, reference in zip(measures, *values, strict=True)
    ]


def count(step: Callable[[], object]) -> Operations:
    """Of the second step: the first makes the optimizer's state and the anchors."""
    step()
    with Operations() as operations:
        step()
    return operations
