import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from retina.engine.checkpoint import MANIFEST, REQUIRED, find_fault, manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for name in REQUIRED:
        (folder / name).write_text(f"contents of {name}")
    (folder / MANIFEST).write_bytes(manifest(digests(folder)))
    assert find_fault(folder) is None
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in REQUIRED}


def sealed(lines: str) -> str:
    return f"{lines}# sha256 of the lines above: {hashlib.sha256(lines.encode()).hexdigest()}\n"


def test_coreutils_can_check_it_too(checkpoint: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "--strict", MANIFEST], cwd=checkpoint, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 3


def test_every_byte_of_the_manifest_counts(checkpoint: Path) -> None:
    whole = (checkpoint / MANIFEST).read_bytes()
    for position in range(len(whole)):
        for bit in (0, 5):  # newline to vertical tab, which str.splitlines takes for a newline; lower case to upper
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            (checkpoint / MANIFEST).write_bytes(damaged)
            assert find_fault(checkpoint) == f"{MANIFEST} is damaged", (position, bit)
        (checkpoint / MANIFEST).write_bytes(whole[:position])
        assert find_fault(checkpoint) == f"{MANIFEST} is damaged", position


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", ".hidden", "sub/file", "a b", "é", "", MANIFEST])
def test_names_that_lead_elsewhere_are_refused(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / "outside").write_text("x")
    lines = "".join(f"{digest}  {file}\n" for file, digest in digests(checkpoint).items())
    lines += f"{hashlib.sha256(b'x').hexdigest()}  {name}\n"
    (checkpoint / MANIFEST).write_text(sealed(lines))
    assert find_fault(checkpoint) == f"{MANIFEST} is damaged"


def test_names_given_twice_are_refused(checkpoint: Path) -> None:
    lines = "".join(f"{digest}  {file}\n" for file, digest in digests(checkpoint).items())
    (checkpoint / MANIFEST).write_text(sealed(lines + lines.splitlines(keepends=True)[0]))
    assert find_fault(checkpoint) == f"{MANIFEST} is damaged"


def test_files_beside_those_listed_are_refused(checkpoint: Path) -> None:
    (checkpoint / "ema.safetensors").write_text("x")
    assert find_fault(checkpoint) == f"ema.safetensors is not listed in {MANIFEST}"


def test_required_files_must_be_listed(checkpoint: Path) -> None:
    entries = digests(checkpoint)
    del entries["state.json"]
    (checkpoint / MANIFEST).write_bytes(manifest(entries))
    assert find_fault(checkpoint) == f"{MANIFEST} lists no state.json"


@pytest.mark.parametrize("name", ["state.json", MANIFEST])
def test_only_plain_files_are_read(checkpoint: Path, name: str) -> None:
    aside = checkpoint.parent / "aside"
    (checkpoint / name).rename(aside)
    for make in (
        lambda: (checkpoint / name).symlink_to(aside),
        lambda: os.mkfifo(checkpoint / name),
        lambda: (checkpoint / name).mkdir(),
    ):
        make()
        assert find_fault(checkpoint) == f"{name} is missing or unreadable"
        (checkpoint / name).rmdir() if (checkpoint / name).is_dir() else (checkpoint / name).unlink()
    aside.rename(checkpoint / name)
    link = checkpoint.parent / "step_00000002"
    link.symlink_to(checkpoint)
    assert find_fault(link) == "is a symbolic link"
