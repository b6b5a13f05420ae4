"""Training runs as programs: started, watched through the files they write, killed, compared by hash. Linux only."""

import contextlib
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tools/train.py"
SPIED = ROOT / "tests/chaos/spied_train.py"
FRESH = ROOT / "tests/chaos/fresh_workers_train.py"
WALL_CLOCK = ("images_per_second", "data_wait", "seconds")
MARK = "RETINA_CHAOS"
PATIENCE = 280.0
"""Seconds that any one life may take: many times what it needs, for machines are slow and busy."""


class Outcome(NamedTuple):
    """One row of the table."""

    fault: str
    tried: int
    survived: int
    notes: str = ""

    @property
    def ok(self) -> bool:
        return self.survived == self.tried


def write_data(folder: Path) -> None:
    """`folder/shapes`: the data set that `command` trains on."""
    from retina.data.shapes import write_shapes  # pulls numpy in; the table's program need not wait for it

    write_shapes(folder / "shapes", num_train=10, num_val=6, image_size=(64, 96))


def command(runs: str, *, ranks: int = 1, program: Path = TRAIN, **changes: Any) -> list[str]:
    """What a user types to train, from the folder that holds `shapes/`: the run is `<runs>/tiny`.

    The model is small, so that starting up dwarfs the rest; it has all that a checkpoint can hold. `__` in a key stands
    for a dot."""
    settings = {
        "name": "tiny",
        "runs": runs,
        "data.root": "shapes",
        "data.prepare": "null",
        "data.short_side": 64,
        "data.long_side": 96,
        "data.pad_multiple": 32,
        "data.canvases": "[[96,96]]",
        "data.num_workers": 0,
        "model.norm": "group",
        "model.levels": "[3]",
        "model.anchor_sizes": "[24.0]",
        "model.fpn_channels": 16,
        "model.head_convs": 1,
        "model.prior": 0.1,  # detections from the start: evaluations tell checkpoints apart
        "train.device": "cpu",
        "train.deterministic": "true",
        "train.precision": "fp32",
        "train.ema": 0.9,
        "train.length": 24,
        "train.batch_size": 4,
        "train.lr_batch_size": 4,
        "train.eval_every": 6,
        "train.save_every": 2,
        "train.log_every": 3,  # many checkpoints fall between two lines: the sums since the last must survive, too
        "train.pictures": 0,
        "schedule.warmup": 2,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(program), "experiment=shapes", *(f"{k}={v}" for k, v in settings.items())]


def start(words: list[str], folder: Path, log: Path, environment: dict[str, str]) -> Any:
    """A new Python, in a session of its own. A test may put a fork in its place."""
    with log.open("wb") as out:
        return subprocess.Popen(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )


class Life:
    """A program in a session of its own. What it says goes to a file; whatever it starts, however it is orphaned, is
    found by its session or by a mark in the environment. Leaving the `with` block kills all of it."""

    def __init__(self, words: Sequence[str], *, folder: Path, **environment: object) -> None:
        self.mark = f"{MARK}={secrets.token_hex(8)}"
        settings = {"OMP_NUM_THREADS": 1, "COLUMNS": 200, "PYTHONPATH": ROOT, "NO_ALBUMENTATIONS_UPDATE": 1}
        settings |= environment | dict([self.mark.split("=")])
        self.log = folder / f"{self.mark.split('=')[1]}.log"
        self.born = time.time()
        self.process = start(list(words), folder, self.log, {key: str(value) for key, value in settings.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        self.process.wait()

    @property
    def age(self) -> float:
        return time.time() - self.born

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def members(self) -> list[int]:
        """Every living process of this life."""
        self.process.poll()  # a zombie of ours would otherwise stay
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if self.mark in environment_of(pid) or session_of(pid) == self.process.pid]

    def rank(self, number: int) -> int | None:
        """The process of one rank under torchrun, None before it is started."""
        own = [pid for pid in self.members() if f"RANK={number}" in environment_of(pid)]
        return min(own, default=None)  # what it starts itself came later

    def kill_all(self, number: int = signal.SIGKILL) -> None:
        for pid in self.members():
            send(pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        return self.process.wait(seconds)

    def wait_all(self, seconds: float) -> bool:
        """Whether every process has ended in time."""
        return wait_for(lambda: not self.members(), seconds, pause=0.1)


def environment_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # ended, or not ours
        return []


def session_of(pid: int) -> int | None:
    """The session of a living process; zombies have none."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:4]
    except OSError:  # ended
        return None
    return None if state == "Z" else int(session)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for(happened: Callable[[], object], seconds: float = PATIENCE, *, pause: float = 0.002) -> bool:
    """Whether it happened in time."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def writing(run: Path, since: float = 0.0) -> list[str]:
    """Checkpoints half written, begun after the time `since`: a life that was killed leaves one behind for the next."""
    try:
        with os.scandir(run / "checkpoints") as entries:
            names = [e for e in entries if e.name.startswith(".step_") and e.name.endswith(".tmp")]
            return [entry.name for entry in names if entry.stat().st_mtime >= since]
    except FileNotFoundError:  # no folder yet, or renamed while we looked
        return []


def saved_step(run: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")), default=0)


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every file of the last checkpoint, of the best weights and of the records without wall-clock times;
    also names what a write that was cut off has left behind."""
    final = run / "checkpoints" / f"step_{saved_step(run):08d}"
    files = [*final.iterdir(), run / "best.safetensors"]
    found = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in record.items() if key not in WALL_CLOCK} for record in records]
    found["metrics.jsonl"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return found | {str(path.relative_to(run)): "left over" for path in run.rglob(".*.tmp")}


def differences(one: Path, two: Path) -> list[str]:
    """Names of what is not bit for bit the same in two runs."""
    a, b = digests(one), digests(two)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def uninterrupted(folder: Path, runs: str, words: Sequence[str]) -> tuple[Path, float]:
    """The run that others are compared with, and the seconds from its launch to its first checkpoint."""
    run = folder / runs / "tiny"
    with Life(words, folder=folder) as life:
        wait_for(lambda: saved_step(run) or not life.alive())
        start_up = life.age
        if life.wait() != 0:
            raise RuntimeError(f"the run without faults failed:\n{life.said()}")
    return run, start_up
