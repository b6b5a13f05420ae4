"""Injects every fault in full and prints one table: fault, tried, survived. Exit status 1 if anything did not survive.

make chaos                                             # all of it, about an hour on two slow cores
.venv/bin/python -m tests.chaos --only kill --kills 5  # from the repository's root
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .hosts import host_vanishes, hosts_fail
from .kill import kill_nine
from .processes import loader_workers, ranks_change
from .runs import Outcome, write_data
from .signals import all_trials, second_interrupt, signals_stop
from .suites import SUITES, run_suite

LENGTH = 60
"""Steps of a run to be killed: enough for a dozen lives, for most of the time goes into starting them."""
Scenario = Callable[[Path], Outcome]


def main() -> int:
    arguments = parse()
    scenarios = scenarios_of(arguments)
    if arguments.list:
        print("\n".join(scenarios))
        return 0
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    output = arguments.output or work / "table"
    output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for name in arguments.only or scenarios:
        folder = work / name
        folder.mkdir()
        started = time.monotonic()
        try:
            write_data(folder)
            outcomes.append(scenarios[name](folder))
        except Exception as fault:  # one scenario that breaks must not cost the table
            outcomes.append(Outcome(name, 1, 0, f"{type(fault).__name__}: {fault}"))
        row = outcomes[-1]
        seconds = time.monotonic() - started
        print(f"{row.fault}: {row.survived} of {row.tried} ({seconds:.0f} s) {row.notes}", file=sys.stderr, flush=True)
    write_table(output, outcomes)
    print((output / "chaos.md").read_text())
    print(f"table    {output / 'chaos.md'}, {output / 'chaos.json'}")
    if survived := all(outcome.ok for outcome in outcomes):
        for name in arguments.only or scenarios:
            shutil.rmtree(work / name)
    else:
        print(f"runs     {work}")
    return 0 if survived else 1


def scenarios_of(arguments: argparse.Namespace) -> dict[str, Scenario]:
    seed = arguments.seed
    one, two = (all_trials(ranks) * arguments.signal_rounds for ranks in (1, 2))
    own: dict[str, Scenario] = {
        "kill": partial(kill_nine, kills=arguments.kills, seed=seed, train__length=LENGTH),
        "kill-ranks": partial(kill_nine, kills=arguments.rank_kills, ranks=2, seed=seed, train__length=LENGTH),
        "ranks": ranks_change,
        "workers": loader_workers,
        "signals": partial(signals_stop, trials=one, seed=seed),
        "signals-ranks": partial(signals_stop, trials=two, ranks=2, seed=seed),
        "second": second_interrupt,
        "hosts": partial(hosts_fail, seed=seed),
        "vanish": partial(host_vanishes, seed=seed),
    }
    return own | {Path(path).stem: partial(run_suite, label=label, path=path) for label, path in SUITES}


def write_table(output: Path, outcomes: list[Outcome]) -> None:
    """`chaos.md` and `chaos.json`, the latter with notes."""
    rows = [("fault", "tried", "survived"), *((o.fault, str(o.tried), str(o.survived)) for o in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"| {row[0]:<{widths[0]}} | {row[1]:>{widths[1]}} | {row[2]:>{widths[2]}} |" for row in rows]
    lines.insert(1, f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|{'-' * (widths[2] + 1)}:|")
    (output / "chaos.md").write_text("\n".join(lines) + "\n")
    (output / "chaos.json").write_text(json.dumps([outcome._asdict() for outcome in outcomes], indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kill -9 of one process")
    parser.add_argument("--rank-kills", type=int, default=20, help="kill -9 in a run of two ranks")
    parser.add_argument(
        "--signal-rounds", type=int, default=1, help="times every signal meets every instant and target"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the scenarios that --list names")
    parser.add_argument("--list", action="store_true", help="print the scenarios' names and do nothing")
    parser.add_argument("--output", type=Path, help="folder for chaos.md and chaos.json; default: a temporary one")
    arguments = parser.parse_args()
    if not Path("/proc/self/environ").exists():
        parser.error("needs Linux: processes are found by what /proc says of them")
    if unknown := set(arguments.only or ()) - scenarios_of(arguments).keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such scenario - see --list")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
