"""Averages between two logged lines, read from the device only when a line is logged."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor


class Meter:
    """Collects what each update reports; `read` gives the means since the last `read`.

    The sums stay on the device, so a step never waits for the one before it. Time inside `paused` (evaluation,
    checkpoints) does not count."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self._sums: Tensor | None = None
        self._steps = 0
        self._waited = self._paused = 0.0
        self._started = time.perf_counter()

    def add(self, updated: Tensor, losses: Tensor, positives: Tensor, grad_norm: Tensor) -> None:
        """`losses` [2]: classification and box. Steps that are not `updated` (a scalar) count for nothing."""
        numbers = torch.cat([updated.view(1).float(), losses, positives.view(1), grad_norm.view(1)])
        numbers = torch.where(updated, numbers, 0)
        self._sums = numbers if self._sums is None else self._sums + numbers
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around everything that waits for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def state(self) -> list[float]:
        """Updates and sums so far, for a checkpoint: a resumed run then logs what the whole one would have."""
        return [] if self._sums is None else self._sums.tolist()

    def load_state(self, state: list[float], device: torch.device) -> None:
        if state:
            self._steps, self._sums = int(state[0]), torch.tensor(state, device=device)

    def read(self) -> dict[str, float]:
        """Loss parts per positive anchor, positives per step, gradient norm, images/s of the whole run and the share of
        time spent waiting for data. Waits for the device. Empty, and nothing is forgotten, without any update."""
        updates, *sums = [0.0] if self._sums is None else self._sums.tolist()
        if not updates:
            return {}
        classification, box, positives, norm = (value / updates for value in sums)
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        values = {
            "loss": classification + box,
            "loss_classification": classification,
            "loss_box": box,
            "positives": positives,
            "grad_norm": norm,
            "images_per_second": self._steps * self.batch_size / seconds,
            "data_wait": self._waited / seconds,
        }
        self._reset()
        return values


T = TypeVar("T")

# Yes or no from the device, read some steps late, so that the host never waits for what it has just asked for.
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
