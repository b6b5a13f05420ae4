"""The result of reading a large annotation file, stored as columns for the next start and for other processes.

Parsing gigabytes of JSON takes minutes and many times their size in memory. An entry of this cache is there in seconds,
and all processes of a machine share its pages.

An entry is named by the SHA-256 of the JSON's bytes, of what was asked of them, and of the rules they were read by (the
sources of this folder): whatever changes, there is no entry of that name yet. A damaged one counts as missing.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from retina.data.annotations import Annotations
from retina.data.columns import Columns, digest_in, read_columns, write_columns
from retina.data.paths import folder_stamps, folders_of, is_free_of_links, links_outside
from retina.files import advice, descriptor_of, lock, make_folder, remove

CACHE_FROM_BYTES = 32 << 20
"""Bytes of JSON from which on an entry pays: parsing them takes seconds. Smaller files are not even hashed."""
_UNUSED_SECONDS = 30 * 24 * 3600
"""An entry that nobody read for so long is removed when another one is written."""
_PAUSE = 0.2
"""Seconds between looks whether another process has made an entry."""
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


def entry_of(digest: str, size: int, request: Request) -> Path | None:
    """`find_entry` of a file of so many bytes with that digest."""
    return _entry(digest, request) if size >= CACHE_FROM_BYTES else None


def _entry(source: str, request: Request) -> Path | None:
    folder = cache_folder()
    key = json.dumps([source, request, _rules()])
    return folder / f"{hashlib.sha256(key.encode('ascii')).hexdigest()}.annotations" if folder else None


@cache
def _rules() -> str:
    """Digest of the code that reads and checks annotations, so that nobody has to remember to raise a version."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


@contextmanager
def only_one(entry: Path) -> Iterator[None]:
    """Waits while another process, on this machine or on another with the same folder, is about to make that entry. It
    may not have succeeded: look for the entry anew. Where there are no locks, nobody waits."""
    file = entry.with_suffix(".lock")
    try:
        make_folder(file.parent, mode=0o700)
        descriptor = descriptor_of(file, os.O_RDWR | os.O_CREAT)
    except OSError:
        yield
        return
    try:
        while _is_taken(descriptor):
            time.sleep(_PAUSE)
        yield
    finally:
        with suppress(OSError):
            remove(file)
        os.close(descriptor)


def _is_taken(descriptor: int) -> bool:
    try:
        lock(descriptor)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


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
