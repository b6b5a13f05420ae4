"""File names of annotation files: they stay inside the image folder, and each folder is listed once, not each file."""

import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

_UNUSUAL = re.compile(r"\0|\\|^/|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)|[\ud800-\udfff]")
_THREADS = 8
"""Folders listed at a time, to hide the latency of a network disk."""


class Folder(NamedTuple):
    """What one folder holds, as far as it can be listed."""

    names: frozenset[str]
    links: frozenset[str]
    """Those of the names that are symbolic links."""
    fault: str | None
    """Why it cannot be listed, in the system's words."""


def name_problem(name: str, *, allow_outside: bool) -> str | None:
    """What makes a file name unfit or leads it out of the image folder by its spelling alone, as "problem - fix"."""
    if not _UNUSUAL.search(name):
        return None
    try:
        os.fsencode(name)
        storable = "\0" not in name
    except UnicodeEncodeError:
        storable = False
    if not storable:
        return "file_name holds characters that no file name can have - correct it"
    if allow_outside:
        return None
    if name.startswith("/"):
        problem = "is an absolute path"
    elif re.match("[A-Za-z]:", name):
        problem = "names a drive"
    elif "\\" in name:
        problem = "has backslashes"
    elif posixpath.normpath(name).split("/")[0] == "..":
        problem = "leads out of the image folder"
    else:
        return None
    return f"file_name {problem} - write it relative to the image folder, with /, or set allow_outside=true"


def parted(name: str) -> tuple[str, str]:
    """A name's folder, which is "" for the image folder itself, and its last part."""
    parent, slash, last = name.rpartition("/")
    return parent or slash, last


def list_folders(root: Path, names: Iterable[str]) -> dict[str, Folder]:
    """The folders under `root` that `names` lie in, by what stands before the last `/` of a name."""
    return {parent: _list(os.path.join(root, parent)) for parent in {parted(name)[0] for name in names}}


def links_outside(root: Path, names: Sequence[str]) -> dict[int, str]:
    """Positions of the names that symbolic links lead out of `root`, and where to. `root` itself may be a link.

    Names must be sound by `name_problem`. One listing per folder instead of a look at every file."""
    inside = _inside(root)
    targets = {parent: os.path.realpath(os.path.join(root, parent)) for parent in {parted(name)[0] for name in names}}
    folders = {p: _list(os.path.join(root, p)) for p, target in targets.items() if inside(target)}
    outside = {}
    for position, name in enumerate(names):
        parent, last = parted(name)
        if parent not in folders:
            outside[position] = os.path.join(targets[parent], last)
        elif last in folders[parent].links or last in ("", ".", ".."):
            target = os.path.realpath(os.path.join(root, name))
            if not inside(target):
                outside[position] = target
    return outside


def _inside(root: Path) -> Callable[[str], bool]:
    """Whether a resolved path is `root`, or lies in it."""
    start = os.path.realpath(root).rstrip(os.sep) + os.sep
    return lambda target: f"{target}{os.sep}".startswith(start)


def folders_of(names: Iterable[str]) -> set[str]:
    """The folders that `names` lie in. A name that is a folder itself ("a/..") counts as one."""
    parts = ((name, *parted(name)) for name in names)
    return {name if last in ("", ".", "..") else parent for name, parent, last in parts}


def folder_stamps(root: Path, folders: Iterable[str]) -> dict[str, list[int]]:
    """What no longer holds once something was put into a folder, by folder. Those that changed in the last two seconds
    are left out, since clocks of file systems are coarse; so are those that are not there."""
    settled = time.time_ns() - 2_000_000_000
    stamps = {folder: _stamp(os.path.join(root, folder)) for folder in folders}
    return {folder: stamp for folder, stamp in stamps.items() if stamp and max(stamp[1:]) < settled}


def is_free_of_links(root: Path, folders: Iterable[str], known: Mapping[str, Sequence[int]]) -> bool:
    """Whether `links_outside` would find nothing, whatever the names in these folders (see `folders_of`): they lie
    inside `root` and hold no link. False is no finding yet, because links may stay inside.

    Folders that are as they were by their `known` stamps held no link then, and are not listed again."""
    inside = _inside(root)

    def is_free(folder: str) -> bool:
        path = os.path.join(root, folder)
        if not inside(os.path.realpath(path)):
            return False
        if folder in known and known[folder] == _stamp(path):
            return True
        try:
            with os.scandir(path) as entries:
                return not any(map(os.DirEntry.is_symlink, entries))
        except OSError:  # nothing there that could be opened
            return True

    with ThreadPoolExecutor(_THREADS) as pool:
        return all(pool.map(is_free, folders))


def is_listed(name: str, folders: Mapping[str, Folder]) -> bool:
    """Whether a file of exactly that name was there when the folders were listed."""
    parent, last = parted(name)
    return last in folders[parent].names


def _list(folder: str) -> Folder:
    try:
        with os.scandir(folder) as entries:
            links = {entry.name: entry.is_symlink() for entry in entries}
    except (OSError, ValueError) as error:
        return Folder(frozenset(), frozenset(), getattr(error, "strerror", None) or str(error))
    return Folder(frozenset(links), frozenset(name for name, is_link in links.items() if is_link), None)


def _stamp(folder: str) -> list[int] | None:
    """Unlike the time of modification, the time of change cannot be set by those who may write into the folder."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
