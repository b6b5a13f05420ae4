"""Rows of the table that are pytest files: faults whose tests need no harness of their own."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET  # reads only what pytest has written
from pathlib import Path

from .runs import ROOT, Outcome

SUITES: list[tuple[str, str]] = [
    # (fault as the table names it, paths or node ids under the repository, the last of which names the row)
    (
        "bit flipped in a checkpoint, or its end cut off",
        "tests/engine/test_checkpoint.py::test_every_flipped_bit_and_every_cut_is_noticed_and_the_one_before_is_used",
    ),
    ("disk full at some byte of a save, of a record, of a start", "tests/reliability/test_disk.py"),
    ("a disk that fails, became read-only, lacks locks, ...", "tests/reliability/test_errors_of_disks.py"),
    ("links, pipes and second names where a program writes", "tests/reliability/test_plants.py"),
    (
        "one or two values changed in the header of a weights file, or in state.json",
        "tests/engine/test_checkpoint.py::test_changed_states_are_one_line_or_work"
        " tests/model/test_header.py::test_changed_headers_are_one_line_or_work",
    ),
    (
        "inference killed with kill -9",
        "tests/cli/test_infer.py::test_killed_and_started_again_it_ends_with_the_same_bytes",
    ),
    ("malformed annotations or image files", "tests/reliability/test_malformed.py::test_one_mutation_is_one_line"),
    ("bytes changed in images", "tests/reliability/test_images_fuzz.py"),
    (
        "hostile pickles, settings, headers, paths and bombs",
        "tests/reliability/test_security.py::test_every_case_is_refused_in_one_harmless_line",
    ),
]


def run_suite(folder: Path, label: str, path: str) -> Outcome:
    """All tests of one file, the slow ones too. A test counts once, or as many times as it says by
    `record_property("tried", n)` (and `"survived"`, n if it passes)."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.xml"
    # later options win over those of pyproject.toml; a full version may take longer than a test of `make test`
    options = ["-m", "slow or not slow", "--timeout=3600", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *path.split()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if not report.is_file():
        return Outcome(label, 1, 0, f"pytest did not run: {(done.stdout + done.stderr)[-500:]}")
    tried = survived = skipped = 0
    failed = []
    for case in ET.parse(report).iter("testcase"):
        said = {p.get("name"): int(p.get("value", 0)) for p in case.iter("property") if p.get("name") in COUNTS}
        passed = not {child.tag for child in case} & {"failure", "error", "skipped"}
        if case.find("skipped") is not None:
            skipped += 1
            continue
        number = said.get("tried", 1)
        tried += number
        survived += said.get("survived", number if passed else 0)
        failed += [] if passed else [str(case.get("name"))]
    notes = [f"{skipped} tests skipped"] if skipped else []
    notes += [f"failed: {', '.join(failed)}"] if failed else []
    if done.returncode != 0 and survived == tried:  # nothing collected, or a fault outside any test
        tried += 1
        notes.append(f"pytest ended with {done.returncode}")
    return Outcome(label, tried, survived, "; ".join(notes))


COUNTS = ("tried", "survived")
