"""What came of reading a large annotation file, kept as columns for the next start and for the other processes.

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
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from retina.data.annotations import Annotations
from retina.data.columns import Columns, digest_in, digest_of, read_columns, write_columns
from retina.data.paths import folder_stamps, folders_of, is_free_of_links, links_outside

WORTH = 32 << 20
"""Bytes of JSON from which on an entry pays: parsing them takes seconds. Smaller files are not even hashed."""
_UNUSED_SECONDS = 30 * 24 * 3600
"""An entry that nobody read for so long is removed when another one is written."""
_COLUMNS = [f.name for f in fields(Annotations) if f.name not in ("file", "image_root", "classes", "category_ids")]


class Request(NamedTuple):
    """What a reading depends on besides the file and, unless `allow_outside`, the links in the image folder."""

    classes: list[str] | None
    allow_outside: bool
    encoding: str = sys.getfilesystemencoding()
    """Of file names on this machine: some cannot hold every name."""


class Reading(NamedTuple):
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
    folder = cache_folder()
    try:
        if folder is None or not file.is_file() or file.stat().st_size < WORTH:
            return None
        with file.open("rb") as stream:
            return folder / _name(digest_in(stream, 0, os.fstat(stream.fileno()).st_size), request)
    except OSError:  # told by whoever reads the file
        return None


def entry_of(data: bytes, request: Request) -> Path | None:
    """`find_entry` of a file that holds `data`."""
    folder = cache_folder()
    return folder / _name(digest_of(memoryview(data)), request) if folder and len(data) >= WORTH else None


def keep(entry: Path, reading: Reading, *, allow_outside: bool) -> str | None:
    """Writes an entry; its folder is the user's alone. Returns what is to be told if it cannot be written."""
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
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_columns(entry, Columns({name: getattr(annotations, name) for name in _COLUMNS}, notes))
    except OSError as fault:
        return (
            f"{entry.parent}: annotations cannot be kept for the next start ({fault.strerror or fault}) - make room, "
            "or set the environment variable RETINA_CACHE to another folder, or to nothing"
        )
    _remove_unused(entry.parent)
    return None


def recall(entry: Path, file: Path, image_root: Path, *, allow_outside: bool) -> Reading | None:
    """The reading of `file` as it was kept. None if there is none, or if a link now leads an image out of `image_root`:
    that is for the reader to tell."""
    columns = read_columns(entry)
    if columns is None:
        return None
    with suppress(OSError):  # somebody else's
        os.utime(entry)
    notes = columns.notes
    annotations = Annotations(
        file=file,
        image_root=image_root,
        classes=tuple(notes["classes"]),
        category_ids=tuple(notes["category_ids"]),
        **columns.arrays,
    )
    if not allow_outside and not is_free_of_links(image_root, notes["folders"], notes["stamps"]):
        names = [annotations.file_name(row) for row in range(len(annotations))]
        if links_outside(image_root, names):
            return None
    faults, warnings = ([f"{file}: {line}" for line in notes[kind]] for kind in ("faults", "warnings"))
    return Reading(annotations, faults, warnings)


def _name(source: str, request: Request) -> str:
    key = json.dumps([source, request, _rules()])
    return hashlib.sha256(key.encode("ascii")).hexdigest() + ".annotations"


@cache
def _rules() -> str:
    """Digest of the code that reads and checks annotations, so that nobody has to remember to raise a version."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _remove_unused(folder: Path) -> None:
    for file in _all(folder):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            if time.time() - file.stat().st_mtime > _UNUSED_SECONDS:
                file.unlink()


def _all(folder: Path) -> Iterator[Path]:
    """Entries, and what killed processes left of some."""
    for pattern in ("*.annotations", ".*.tmp"):
        yield from folder.glob(pattern)
