"""Folders of named arrays (`NAME.npy`) and notes, which are mapped into memory after every byte has been verified.

The first line of notes.json is the digest of the second; the second is JSON with the digest of every array's file.
Nothing in the folder can be executed: numpy refuses pickles here. Beside the road.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from retina.files import open_plain, read_plain, remove, sync_folder, write_synced

CHUNK = 4 << 20
_THREADS = min(8, os.cpu_count() or 1)


class Columns(NamedTuple):
    """The content of a folder."""

    arrays: Mapping[str, np.ndarray]
    """As read, they are mapped from the files, and private to the process: the files never change."""
    notes: dict[str, Any]
    """What else there is to keep, as JSON knows it."""


def write_columns(folder: Path, columns: Columns) -> None:
    """Writes the folder whole, and reads it back, before it takes its name. Raises OSError and leaves nothing behind.

    Several processes may write the same folder at once."""
    temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder.parent))
    former = temporary.with_suffix(".old.tmp")
    try:
        digests = {name: _write(temporary / f"{name}.npy", array) for name, array in columns.arrays.items()}
        notes = json.dumps({"columns": digests, "notes": columns.notes}).encode("ascii")
        write_synced(temporary / "notes.json", hashlib.sha256(notes).hexdigest().encode("ascii") + b"\n" + notes)
        if read_columns(temporary) is None:
            raise OSError(errno.EIO, "it does not hold what was written")
        sync_folder(temporary)
        with suppress(FileNotFoundError):
            folder.rename(former)
        try:
            temporary.rename(folder)
        except OSError:  # another process may have been faster, with the same content
            if not folder.is_dir():
                raise
    finally:
        for rest in (temporary, former):
            with suppress(OSError):
                remove(rest)
    sync_folder(folder.parent)


def read_columns(folder: Path) -> Columns | None:
    """None if the folder is missing, damaged or cannot be read."""
    try:
        digest, _, notes = read_plain(folder / "notes.json").partition(b"\n")
        if hashlib.sha256(notes).hexdigest().encode("ascii") != digest:
            return None
        content = json.loads(notes)
        arrays = {name: _read(folder / f"{name}.npy", digest) for name, digest in content["columns"].items()}
    except Exception:  # of other files, numpy and json raise whatever they stumble over
        return None
    return Columns(arrays, content["notes"])


def _write(file: Path, array: np.ndarray) -> str:
    """Writes one array and returns the file's digest. Raises OSError, ValueError for Python objects."""
    with open_plain(file, "x+b") as stream:
        np.save(stream, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
        stream.flush()
        digest = digest_in(stream, 0, stream.tell())
        os.fsync(stream.fileno())
    return digest


def _read(file: Path, digest: str) -> np.ndarray:
    """The mapped array. Raises ValueError if it is not the one that was written, OSError."""
    with file.open("rb") as stream:  # not through the mapping, where a bad sector would end the process
        if digest_in(stream, 0, os.fstat(stream.fileno()).st_size) != digest:
            raise ValueError("damaged")
    return np.load(file, mmap_mode="c", allow_pickle=False).view(np.ndarray)


def digest_of(data: memoryview) -> str:
    """SHA-256 over the SHA-256 of each 4 MB, which threads compute side by side."""
    return _digest(lambda start, length: data[start : start + length], len(data))


def digest_in(stream: BinaryIO, begin: int, size: int) -> str:
    """`digest_of` a part of a file. A file cut off meanwhile has another digest, and does no harm. Raises OSError."""
    descriptor = stream.fileno()
    return _digest(lambda start, length: os.pread(descriptor, length, begin + start), size)


def _digest(read: Callable[[int, int], bytes | memoryview], size: int) -> str:
    def part(start: int) -> bytes:
        return hashlib.sha256(read(start, min(CHUNK, size - start))).digest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return hashlib.sha256(b"".join(pool.map(part, range(0, size, CHUNK)))).hexdigest()
