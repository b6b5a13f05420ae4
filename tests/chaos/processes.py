"""How many processes share the work must not matter: neither ranks nor loader workers."""

from itertools import chain
from pathlib import Path

from safetensors.torch import load_file

from .runs import FRESH, SPIED, TRAIN, Life, Outcome, command, differences, saved_step, uninterrupted, wait_for

BATCH = 4
CLOSE = 1e-5


def ranks_change(folder: Path) -> Outcome:
    """A run on 2 ranks, killed, then on 1, killed, then on 2 again, against one that ran on 1: the same samples, pixel
    for pixel, in the same order, and weights within 1e-5.

    By SGD, for Adam divides by the size of a gradient and so makes rounding as large as a step."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"program": SPIED, "optimizer": "sgd", "optimizer__lr": 0.01, "train__length": 14}
    whole = _samples(folder, "whole", ranks=1, until=None, **settings)
    parts = [
        _samples(folder, "changed", ranks=ranks, until=until, **settings)
        for ranks, until in [(2, 4), (1, 8), (2, None)]
    ]
    same_order = list(chain.from_iterable(parts)) == whole
    one, two = (folder / name / "tiny" / "checkpoints" / "step_00000014" for name in ("whole", "changed"))
    gap = max(_gap(one / file, two / file) for file in ("model.safetensors", "ema.safetensors"))
    steps = ", ".join(str(len(part) // BATCH) for part in parts)
    order = "the same" if same_order else "another"
    notes = f"{steps} steps on 2, 1, 2 ranks: {order} sequence of {len(whole)} samples, weights within {gap:.1g}"
    return Outcome("ranks 2 -> 1 -> 2", 1, int(same_order and len(whole) == 14 * BATCH and gap <= CLOSE), notes)


def _samples(folder: Path, runs: str, *, ranks: int, until: int | None, **settings: object) -> list[str]:
    """One life, killed once the step `until` is saved: what its saved steps were trained on, in order."""
    run = folder / runs / "tiny"
    first = saved_step(run)
    spy = folder / f"{runs}-{first}"
    spy.mkdir()
    with Life(command(runs, ranks=ranks, **settings), folder=folder, SPY=spy) as life:  # type: ignore[arg-type]
        if until is None:
            if life.wait() != 0:
                raise RuntimeError(life.said())
        elif not wait_for(lambda: saved_step(run) >= until or not life.alive()) or not life.alive():
            raise RuntimeError(f"was to be killed at step {until}:\n{life.said()}")
    share = BATCH // ranks
    lines = [next(spy.glob(f"{rank}.*")).read_text().splitlines() for rank in range(ranks)]
    steps = range(saved_step(run) - first)
    return [line for step in steps for own in lines for line in own[step * share : (step + 1) * share]]


def _gap(one: Path, two: Path) -> float:
    a, b = load_file(one), load_file(two)
    if a.keys() != b.keys():
        return float("inf")
    return max(float((a[key] - b[key]).abs().max()) for key in a if a[key].is_floating_point())


def loader_workers(folder: Path) -> Outcome:
    """Whole runs with 0, 1 and 2 loader workers, kept over the epochs of training (as tools/train.py does) or started
    anew for each: the same bits."""
    folder.mkdir(parents=True, exist_ok=True)
    reference, _ = uninterrupted(folder, "0", command("0"))
    faults = []
    for number in (1, 2):
        for persistent in (True, False):
            name = f"{number} {'kept' if persistent else 'anew'}"
            words = command(name.replace(" ", "-"), program=TRAIN if persistent else FRESH, data__num_workers=number)
            run, _ = uninterrupted(folder, name.replace(" ", "-"), words)
            if differs := differences(reference, run):
                faults.append(f"{name}: differs in {', '.join(differs)}")
    return Outcome("0, 1 or 2 loader workers", 4, 4 - len(faults), "; ".join(faults or ["1 and 2, kept or anew"]))
