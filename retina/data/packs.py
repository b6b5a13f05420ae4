"""Images in a few large files instead of many small ones: a folder of tar archives with an index. Beside the road.

    train/00000.tar, 00001.tar, ...   uncompressed; `tar xf` gives the files back
    train/pack.index/                 columns: names, and where in which archive the bytes are, with their SHA-256

An image has the path that it would have as a file of that folder (`train/a.jpg`), so all that reads images reads those
of a pack too. A file that is there comes first. `retina pack` makes packs (retina/data/pack_writer.py).
"""

import bisect
import hashlib
import io
import os
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retina.data.columns import Columns, read_columns
from retina.data.paths import Folder, name_problem, parted
from retina.data.paths import list_folders as list_files
from retina.errors import DataError
from retina.files import descriptor_of

INDEX = "pack.index"
COLUMNS = {"names": np.uint8, "name_offsets": np.int64, "shards": np.int32, "offsets": np.int64, "sizes": np.int64}
COLUMNS |= {"digests": np.uint8}
_LARGEST = 1 << 28
"""Bytes of an image that is read at once, and compared with its digest. Larger ones are read as they are asked for."""
_OPEN_SHARDS = 64


def shard_name(number: int) -> str:
    return f"{number:05}.tar"


class Stored(NamedTuple):
    """An image of a pack."""

    pack: "Pack"
    row: int
    size: int
    """Bytes."""

    def open(self, *, whole: bool) -> Any:
        """whole: read with a single system call; the first time in a process, it is compared with its digest. Raises
        DataError, OSError."""
        shard, offset = self.pack.locate(self.row)
        if not whole or self.size > _LARGEST:
            return _Part(shard, offset, self.size)
        data = os.pread(shard.descriptor, self.size, offset)
        if not self.pack.verified[self.row] or len(data) < self.size:
            if hashlib.sha256(data).digest() != self.pack.digest(self.row):
                raise self.pack.altered(self.row)
            self.pack.verified[self.row] = True
        return io.BytesIO(data)

    def version(self) -> tuple[int, int]:
        """Bytes, and what changes with them."""
        return self.size, int.from_bytes(self.pack.digest(self.row)[:6], "little")


class Pack:
    """A folder that holds a pack, whoever made it: what its index says is compared with the archives."""

    def __init__(self, folder: Path, index: Columns) -> None:
        """Raises DataError for an index that is not built like one."""
        self.folder, self.columns = folder, index.arrays
        self._shard = lru_cache(_OPEN_SHARDS)(lambda number: _Shard(folder / shard_name(number)))
        kinds = {name: (array.dtype, array.shape[1:]) for name, array in self.columns.items()}
        rows = {len(array) - (name == "name_offsets") for name, array in self.columns.items() if name != "names"}
        if (
            kinds != {name: (np.dtype(kind), (32,) * (name == "digests")) for name, kind in COLUMNS.items()}
            or len(rows) > 1
        ):
            raise self.fault(f"{INDEX} is not that of a pack")
        self.verified = np.zeros(len(self), np.bool_)
        """The images that this process has compared with their digests."""

    def __len__(self) -> int:
        return len(self.columns["sizes"])

    def name(self, row: int) -> str:
        """Relative to the folder, with `/`."""
        return self._encoded(row).decode("utf-8", "surrogateescape")

    def names(self) -> Iterator[str]:
        """Of all images. Raises DataError for one that leads elsewhere."""
        for row in range(len(self)):
            name = self.name(row)
            if not name or name_problem(name, allow_outside=False):
                raise self.fault(f"{INDEX} names {name!r:.80}, which is no path within the folder")
            yield name

    def find(self, name: str) -> Stored | None:
        """The image of that name, if it is there."""
        wanted = name.encode("utf-8", "surrogateescape")
        row = bisect.bisect_left(range(len(self)), wanted, key=self._encoded)
        if row == len(self) or self._encoded(row) != wanted:
            return None
        return self.stored(row)

    def stored(self, row: int) -> Stored:
        """The image of a row."""
        return Stored(self, row, int(self.columns["sizes"][row]))

    def digest(self, row: int) -> bytes:
        """SHA-256 of the image's bytes, when it was packed."""
        return self.columns["digests"][row].tobytes()

    def locate(self, row: int) -> "tuple[_Shard, int]":
        """The archive and the place of an image in it. Raises DataError for a place outside, OSError."""
        number, offset, size = (int(self.columns[name][row]) for name in ("shards", "offsets", "sizes"))
        if min(number, offset, size) < 0:
            raise self.fault(f"{INDEX} has {self.name(row)} outside of any archive", row)
        try:
            shard: _Shard = self._shard(number)
        except OSError as error:
            problem = f"{shard_name(number)} cannot be read ({error.strerror})"
            raise self.fault(problem, row) from error
        if offset + size > shard.size:
            raise self.fault(f"{shard_name(number)} ends before {self.name(row)} does", row)
        return shard, offset

    def altered(self, row: int) -> DataError:
        return self.fault(f"is not what was packed into {shard_name(int(self.columns['shards'][row]))}", row)

    def fault(self, problem: str, row: int | None = None) -> DataError:
        return _damaged(self.folder if row is None else self.folder / self.name(row), problem)

    def _encoded(self, row: int) -> bytes:
        begin, end = self.columns["name_offsets"][row : row + 2].tolist()
        return self.columns["names"][begin:end].tobytes()


