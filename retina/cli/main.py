"""The command `retina`: hands over to one of its sub-commands, each a file of this folder."""

import difflib
import importlib
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from retina import __version__
from retina.printing import quiet_end, say

COMMANDS = {
    "train": "train a detector; the same command again resumes",
    "eval": "score a detector, or a results file, on annotated images",
    "tune-thresholds": "fit score thresholds to a goal; they go into the weights",
    "infer": "find objects in a folder of images",
    "doctor": "look a data set over before training",
    "audit": "find labels that are likely wrong",
    "export": "write a detector as one file for other runtimes, and prove it",
    "verify": "repeat the proof of an exported file, without torch",
    "pack": "put the images of a data set into a few large files",
    "convert": "turn Pascal VOC and YOLO labels into COCO's format",
    "import-weights": "take over the weights of other programs",
    "compare": "tell whether one detector is better than another",
    "lab": "losses, detectors and recipes, measured",
}


def check_name(name: str, known: Collection[str]) -> None:
    """Ends Python in one line for a command that there is not."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? There are " if near else "choose one of "
        say(f"error: {name or 'nothing to do'}: no such command - {hint}{', '.join(known)}", error=True)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    with quiet_end():
        _start(argv)


def _start(argv: Sequence[str] | None) -> NoReturn:
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words else "--help"
    if name in ("-h", "--help"):
        rows = [f"  {command:<16}{what}" for command, what in COMMANDS.items()]
        say("usage: retina COMMAND [key=value ...]", "", *rows, "", "retina COMMAND --help says more.")
        sys.exit(0)
    if name == "--version":
        say(__version__)
        sys.exit(0)
    check_name(name, COMMANDS)
    sys.argv = [f"retina {name}", *words]
    sys.exit(importlib.import_module(f"retina.cli.{name.replace('-', '_')}").main())


if __name__ == "__main__":
    main()
