"""The result of reading a large annotation file, stored as columns for the next start and for other processes.

Parsing gigabytes of JSON takes minutes and many times their size in memory. An entry of this cache is there in seconds,
and all processes of a machine share its pages.

An entry is named by the SHA-256 of the JSON's bytes, of what was asked of them, and of the rules they were read by (the
sources of this folder): whatever changes, there is no entry of that name yet. A damaged one counts as missing.
"""

import errno
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from retina.data.annotations import Annotations
from retina.data.paths import folder_stamps, folders_of, is_free_of_links, links_outside
from retina.files import advice, make_folder, open_plain, read_plain, remove, sync_folder, write_synced

CACHE_FROM_BYTES = 32 << 20
"""Bytes of JSON from which on an entry pays: parsing them takes seconds. Smaller files are not even hashed."""
_UNUSED_SECONDS = 30 * 24 * 3600
"""An entry that nobody read for so long is removed when another one is written."""
_OTHERS = ("file", "image_root", "classes", "category_ids", "pixels")
_COLUMNS = [f.name for f in fields(Annotations) if f.name not in _OTHERS]


class Request(NamedTuple):
    """What a reading depends on besides the file and, unless `allow_outside`, the links in the image folder."""

    classes: list[str] | None
    allow_outside: bool
    ids_only: bool = False
    encoding: str = sys.getfilesystemencoding()
    """Of file names on this machine: some cannot hold every name."""


class CachedAnnotations(NamedTuple):
    """Annotations, and the lines on what was left out of them or is odd."""

    annotations: Annotations
    faults: list[str]
    warnings: list[str]


def cache_folder() -> Path | None:
    """`$RETINA_CACHE`, else `retina` in `$XDG_CACHE_HOME` or `~/.cache`; None where RETINA_CACHE is set to nothing.

    Whoever may write there decides what is trained on."""
    if (chosen := os.environ.get("RETINA_CACHE")) is not None:
        return Path(chosen) if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "retina")
    except RuntimeError:  # there is no home
        return None


def find_entry(file: Path, request: Request) -> Path | None:
    """Where the reading of `file` belongs, be it there or not; None if the file is small or cannot be read."""
    try:
        if not file.is_file() or file.stat().st_size < CACHE_FROM_BYTES:
            return None
        with file.open("rb") as stream:
            return _entry(digest_in(stream, 0, os.fstat(stream.fileno()).st_size), request)
    except OSError:  # the reader of the file reports it
        return None


def entry_of(data: bytes, request: Request) -> Path | None:
    """`find_entry` of a file that holds `data`."""
    return _entry(digest_of(memoryview(data)), request) if len(data) >= CACHE_FROM_BYTES else None


def _entry(source: str, request: Request) -> Path | None:
    folder = cache_folder()
    key = json.dumps([source, request, _rules()])
    return folder / f"{hashlib.sha256(key.encode('ascii')).hexdigest()}.annotations" if folder else None


@cache
def _rules() -> str:
    """Digest of the code that reads and checks annotations, so that nobody has to remember to raise a version."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def store(entry: Path, reading: CachedAnnotations, *, allow_outside: bool) -> str | None:
    """Writes an entry; its folder is the user's alone. Returns a warning if it cannot be written."""
    annotations = reading.annotations
    start = f"{annotations.file}: "  # which may lie elsewhere next time
    notes: dict[str, Any] = {
        "classes": annotations.classes,
        "category_ids": annotations.category_ids,
        "faults": [line.removeprefix(start) for line in reading.faults],
        "warnings": [line.removeprefix(start) for line in reading.warnings],
    }
    if not allow_outside:
        folders = folders_of(annotations.file_name(row) for row in range(len(annotations)))
        stamps = folder_stamps(annotations.image_root, folders)
        is_free = is_free_of_links(annotations.image_root, folders, {})
        notes |= {"folders": sorted(folders), "stamps": stamps if is_free else {}}
    try:
        make_folder(entry.parent, mode=0o700)
        write_columns(entry, Columns({name: getattr(annotations, name) for name in _COLUMNS}, notes))
    except OSError as fault:
        problem = f"annotations cannot be kept for the next start ({fault.strerror or fault})"
        fix = f"{advice(fault)}, or set the environment variable RETINA_CACHE to another folder, or to nothing"
        return f"{entry.parent}: {problem} - {fix}"
    for file in (*entry.parent.glob("*.annotations"), *entry.parent.glob(".*.tmp")):  # entries, and parts of some
        with suppress(OSError):  # somebody else's, or gone meanwhile
            if time.time() - file.stat().st_mtime > _UNUSED_SECONDS:
                remove(file)
    return None


def load(entry: Path, file: Path, image_root: Path, *, allow_outside: bool) -> CachedAnnotations | None:
    """The reading of `file` as it was kept. None if there is none, or if a link now leads an image out of `image_root`:
    the reader reports that."""
    columns = read_columns(entry)
    if columns is None:
        return None
    with suppress(OSError):  # somebody else's
        os.utime(entry)
    notes = columns.notes
    values: Any = {name: tuple(notes[name]) for name in ("classes", "category_ids")} | {**columns.arrays}
    annotations = Annotations(file=file, image_root=image_root, **values)
    unclear = not allow_outside and not is_free_of_links(image_root, notes["folders"], notes["stamps"])
    if unclear and links_outside(image_root, [annotations.file_name(row) for row in range(len(annotations))]):
        return None
    faults, warnings = ([f"{file}: {line}" for line in notes[kind]] for kind in ("faults", "warnings"))
    return CachedAnnotations(annotations, faults, warnings)


# Folders of named arrays (`NAME.npy`) and notes, which are mapped into memory after every byte has been verified.
#
# The first line of notes.json is the digest of the second; the second is JSON with the digest of every array's file.
# Nothing in the folder can be executed: numpy refuses pickles here.
_CHUNK = 4 << 20
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
        return hashlib.sha256(read(start, min(_CHUNK, size - start))).digest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return hashlib.sha256(b"".join(pool.map(part, range(0, size, _CHUNK)))).hexdigest()
