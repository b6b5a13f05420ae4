"""The public names: each is what its module defines, type checkers know all of them, and none takes torch too early."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import retina
import retina.losses


@pytest.mark.parametrize("package", [retina, retina.losses], ids=lambda package: package.__name__)
def test_every_public_name_is_there(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert names == dir(package)
    for name in names:
        value = getattr(package, name)
        assert inspect.isclass(value) or callable(value), name
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_the_names_that_documents_promise_are_public() -> None:
    promised = """load Detector retinanet RetinaNet DetectionLoss SigmoidFocalLoss sigmoid_focal_loss MaxIoU ATSS
        TaskAligned postprocess evaluate coco_metrics read_coco CocoDetection train_loader eval_loader fit TrainConfig
        Batch Targets Predictions Losses Detections"""
    assert set(promised.split()) <= set(retina.__all__)
    with pytest.raises(AttributeError, match="laod"):
        retina.laod  # noqa: B018


@pytest.mark.slow
def test_type_checkers_know_every_name(tmp_path: Path) -> None:
    """mypy, in strict mode, of a program that uses all of them."""
    pytest.importorskip("mypy")
    lines = [f"reveal_type(retina.{name})" for name in retina.__all__]
    (tmp_path / "uses.py").write_text("\n".join(["import retina", *lines, "retina.laod"]))
    root = Path(__file__).parents[1]
    options = ["--follow-imports=silent", "--disable-error-code=name-defined", "--no-implicit-reexport"]
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={root / '.mypy_cache'}", str(tmp_path / "uses.py")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1000)
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(retina.__all__), done.stdout
    assert not [line for line in revealed if '"Any"' in line or "object" in line]
    assert 'has no attribute "laod"' in done.stdout
