"""Numbers on the device that the host reads late: means between two logged lines, and flags of updates."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from retina.engine.step import StepResult

NUM_SUMS = 5
"""Numbers that a meter sums: updates, the two losses, positives, the gradient's norm."""


class Meter:
    """Collects what each update reports; `read` gives the means since the last `read`.

    The sums stay on the device, so a step never waits for the one before it. Time inside `paused` (evaluation,
    checkpoints) does not count."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: Tensor | None = None
        self._images = 0
        self._waited = self._paused = 0.0
        self._started = time.perf_counter()

    def add(self, result: StepResult, num_images: int) -> None:
        """The losses of a skipped update do not count, its images (of all ranks) do."""
        count = result.updated.view(1).float()
        numbers = torch.cat([count, result.losses, result.positives.view(1), result.grad_norm.view(1)])
        numbers = torch.where(result.updated, numbers, 0)
        self._sums = numbers if self._sums is None else self._sums + numbers
        self._images += num_images

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
        self._sums = torch.tensor(state, device=device) if state else None

    def read(self) -> dict[str, float]:
        """Loss parts per positive anchor, positives per step, gradient norm, images/s of all ranks and the share of the
        time spent waiting for data. Waits for the device. Empty without an update; then the sums stay."""
        updates, *sums = [0.0] if self._sums is None else self._sums.tolist()
        if not updates:
            return {}
        classification, box, positives, norm = (value / updates for value in sums)
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        speed = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self._reset()
        losses = {"loss": classification + box, "loss_classification": classification, "loss_box": box}
        return losses | {"positives": positives, "grad_norm": norm} | speed


T = TypeVar("T")

LAG = {"cuda": 2}
"""Steps by which a GPU may be behind. Elsewhere a step is over when it returns."""


class PendingFlags(Generic[T]):
    """Flags on their way from the device to the host, each with the item it belongs to, in order.

    Every flag is read exactly `lag` additions later, or when all are asked for. So the host seldom waits, and what it
    does about a flag depends on the step alone, not on how fast the device is."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, T]] = deque()

    def add(self, flag: Tensor, item: T) -> None:
        """`flag` is a bool scalar."""
        event = None
        if flag.device.type == "cuda":
            flag = flag.to("cpu", non_blocking=True)  # into pinned memory, so nothing waits
            event = torch.cuda.Event()
            event.record()
        self._pending.append((flag, event, item))

    def take(self, *, everything: bool = False) -> Iterator[tuple[bool, T]]:
        """The flags that are old enough, oldest first."""
        while len(self._pending) > (0 if everything else self.lag):
            flag, event, item = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield bool(flag.cpu().numpy()), item
