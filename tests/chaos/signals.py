"""SIGTERM and Ctrl-C at random instants: the step is finished and saved, the exit status says which signal it was."""

import random
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from .kill import END_WITHIN
from .runs import SPIED, Life, Outcome, command, differences, saved_step, send, uninterrupted, wait_for, writing

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INSTANTS = ("start-up", "step", "evaluation", "checkpoint")
SETTINGS: dict[str, Any] = {"train__log_every": 1, "train__eval_every": 4, "train__save_every": 7, "train__length": 24}
"""A line per step, so that every step can be waited for; evaluations and checkpoints at steps of their own."""
LONG_BATCH = 128
AT_ONCE = 3.0
"""Seconds that "at once" may take on a busy machine."""


class Trial(NamedTuple):
    """One signal. `target` is "process", "rank 0", "rank 1", "torchrun" or "everything"."""

    number: signal.Signals
    instant: str
    target: str

    def __str__(self) -> str:
        return f"{self.number.name} to {self.target} in {self.instant}"


def all_trials(ranks: int) -> list[Trial]:
    targets = ("process",) if ranks == 1 else ("rank 0", "rank 1", "torchrun", "everything")
    return [Trial(*parts) for parts in product(SIGNALS, INSTANTS, targets)]


def signals_stop(folder: Path, *, trials: Sequence[Trial], ranks: int = 1, seed: int = 0) -> Outcome:
    """Stops a run by every trial in turn, each time going on by the same command, and compares what it arrives at with
    the run that nothing disturbed; a run that is done before is followed by another."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    reference, start_up = uninterrupted(folder, "whole", command("whole", ranks=ranks, **SETTINGS))
    faults: list[str] = []
    left, number, lost = list(trials), 0, 0
    while left:
        number += 1
        words = command(f"stopped{number}", ranks=ranks, **SETTINGS)
        run = folder / f"stopped{number}" / "tiny"
        while True:
            with Life(words, folder=folder) as life:
                if left and _strike(life, run, left[0], chance, start_up):
                    trial = left.pop(0)
                    fault, steps = _check(life, run, trial)
                    lost = max(lost, steps)
                    faults += [f"{trial}: {fault}"] if fault else []
                    continue
                if life.wait() != 0:
                    return Outcome(_name(ranks), len(trials), 0, f"a relaunch failed: {life.said()[-1000:]}")
            break
        if differs := differences(reference, run):
            faults.append(f"{run.parent.name} differs in {', '.join(differs)}")
    notes = "; ".join([f"{number} runs, at most {lost} steps lost", *faults])
    return Outcome(_name(ranks), len(trials), max(0, len(trials) - len(faults)), notes)


def _name(ranks: int) -> str:
    return "SIGTERM or Ctrl-C" + ("" if ranks == 1 else f", {ranks} ranks")


def steps_said(life: Life) -> int:
    return max((int(step) for step in re.findall(r"^step (\d+)/", life.said(), re.M)), default=0)


def _strike(life: Life, run: Path, trial: Trial, chance: random.Random, start_up: float) -> bool:
    """Waits for the moment and sends the signal; False when the run was over before."""
    if trial.instant == "start-up":  # not before Python itself has started
        wait_for(lambda: not life.alive() or steps_said(life), chance.uniform(0.3, start_up), pause=0.01)
    elif trial.instant == "checkpoint":
        wait_for(lambda: writing(run, life.born) or not life.alive())
        time.sleep(chance.uniform(0, 0.02))
    else:
        wait_for(lambda: steps_said(life) or not life.alive())
        target = steps_said(life) + chance.randint(1, 3)
        if trial.instant == "evaluation":  # follows at once upon the line of such a step
            target += -target % SETTINGS["train__eval_every"]
        wait_for(lambda: steps_said(life) >= target or not life.alive())
        time.sleep(chance.uniform(0, 0.05))
    if not life.alive() or "finished at step" in life.said():
        return False
    if trial.target == "everything":
        life.kill_all(trial.number)
    else:
        pid = life.rank(int(trial.target[-1])) if trial.target.startswith("rank") else None
        send(pid or life.process.pid, trial.number)
    return True


def _check(life: Life, run: Path, trial: Trial) -> tuple[str, int]:
    """What went wrong, or nothing, and how many steps that were logged are lost."""
    if not life.wait_all(END_WITHIN):
        return f"processes were left after {END_WITHIN:.0f} s", 0
    status = life.wait()
    said = life.said()
    lost = max(0, steps_said(life) - saved_step(run))
    if "finished at step" in said:  # the signal came after the last step
        return "", 0
    wanted = {128 + trial.number, -trial.number}  # the latter where it hit Python before our program ran
    if trial.target.startswith("rank"):  # torchrun tells the status of the process that ended first
        statuses = [int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", said)]
        status = statuses[-1] if statuses else status  # the root cause stands last
    if trial.target in ("torchrun", "everything"):  # torchrun's own status is its own affair
        wanted = {status} - {0}
    elif "run      " in said:
        wanted = {128 + trial.number}
    if status not in wanted:
        return f"exit status {status}: {said[-500:]}", lost
    if lost > 1:
        return f"{steps_said(life)} steps were done, {saved_step(run)} are saved", lost
    if trial.target == "process" and "Traceback" in said and "run      " in said:
        return f"a traceback: {said[-500:]}", lost
    return "", lost


def second_interrupt(folder: Path) -> Outcome:
    """A second Ctrl-C, 1.5 s after the first, in the middle of a step that takes long: the process ends at once, while
    after the first it went on."""
    folder.mkdir(parents=True, exist_ok=True)
    large: dict[str, Any] = {"data__short_side": 384, "data__long_side": 384, "data__canvases": "[[384,384]]"}
    large |= {"train__batch_size": LONG_BATCH, "train__accumulate": 4, "train__lr_batch_size": LONG_BATCH}
    with Life(command("long", program=SPIED, **large), folder=folder, SPY=folder) as life:
        notes = folder / f"0.{life.process.pid}"
        read = wait_for(lambda: notes.is_file() and len(notes.read_text().splitlines()) == LONG_BATCH, pause=0.05)
        time.sleep(1.0)  # all images of the step are read: now it computes
        send(life.process.pid, signal.SIGINT)
        time.sleep(1.5)  # within a second it would be the first again, passed on by a launcher
        patient = read and life.alive() and not writing(folder / "long" / "tiny")
        sent = time.monotonic()
        send(life.process.pid, signal.SIGINT)
        try:
            status = life.wait(20.0)
        except subprocess.TimeoutExpired:
            status = 0
        took = time.monotonic() - sent
        said = f"{took:.1f} s, exit status {status}" if patient else f"no step was under way: {life.said()[-500:]}"
    return Outcome("second Ctrl-C", 1, int(patient and status == 128 + signal.SIGINT and took < AT_ONCE), said)
