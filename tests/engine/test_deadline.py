"""Runs with a budget on machines whose speed changes; their clock is a number, moved by each step."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from test_fit import NOTHING, loader, make_state, weights
from torch import nn

from retina.engine.checkpointer import Checkpointer, TrainState
from retina.engine.config import TrainConfig
from retina.engine.deadline import KEPT, Deadline
from retina.engine.loop import fit
from retina.evaluation.evaluate import Evaluation
from retina.losses.detection import DetectionLoss

BUDGET = 80.0
LENGTH = 40


class Machine:
    """A clock, and what the steps of a run cost on it: `paces` by the share of the budget that has passed."""

    def __init__(self, *paces: float, evaluation: float = 0.0) -> None:
        self.paces, self.evaluation, self.now = paces, evaluation, 0.0
        self.evaluated: list[int] = []
        self.factors: list[float] = []
        self.state: TrainState
        self.stop_at: int | None = None

    def stopping(self) -> int:
        """Called once for every update."""
        if self.state.progress.step == self.stop_at:
            return 15
        self.now += self.paces[min(len(self.paces) - 1, int(self.now / BUDGET * len(self.paces)))]
        return 0

    def evaluate(self, model: nn.Module) -> Evaluation:
        self.now += self.evaluation
        self.evaluated.append(self.state.progress.step)
        return Evaluation({"AP": 0.5, "AP50": 0.0, "AP75": 0.0, "AR100": 0.0}, NOTHING, {})

    def schedule(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        self.factors.append(1 - step / total)
        return self.factors[-1]

    def run(self, folder: Path | None = None, *, started: float = 0.0) -> int:
        self.state = make_state(TrainConfig(length=LENGTH, eval_every=0.2, save_every=0.05), schedule=self.schedule)
        return fit(
            self.state,
            DetectionLoss(),
            loader(),
            evaluate=self.evaluate,
            checkpointer=Checkpointer(folder, self.state),
            stopping=self.stopping,
            deadline=Deadline(BUDGET, started, evaluation=1.0, clock=lambda: self.now),
        )


@pytest.mark.parametrize(
    "machine",
    [
        Machine(2.0),
        Machine(4.0),
        Machine(1.0, evaluation=10.0),
        Machine(1.0, 3.0, evaluation=5.0),
        Machine(3.0, 1.0, 2.0, evaluation=1.0),
    ],
)
def test_a_run_ends_on_time_whatever_the_first_guess(machine: Machine) -> None:
    machine.run()
    assert 0.9 * BUDGET <= machine.now <= BUDGET
    assert machine.evaluated[-1] == machine.state.progress.step
    gaps = [after - before for before, after in zip(machine.evaluated, machine.evaluated[1:], strict=False)]
    if len(machine.paces) == 1:
        assert min(gaps, default=LENGTH) >= LENGTH * 0.2 / 2, "no two evaluations stand close together at the end"
    assert machine.factors[-1] == pytest.approx(1 / machine.state.progress.step), "annealed to the end"


def test_a_machine_as_fast_as_was_guessed_changes_nothing() -> None:
    pace = (1 - KEPT) * BUDGET / LENGTH
    machine = Machine(pace)
    machine.run()
    assert machine.state.progress.step == pytest.approx(LENGTH, abs=1)


def test_the_time_of_earlier_processes_counts_and_that_between_does_not(tmp_path: Path) -> None:
    first = Machine(2.0)
    first.stop_at = 15
    assert first.run(tmp_path) == 15
    second = Machine(4.0)
    second.now = 10_000.0
    assert second.run(tmp_path, started=10_000.0) == 0
    assert 0.9 * BUDGET <= first.now + second.now - 10_000.0 <= BUDGET


def test_steps_up_to_the_next_checkpoint_are_the_same_whatever_the_clock_says(tmp_path: Path) -> None:
    reference = Machine(3.0)
    reference.stop_at = 13
    reference.run(tmp_path / "whole")
    cut_off = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut_off)
    shutil.rmtree(cut_off / "checkpoints/step_00000013")  # as after a kill: what was done since step 12 is lost
    later = Machine(0.5)
    later.stop_at = 13
    later.run(cut_off)
    assert math.isfinite(later.state.progress.seconds)
    assert later.factors == reference.factors[12:]
    assert torch.equal(weights(later.state), weights(reference.state))
    assert later.state.progress.total == reference.state.progress.total != LENGTH
