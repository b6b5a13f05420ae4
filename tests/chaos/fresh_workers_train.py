"""In place of tools/train.py: the same, with loader workers that are started anew for every epoch."""

import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

from retina.data.loader import BatchLoader  # noqa: E402

make = BatchLoader.__init__


def make_fresh(self: BatchLoader, *args: Any, **options: Any) -> None:
    make(self, *args, **options)
    object.__setattr__(self, "persistent_workers", False)  # DataLoader itself forbids the change


BatchLoader.__init__ = make_fresh  # type: ignore[method-assign]
sys.argv[0] = str(ROOT / "tools/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
