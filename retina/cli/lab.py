"""The focal lab: losses looked at, trained detectors taken apart, and choices measured on your own data.

python tools/lab.py curves                                     # the losses and their gradients
python tools/lab.py distribution checkpoint=runs/shapes        # where the loss of a detector comes from
python tools/lab.py ablate study=gamma data=shapes             # the paper's Table 1
python tools/lab.py ladder data=shapes                         # from the paper's recipe to today's
python tools/lab.py anchors data=coco data.root=DIR            # whether anchors fit the objects

Each has settings and a --help of its own: python tools/lab.py curves --help
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from retina.cli.main import check_name
from retina.printing import quiet_end, say

EXPERIMENTS = ("curves", "distribution", "ablate", "ladder", "anchors")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    with quiet_end():
        _start(argv)


def _start(argv: Sequence[str] | None) -> NoReturn:
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words else ""
    if name in ("-h", "--help"):
        say(*str(__doc__).splitlines())
        sys.exit(0)
    check_name(name, EXPERIMENTS)
    if name == "ladder":
        name, words = "ablate", ["study=ladder", *words]
    sys.exit(importlib.import_module(f"retina.lab.{name}").main(words))
