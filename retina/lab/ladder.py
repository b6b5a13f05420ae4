"""Trains the ladder: from the paper's recipe to today's, one step at a time, each step adding to those before.

python tools/lab.py ladder
python tools/lab.py ladder data=bccd seeds=[0]
python tools/lab.py ladder cumulative=false into=ladder-alone-shapes

The same as ablate study=ladder. With cumulative=false every step is taken from the first row alone.
"""

from collections.abc import Sequence

from retina.lab import ablate


def main(argv: Sequence[str]) -> int:
    return ablate.main(argv, command="ladder", given=["study=ladder"])
