"""kill -9 at random instants, and the same command again, until the run is done."""

import random
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .runs import Life, Outcome, command, differences, send, uninterrupted, wait_for, writing

END_WITHIN = 60.0
"""Seconds after the death of one process in which all others must have ended."""


@dataclass
class Campaign:
    """Counts of one series of kills."""

    random: random.Random
    start_up: float
    """Seconds from the launch to the first checkpoint."""
    write: float = 0.05
    """Seconds that writing a checkpoint takes, as last seen."""
    kills: int = 0
    inside: int = 0
    """Kills that left a half-written checkpoint."""
    slowest: float = 0.0
    """Seconds from a kill to the end of all processes, the longest."""
    faults: list[str] = field(default_factory=list)


def kill_nine(folder: Path, *, kills: int, ranks: int = 1, seed: int = 0, **changes: Any) -> Outcome:
    """Kills a run `kills` times, at least a third of them inside a checkpoint write, and compares what it arrives at
    with the run that nothing disturbed; a run that is done before is followed by another.

    Every other kill falls anywhere between the launch and some steps after the first checkpoint. Of two ranks, one,
    torchrun or all are killed, and then all must end by themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    reference, start_up = uninterrupted(folder, "whole", command("whole", ranks=ranks, **changes))
    campaign = Campaign(random.Random(seed), start_up)
    survived = 0
    number = 0
    while number < 3 + kills and (campaign.kills < kills or campaign.inside * 3 < kills):
        number += 1
        before = campaign.kills
        words = command(f"killed{number}", ranks=ranks, **changes)
        run = folder / f"killed{number}" / "tiny"
        fault = _until_done(words, run, campaign, kills=kills, ranks=ranks)
        if fault is None and (differs := differences(reference, run)):
            fault = f"{run.parent.name} differs in {', '.join(differs)}"
        if fault:
            campaign.faults.append(fault)
        else:
            survived += campaign.kills - before
        if fault and campaign.kills == before:
            break
    if campaign.inside * 3 < kills:
        campaign.faults.append(f"only {campaign.inside} of {campaign.kills} kills fell inside a checkpoint write")
        survived = 0
    where = "one process" if ranks == 1 else f"{ranks} ranks"
    notes = f"{campaign.inside} inside a checkpoint write, {number} runs"
    notes += f", all ended within {campaign.slowest:.0f} s" if ranks > 1 else ""
    return Outcome(f"kill -9, {where}", max(kills, campaign.kills), survived, "; ".join([notes, *campaign.faults]))


def _until_done(words: Sequence[str], run: Path, campaign: Campaign, *, kills: int, ranks: int) -> str | None:
    """Lives of one run up to its end, and what went wrong, if anything did."""
    folder = run.parents[1]
    while True:
        enough = campaign.kills >= kills and campaign.inside * 3 >= kills
        with Life(words, folder=folder) as life:
            if not enough and _strike(life, run, campaign, ranks):
                campaign.kills += 1
                campaign.inside += bool(writing(run, life.born))
                struck = time.monotonic()
                if not life.wait_all(END_WITHIN if ranks > 1 else 10.0):
                    return f"processes were left {END_WITHIN:.0f} s after kill {campaign.kills}"
                campaign.slowest = max(campaign.slowest, time.monotonic() - struck)
                continue
            try:
                status = life.wait()
            except subprocess.TimeoutExpired:
                return f"{run.parent.name} hangs"
            return None if status == 0 else f"{run.parent.name} failed: {life.said()[-300:]}"


def _strike(life: Life, run: Path, campaign: Campaign, ranks: int) -> bool:
    """Waits for a moment and kills; False when the run was over before."""
    chance = campaign.random
    aims_inside = campaign.inside < 0.45 * (campaign.kills + 1)
    if aims_inside:
        begun = False
        for _ in range(chance.randint(1, 3)):
            seen = time.monotonic()
            if wait_for(lambda: not life.alive() or not writing(run, life.born), pause=0.0005) and begun:
                campaign.write = time.monotonic() - seen
            begun = wait_for(lambda: not life.alive() or writing(run, life.born), pause=0.0005)
        time.sleep(chance.uniform(0, campaign.write))
    else:
        wait_for(lambda: not life.alive(), chance.uniform(0, 1.3 * campaign.start_up), pause=0.01)
    if not life.alive():
        return False
    if ranks == 1:
        send(life.process.pid, signal.SIGKILL)
        return True
    victim = chance.choice(["rank 0", "everything"] if aims_inside else ["rank 0", "rank 1", "torchrun", "everything"])
    if victim == "everything":
        life.kill_all()
    else:
        pid = life.rank(int(victim[-1])) if victim != "torchrun" else None
        send(pid or life.process.pid, signal.SIGKILL)
    return True
