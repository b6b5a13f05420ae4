"""The list of a checkpoint's files and their hashes, which says whether it can be trusted.

    <sha256>  model.safetensors
    ...
    # sha256 of the lines above: <sha256>

`sha256sum -c MANIFEST.sha256` checks the files too."""

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

MANIFEST = "MANIFEST.sha256"
REQUIRED = ("model.safetensors", "optimizer.safetensors", "state.json")

_ENTRY = re.compile(rb"([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})")
_SEAL = b"# sha256 of the lines above: "
_LONGEST = 1 << 16
"""Bytes: no manifest of ours comes near."""


def manifest(digests: Mapping[str, str]) -> bytes:
    """The text for files of these names and SHA-256 digests (hexadecimal)."""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()
    return lines + _SEAL + hashlib.sha256(lines).hexdigest().encode() + b"\n"


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None when it is exactly what its manifest says.

    Every file is read. A file that is not listed, a link and anything that is no plain file are faults as well."""
    if checkpoint.is_symlink():
        return "is a symbolic link"
    try:
        with _open_plain(checkpoint / MANIFEST) as handle:
            digests = _parse(handle.read(_LONGEST))
        present = set(os.listdir(checkpoint))
    except OSError:
        return f"{MANIFEST} is missing or unreadable"
    if digests is None:
        return f"{MANIFEST} is damaged"
    for name in REQUIRED:
        if name not in digests:
            return f"{MANIFEST} lists no {name}"
    for name in sorted(present - {MANIFEST, *digests}):
        return f"{name} is not listed in {MANIFEST}"
    for name, digest in digests.items():
        try:
            with _open_plain(checkpoint / name) as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    return f"{name} does not match its hash"
        except OSError:
            return f"{name} is missing or unreadable"
    return None


def _parse(text: bytes) -> dict[str, str] | None:
    """Digest by name, or None for what `manifest` cannot have written."""
    lines, seal, digest = text.rpartition(_SEAL)
    if not seal or digest != hashlib.sha256(lines).hexdigest().encode() + b"\n":
        return None
    entries = [_ENTRY.fullmatch(line) for line in lines.removesuffix(b"\n").split(b"\n")]
    digests = {entry[2].decode(): entry[1].decode() for entry in entries if entry}
    return digests if len(digests) == len(entries) and MANIFEST not in digests else None


def _open_plain(file: Path) -> BufferedReader:
    """Opens a plain file for reading, without following a link or waiting for a pipe. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{file} is no plain file")
    return os.fdopen(descriptor, "rb")
