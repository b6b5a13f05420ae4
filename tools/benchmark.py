"""Measures speed and memory against the oracles, each pair side by side in one process, equality asserted.

python tools/benchmark.py all                          # everything; also: make bench
python tools/benchmark.py focal matching --rounds 15
python tools/benchmark.py step --device cuda           # on a GPU: device events
"""

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

MEASURES = (
    *("focal", "losses", "matching", "postprocess", "coco_eval", "loader", "packs", "annotations"),
    *("syncs", "launches", "loop", "memory", "inference", "infer", "step", "scaling"),
)


def main(typed: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("measures", nargs="+", choices=[*MEASURES, "all"], metavar="measure", help=", ".join(MEASURES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each way, at least 7 for figures to report")
    parser.add_argument("--quick", action="store_true", help="tiny inputs: see that it runs; the times mean nothing")
    parser.add_argument("--output", type=Path, default=Path("out/benchmark.json"), help="JSON to write")
    options = parser.parse_args(typed)

    import torch

    from retina.files import make_folder, write_whole
    from retina.lab.clock import Bench, machine, table
    from retina.printing import say

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    bench = Bench(device=torch.device(options.device), rounds=options.rounds, quick=options.quick)
    rows = []
    for name in MEASURES if "all" in options.measures else options.measures:
        say(f"{name} ...", error=True)
        torch.manual_seed(0)
        rows += importlib.import_module(f"benchmarks.{name}").run(bench)
    described = machine(bench.device)
    say(*table(rows).splitlines(), "", ", ".join(f"{key} {value}" for key, value in described.items()))
    command = " ".join(["python tools/benchmark.py", *(typed or sys.argv[1:])])
    table_rows = [asdict(row) | {"verdict": row.verdict} for row in rows]
    result = {"command": command, "machine": described, "rounds": options.rounds, "rows": table_rows}
    make_folder(options.output.parent)
    write_whole(options.output, (json.dumps(result, indent=2) + "\n").encode())
    return 1 if any(row.verdict == "missed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
