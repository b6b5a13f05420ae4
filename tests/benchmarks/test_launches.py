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


@pytest.fixture
def null_gpu() -> Path:
    """What runs a command on the null device."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if torch.version.cuda is None or torch.cuda.is_available():
        pytest.skip("needs torch built for CUDA, and no GPU")
    if not NULL_GPU.is_file():
        pytest.skip(f"needs a null CUDA device ({NULL_GPU}; NULL_GPU names another folder)")
    return NULL_GPU


@pytest.mark.slow
def test_a_step_waits_for_nothing_and_launches_few_kernels(null_gpu: Path, tmp_path: Path) -> None:
    command = [null_gpu, sys.executable, "tools/benchmark.py", "launches", "--device", "cuda"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "rows.json"], cwd=ROOT, capture_output=True, text=True, timeout=1000
    )
    assert (tmp_path / "rows.json").is_file(), done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    counts = {f"{row['measure'].split()[0]} {row['measure'].split()[-1]}": row["ours"] for row in rows}
    assert counts["default waits"] == counts["paper waits"] == 0
    assert 300 < counts["default launches"] <= 1800
    assert 300 < counts["paper launches"] <= 1000
    assert 10 < counts["default traffic"] <= 60
    assert 1 < counts["default peak"] <= 7


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True])
def test_a_gpu_of_a_quarter_of_a_gigabyte(halves: bool, null_gpu: Path, tmp_path: Path) -> None:
    """The allocator is torch's own: one line says what would help, or half as many images at a time are taken."""
    words = ["experiment=smoke", "model.backbone=resnet18", "augment=none", f"data.root={tmp_path / 'shapes'}"]
    words += ["train.batch_size=32", "train.length=2", "train.eval_every=null", "data.num_workers=0"]
    words += ["train.device=cuda", f"train.halve_when_full={str(halves).lower()}", f"runs={tmp_path / 'runs'}"]
    environment = os.environ | {"NULL_GB": "0.25"}
    command = [null_gpu, sys.executable, "tools/train.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == (0 if halves else 2), done.stderr
    output = done.stdout + done.stderr
    assert ("error[out-of-memory]" in output) != halves
    assert "train.accumulate=2" in output
    assert "Traceback" not in output