class _Shard:
    """An archive that is open. Threads and forked processes may read it together: a read states its place."""

    def __init__(self, file: Path) -> None:
        self.descriptor = descriptor_of(file, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if "descriptor" in self.__dict__:
            os.close(self.descriptor)


class _Part(io.RawIOBase):
    """A part of an archive, as a file of its own."""

    def __init__(self, shard: _Shard, offset: int, size: int) -> None:
        self._shard, self._offset, self._size, self._at = shard, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        count = os.preadv(self._shard.descriptor, [view], self._offset + self._at) if view else 0
        self._at += count
        return count


def pack_of(folder: str | Path) -> Pack | None:
    """The pack that lies in a folder. Raises DataError for a damaged one."""
    try:
        status = os.stat(os.path.join(folder, INDEX, "notes.json"))
    except (OSError, ValueError):
        return None
    return _opened(str(folder), status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(16)
def _opened(folder: str, *state: int) -> Pack:
    """`state` changes when the index is replaced."""
    columns = read_columns(Path(folder, INDEX))
    if columns is None:
        raise _damaged(Path(folder), f"{INDEX} is damaged or of another kind")
    return Pack(Path(folder), columns)


def _damaged(place: Path, problem: str) -> DataError:
    fix = "copy the pack again, or make it anew with tools/pack.py"
    return DataError(f"{place}: {problem} - {fix}", code="damaged-pack")


def find_stored(path: Path) -> Stored | None:
    """The image that a pack in one of the folders above holds under that path. Raises DataError."""
    folder, slash, _ = str(path).rpartition("/")
    while slash:
        if pack := pack_of(folder or "/"):
            return pack.find(str(path)[len(folder) + 1 :])
        folder, slash, _ = folder.rpartition("/")
    pack = pack_of(".")  # of a relative path
    return pack.find(str(path)) if pack else None


def version_of(path: Path) -> tuple[int, int]:
    """Bytes of an image file, or of an image in a pack, and a number that changes with them. Raises OSError where there
    is none."""
    try:
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    except FileNotFoundError:
        if stored := find_stored(path):
            return stored.version()
        raise


def open_stored(path: Path) -> Any:
    """An image file, or an image in a pack, as bytes. Raises OSError where there is none, DataError."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        if stored := find_stored(path):
            return stored.open(whole=False)
        raise


def packed_paths(folder: Path) -> list[Path]:
    """Paths of all images in packs at or below a folder."""
    packs = (pack_of(parent) for parent, folders, _ in os.walk(folder) if INDEX in folders)
    return [pack.folder / name for pack in packs if pack for name in pack.names()]


def is_shard(path: Path) -> bool:
    """Whether it is an archive of a pack."""
    number = path.name.removesuffix(".tar")
    return number.isdigit() and path.name != number and stat.S_ISDIR(_mode(path.parent / INDEX))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def list_folders(root: Path, names: Iterable[str]) -> dict[str, Folder]:
    """`retina.data.paths.list_folders`, with what lies in packs at or below `root`."""
    folders = list_files(root, names)
    insides: dict[Path, dict[str, set[str]]] = {}
    for parent, folder in folders.items():
        place = root / parent
        above = (place, *place.parents)
        pack = next(filter(None, map(pack_of, above[: above.index(root) + 1])), None) if root in above else None
        if pack is None:
            continue
        if pack.folder not in insides:
            inside = insides[pack.folder] = {}
            for name_parent, last in map(parted, pack.names()):
                inside.setdefault(name_parent, set()).add(last)
        within = place.relative_to(pack.folder).as_posix()
        packed = insides[pack.folder].get("" if within == "." else within, ())
        folders[parent] = folder._replace(names=folder.names.union(packed))
    return folders
