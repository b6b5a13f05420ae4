"""Repeats the proof of an exported file, here and now, without torch: numpy, Pillow and onnxruntime are enough.

python tools/verify.py file=mine.onnx
python tools/verify.py file=mine.onnx images=photos/

The file holds what the detector found in the images of its proof. They are read again, must be the same files as then,
and the file must find the same in them. Exit code 0: it does, 2: it does not.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from retina.cli.compose import entry
from retina.errors import CheckpointError
from retina.export.description import check_description
from retina.export.onnx_runtime import OnnxFile
from retina.export.openvino_runtime import OpenvinoFile
from retina.export.proof import Entry, Tolerance, digest, look_again, pixels_of, read_entry
from retina.printing import say
from retina.schema import parse_json


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """configs/verify.yaml says what each is."""

    file: str
    images: str | None
    traceback: bool


@entry("verify", VerifyConfig)
def program(config: VerifyConfig) -> int:
    file = Path(config.file)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file - give a file that retina export wrote", code="no-file")
    if file.suffix == ".pt2":
        from retina.export.formats import ProgramFile  # torch's own format needs torch

        subject: OnnxFile | OpenvinoFile | ProgramFile = ProgramFile.read(file)
    elif file.suffix == ".xml":
        subject = OpenvinoFile(file)
    else:
        subject = OnnxFile(file)
    settings = subject.description
    check_description(settings, file)
    check_digest(file)
    proof = settings["proof"]
    folder = Path(config.images or proof["folder"])
    entries = [Entry(**values) for values in proof["images"]]
    pixels = pixels_of(settings)
    images = [read_entry(folder, one.name, one.sha256, one.size, pixels) for one in entries]
    tolerance = Tolerance(**proof["tolerance"])
    differences, times = look_again(entries, images, subject, tolerance, settings)
    if problem := differences.refuses(tolerance):
        raise CheckpointError(
            f"{file}: {subject.runtime}: {problem} - do not use it here, or export it again", code="not-equal"
        )
    say(f"{subject.runtime}: {len(images)} images, alone and in batches: {differences.line()}")
    say(f"one image: {times.line()}", f"verified: {file}")
    return 0


def check_digest(file: Path) -> None:
    """Raises CheckpointError where the proof beside the file is that of another one."""
    beside = file.with_suffix(".proof.json")
    try:
        record = parse_json(beside.read_bytes())
        expected = {file: record["sha256"]} | {file.parent / Path(n).name: h for n, h in record["parts"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # the file holds its proof itself
    for part, known in expected.items():
        if digest(part) != known:
            problem = f"is not the file that {beside.name} is of - restore it from a copy"
            raise CheckpointError(f"{part}: {problem}", code="damaged-file")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """`FILE` may stand for `file=FILE`."""
    words = sys.argv[1:] if argv is None else argv
    program([word if "=" in word or word.startswith("-") else f"file={word}" for word in words])
