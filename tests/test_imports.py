"""What the library does not use, it does not import; what whole programs import is in cli/test_lean_starts.py."""

import subprocess
import sys


def test_the_library_imports_no_package_that_only_some_runs_use() -> None:
    modules = "retina.data.loader, retina.engine.loop, retina.evaluation.evaluate, retina.inference"
    heavy = ["albumentations", "tensorboard", "matplotlib", "pycocotools", "timm", "hydra"]
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
