"""The end of a run that has a budget: its length follows the speed that the machine has on the way.

Beside the road.

The length is corrected where a checkpoint is saved, and is part of it. So a run that is cut off and resumed does the
steps up to the next checkpoint bit for bit as they were, whatever the clock says."""

import time
from collections.abc import Callable
from typing import TypeVar

from retina import distributed
from retina.engine.checkpoint import Progress
from retina.engine.logging import RunLogger

T = TypeVar("T")
KEPT = 0.02
"""Share of the budget for the last checkpoint and the curves."""
MEMORY = 0.75
"""What a measured step still counts when the next ones are measured: other work on a machine comes and goes."""
TELLING = 5
"""Steps below which a measurement says nothing: the first ones are slow."""


class Deadline:
    """Decides the number of steps anew whenever it is asked.

    seconds: the budget. started: of this process, by `clock`. Earlier processes of the run count as their last
    checkpoint says; what they did after it, and the time between, do not.
    evaluation: what one costs in steps, until the first has been timed."""

    def __init__(
        self,
        seconds: float,
        started: float,
        *,
        evaluation: float = 0.0,
        recorder: RunLogger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self.recorder, self._clock = seconds, recorder or RunLogger(), clock
        self._started, self._evaluation_steps = started, evaluation
        self._evaluation: float | None = None
        self._evaluating = 0.0
        self._seconds = self._steps = 0.0
        self._measured = 0

    def begin(self, progress: Progress, total: int) -> int:
        """The number of steps in all: what the checkpoint says, or `total`."""
        self._started -= progress.seconds
        self._since, self._step = self._clock(), progress.step
        progress.total = progress.total or total
        return progress.total

    def timed(self, evaluate: Callable[..., T]) -> Callable[..., T]:
        """`evaluate`, whose time is not that of steps."""

        def run(*arguments: object) -> T:
            began = self._clock()
            result = evaluate(*arguments)
            self._evaluation = self._clock() - began
            self._evaluating += self._evaluation
            return result

        return run

    def corrected(self, progress: Progress, eval_every: int | None, ends: bool = False) -> int:
        """The number of steps in all with which the run ends on time, at least one more; the same on all ranks. It and
        the time that was taken are written into the progress. Earlier steps count less each time.

        ends: only the time is written, because the run stops or is over."""
        now = self._clock()
        seconds, steps = now - self._since - self._evaluating, progress.step - self._step
        self._since, self._step, self._evaluating = now, progress.step, 0.0
        self._seconds, self._steps = MEMORY * self._seconds + seconds, MEMORY * self._steps + steps
        self._measured += steps
        before = progress.total or progress.step
        used = now - self._started
        total = before if ends else self._fitting(progress.step, before, used, eval_every)
        progress.seconds, progress.total = distributed.broadcast_object((used, total))
        if abs(progress.total - before) > 0.05 * before:
            pace = f"a step takes {self._seconds / self._steps:.2g} s now"
            self.recorder.info(f"budget: {progress.total} steps in all instead of {before}, because {pace}")
        return progress.total

    def _fitting(self, step: int, before: int, used: float, eval_every: int | None) -> int:
        if self._measured < TELLING:
            return before
        pace = self._seconds / self._steps
        evaluation = pace * self._evaluation_steps if self._evaluation is None else self._evaluation
        if eval_every is None:
            evaluation, eval_every = 0.0, 1
        left = (1 - KEPT) * self.budget - used - evaluation
        return step + max(1, int(left / (pace + evaluation / eval_every)))
