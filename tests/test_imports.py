"""What the library does not use, it does not import; what whole programs import is in cli/test_lean_starts.py."""

import subprocess
import sys


def test_the_library_imports_no_package_that_only_some_runs_use() -> None:
    """Nor do the transforms of its own need albumentations."""
    modules = "retina.data.loader, retina.engine.loop, retina.evaluation.evaluate, retina.inference"
    modules += ", retina.tracking.trackers"
    heavy = ["albumentations", "tensorboard", "rich", "matplotlib", "pycocotools", "timm", "hydra"]
    heavy += ["wandb", "mlflow", "trackio"]
    code = f"""import sys, {modules}
from retina.data.transforms import *
from retina.data.transforms import ColorJitter, LargeScaleJitter
Pipeline({{"color": ColorJitter(), "flip": HorizontalFlip(), "jitter": LargeScaleJitter(9, 9)}})
default_pipeline(), eval_pipeline()
print([name for name in {heavy} if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
