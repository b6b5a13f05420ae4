"""Files of named arrays that are mapped into memory, with every byte verified before it is used.

The first line is the digest of the second; the second is JSON with the type, shape, place and digest of every column;
then come the columns, raw and little-endian, each at a multiple of 64 bytes. Nothing in it can be executed.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from retina.files import sync_folder

_CHUNK = 4 << 20
_ALIGNMENT = 64
_THREADS = min(8, os.cpu_count() or 1)


class Columns(NamedTuple):
    """The content of a file."""

    arrays: Mapping[str, np.ndarray]
    """As read, they are mapped from the file and private to the process: what is written into one goes nowhere else."""
    notes: dict[str, Any]
    """What else there is to keep, as JSON knows it."""


def write_columns(file: Path, columns: Columns) -> None:
    """Writes the file whole, and reads it back, before it takes its name. Raises OSError; then nothing is left behind.

    Several processes may write the same file at once."""
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=file.parent)
    try:
        with open(descriptor, "wb") as stream:
            _write(stream, columns)
            stream.flush()
            os.fsync(stream.fileno())
        with open(name, "rb") as stream:
            if _read(stream) is None:
                raise OSError(errno.EIO, "it does not hold what was written")
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def read_columns(file: Path) -> Columns | None:
    """None if the file is missing, damaged or cannot be read."""
    try:
        with file.open("rb") as stream:
            return _read(stream)
    except (OSError, ValueError):
        return None


def digest_of(data: memoryview) -> str:
    """SHA-256 over the SHA-256 of each 4 MB, which threads compute side by side."""
    return _digest(lambda start, length: data[start : start + length], len(data))


def digest_in(stream: BinaryIO, begin: int, size: int) -> str:
    """`digest_of` a part of a file. A file cut off meanwhile has another digest, and does no harm. Raises OSError."""
    descriptor = stream.fileno()
    return _digest(lambda start, length: os.pread(descriptor, length, begin + start), size)


def _digest(read: Callable[[int, int], bytes | memoryview], size: int) -> str:
    def part(start: int) -> bytes:
        return hashlib.sha256(read(start, min(_CHUNK, size - start))).digest()

    starts = range(0, size, _CHUNK)
    if len(starts) <= 1:
        return hashlib.sha256(b"".join(map(part, starts))).hexdigest()
    with ThreadPoolExecutor(_THREADS) as pool:
        return hashlib.sha256(b"".join(pool.map(part, starts))).hexdigest()


def _write(stream: BinaryIO, columns: Columns) -> None:
    contents = {name: array.reshape(-1).view(np.uint8).data for name, array in columns.arrays.items()}
    described: dict[str, dict[str, Any]] = {}
    start = 0
    for name, content in contents.items():
        array = columns.arrays[name]
        described[name] = {"type": array.dtype.str, "shape": array.shape, "start": start, "digest": digest_of(content)}
        start += len(content) + -len(content) % _ALIGNMENT
    header = json.dumps({"columns": described, "notes": columns.notes}).encode("ascii")
    header += b" " * (-(64 + 1 + len(header) + 1) % _ALIGNMENT)
    stream.write(hashlib.sha256(header).hexdigest().encode("ascii") + b"\n" + header + b"\n")
    for content in contents.values():
        stream.write(content)
        stream.write(b"\0" * (-len(content) % _ALIGNMENT))


def _read(stream: BinaryIO) -> Columns | None:
    """None if it is damaged. Raises OSError; ValueError for what was never such a file."""
    digest, header = stream.readline()[:-1], stream.readline()[:-1]
    begin = stream.tell()
    if hashlib.sha256(header).hexdigest().encode("ascii") != digest:
        return None
    content = json.loads(header)
    places = []
    for name, about in content["columns"].items():
        kind, start, count = np.dtype(about["type"]), begin + about["start"], math.prod(about["shape"])
        # not through the mapping, where a bad sector would end the process
        if digest_in(stream, start, count * kind.itemsize) != about["digest"]:
            return None
        places.append((name, kind, count, start, about["shape"]))
    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    arrays = {
        name: np.frombuffer(mapped, kind, count, start).reshape(shape) for name, kind, count, start, shape in places
    }
    return Columns(arrays, content["notes"])
