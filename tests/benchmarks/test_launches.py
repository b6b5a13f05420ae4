"""A training step on a CUDA device that computes nothing: what the host asks of it is counted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NULL_GPU = Path(os.environ.get("NULL_GPU", ROOT.parent / "shared" / "gpu" / "null")) / "null"


def measured(folder: Path, *words: str) -> dict[str, float]:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if torch.version.cuda is None or torch.cuda.is_available():
        pytest.skip("needs torch built for CUDA, and no GPU")
    if not NULL_GPU.is_file():
        pytest.skip(f"needs a null CUDA device ({NULL_GPU}; NULL_GPU names another folder)")
    command = [NULL_GPU, sys.executable, "tools/benchmark.py", "launches", "--device", "cuda"]
    done = subprocess.run(
        [*command, "--output", folder / "rows.json", *words], cwd=ROOT, capture_output=True, text=True, timeout=1000
    )
    assert (folder / "rows.json").is_file(), done.stderr
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    return {f"{row['measure'].split()[0]} {row['measure'].split()[-1]}": row["ours"] for row in rows}


@pytest.mark.slow
def test_a_step_waits_for_nothing_and_launches_few_kernels(tmp_path: Path) -> None:
    counts = measured(tmp_path)
    assert counts["default waits"] == counts["paper waits"] == 0
    assert 300 < counts["default launches"] <= 1800
    assert 300 < counts["paper launches"] <= 1000
    assert 10 < counts["default traffic"] <= 60
    assert 1 < counts["default peak"] <= 7
