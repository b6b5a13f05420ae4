"""Training runs one after another, each a tools/train.py of its own, so that each resumes by itself.

What is finished is not started again; what is killed goes on with the same command, the run that was at work from its
last checkpoint.
"""

import ctypes
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retina.engine.run_folder import HARMLESS, WORDS, compare, holds_work, read_settings
from retina.engine.signals import SIGNALS
from retina.errors import ConfigError, plain
from retina.lab.study import Job

TRAIN = Path(__file__).parents[2] / "tools" / "train.py"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def finished(job: Job) -> bool:
    """Whether tools/train.py has said so in the run's log, and the run is of these very settings."""
    log = job.folder / "log.txt"
    try:
        there = read_settings(job.folder / "config.yaml")
        last = log.read_text(encoding="utf-8").splitlines()[-2:]
    except (ConfigError, OSError, ValueError):
        return False
    same = all(one.key in WORDS for one in compare(there, job.settings))
    return same and any(" finished at step " in line for line in last)


def refuse_others(jobs: Sequence[Job]) -> None:
    """Raises ConfigError where a run of other settings is in the place of one of these, before any is trained."""
    for job in jobs:
        file = job.folder / "config.yaml"
        if file.is_file() and holds_work(job.folder):
            grave = [one for one in compare(read_settings(file), job.settings) if one.key not in HARMLESS]
            if grave:
                fix = "give into=NAME for a new study, repeat its settings, or remove that folder"
                raise ConfigError(f"{job.folder}: holds another run: {grave[0]} - {fix}")


def run_all(jobs: Sequence[Job], faults: dict[Path, str], report: Callable[[], None]) -> None:
    """Trains what is not finished. A run that fails goes to `faults`, by its folder, and the others go on.

    `report` is called after each run. A signal is passed on to the run, which saves; then this process ends too."""
    waiting = [job for job in jobs if not finished(job)]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them finished", flush=True)
    started = time.monotonic()
    with _status() as show:
        for done, job in enumerate(waiting):
            left = f", about {_clock((time.monotonic() - started) / done * (len(waiting) - done))} left" if done else ""
            place = f"run {len(jobs) - len(waiting) + done + 1} of {len(jobs)}: {job.folder.name}{left}"
            show(place, "")
            began = time.monotonic()
            if fault := _train(job, lambda line, place=place: show(place, line)):  # type: ignore[misc]
                faults[job.folder] = fault
            report()
            print(f"{job.folder.name}: {fault or 'finished'} ({_clock(time.monotonic() - began)})", flush=True)


def _train(job: Job, show: Callable[[str], None]) -> str:
    """What is wrong, or nothing. Ends this process when a signal has come."""
    command = [sys.executable, str(TRAIN), *job.words]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as complaints,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, errors="replace", preexec_fn=_end_with_me
        ) as child,
    ):
        with _passing_on(child) as received:
            assert child.stdout is not None
            for line in child.stdout:
                show(line.rstrip())
            code = child.wait()
        complaints.seek(0)
        lines = complaints.read().splitlines()
    if received:
        sys.exit(128 + received[0])
    if not code:
        return ""
    told = [match[1] for line in lines if (match := re.match(r"error(?:\[[\w-]+\])?: (.*)", line))]
    return plain(told[-1] if told else f"ended with code {code}: {' '.join(lines[-1:])}")


def _end_with_me() -> None:
    """In the new process: told to stop, and so to save, when this one is killed (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _passing_on(child: "subprocess.Popen[str]") -> Iterator[list[int]]:
    """Within the block, SIGINT and SIGTERM go to the child instead; those that came are listed."""
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _status() -> Iterator[Callable[[str, str], None]]:
    """`show(place, line)`: where we are and what the run says; on a terminal one line that changes, else one a run."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda place, line: None if line else print(place, flush=True)
        return
    with console.status("") as status:

        def show(place: str, line: str) -> None:
            step = re.match(r"step \d+/\d+", line)
            if step or not line:
                status.update(f"{place}  {step[0] if step else ''}")

        yield show


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 90 else f"{minutes} min"
