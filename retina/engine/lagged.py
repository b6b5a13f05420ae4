"""Yes or no from the device, read some steps late, so that the host never waits for what it has just asked for."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

LAG = {"cuda": 2}
"""Steps by which a GPU may be behind. Elsewhere a step is over when it returns."""


class Lagged(Generic[T]):
    """Flags on their way to the host, each with what belongs to it, in order.

    Every flag is read exactly `lag` additions later, or when all are asked for: what is done about it depends on the
    step alone and not on how fast the device is."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, T]] = deque()

    def add(self, flag: Tensor, item: T) -> None:
        """`flag` is a bool scalar."""
        arrived = None
        if flag.device.type == "cuda":
            flag = flag.to("cpu", non_blocking=True)  # into pinned memory, so nothing waits
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append((flag, arrived, item))

    def take(self, *, everything: bool = False) -> Iterator[tuple[bool, T]]:
        """What is old enough, oldest first."""
        while len(self._waiting) > (0 if everything else self.lag):
            flag, arrived, item = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield bool(flag.cpu().numpy()), item
