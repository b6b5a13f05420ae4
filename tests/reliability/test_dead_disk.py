"""Inference from a disk that does not answer any more."""

import os
import sys
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import pytest

from dead_disk import NAME, on_dead_disk
from retina.cli.infer import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the disk is made by Linux's FUSE")


@pytest.mark.parametrize(("number", "status"), [(SIGTERM, 143), (SIGINT, 130), (None, 2)])
def test_inference_does_not_wait_for_ever(
    trained_run: Path, tmp_path: Path, number: Signals | None, status: int
) -> None:
    disk, output, said = tmp_path / "disk", tmp_path / "out", tmp_path / "said"
    disk.mkdir()

    def infer() -> None:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        try:
            main(
                [
                    f"checkpoint={trained_run}",
                    f"source={disk / NAME}",
                    f"output={output}",
                    f"timeout={600 if number else 1}",
                ]
            )
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))

    assert on_dead_disk(disk, infer, lambda child: number and os.kill(child, number)) == status
    if number is None:
        (line,) = said.read_text().splitlines()
        assert line.startswith("error[data-timeout]: timeout: ")
        assert str(disk / NAME) in line
    assert not (output / "detections.json").exists()
