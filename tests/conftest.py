"""Shape and type annotations of the whole library are checked while its tests run; at run time they cost nothing."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
install_import_hook("retina", "beartype.beartype")
torch.set_num_threads(1)  # tests run side by side

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The blood-cell photographs in COCO format, where they are present."""
    root = SHARED / "data" / "bccd"
    if not root.is_dir():
        pytest.skip(f"blood-cell photographs are not at {root} (data/README.md says how to get them)")
    return root


@pytest.fixture(scope="session")
def metric_fixtures() -> Path:
    """Detection sets with known COCO numbers, where they are present."""
    root = SHARED / "fixtures"
    if not root.is_dir():
        pytest.skip(f"metric fixtures are not at {root}")
    return root
