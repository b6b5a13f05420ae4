"""The one place where files and folders are written (tests/test_layout.py): whole or not at all, whatever happens
meanwhile, a full disk, a kill, lost power; and never through a link or a pipe that somebody has put in the way."""

import errno
import os
import shutil
import stat
from collections import deque
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.ENOENT: "put it back where it was, or correct the path",
    errno.EROFS: "mount the disk for writing, and look why the system made it read-only",
    errno.EIO: "the disk fails: look at the system's log, and choose another disk",
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN), "mount the network disk anew"),
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "make memory free",
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.ELOOP), "move what is in the way"
    ),
}


def advice(fault: OSError) -> str:
    """How to mend what a file system says."""
    return _ADVICE.get(fault.errno or 0, "correct the path, or choose another disk")


def make_folder(folder: Path, within: Path | None = None, *, mode: int = 0o777) -> None:
    """Makes a folder and its parents, unless they are there. Raises OSError.

    within: a folder above it that the user named, wherever that leads. Below it a link is a fault: it could lead out.
    mode: of what is made."""
    if within in (None, folder):
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        return
    make_folder(folder.parent, within)
    try:
        folder.mkdir(mode=mode)
    except FileExistsError:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise OSError(errno.EEXIST, "is a link or no folder", str(folder)) from None


class Place:
    """A folder that may be made, but only once: whoever moves or deletes it meanwhile does not get it anew, half full,
    and another that takes its name is not written into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._inode: int | None = None
        self._descriptor: int | None = None  # while it is open, no other folder gets this inode

    def check(self) -> None:
        """Raises OSError when the folder is not the one that was there at the first call, if there was one."""
        try:
            inode = self.folder.stat().st_ino
        except FileNotFoundError:
            inode = None
        if self._inode is None:
            self._inode = inode
            if inode is not None and hasattr(os, "O_DIRECTORY"):
                self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        elif inode != self._inode:
            raise OSError(errno.ENOENT, "was moved or deleted", str(self.folder))

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def descriptor_of(file: Path, flags: int, *, follow: bool = False) -> int:
    """`os.open` of a plain file. What is a link (unless `follow`), a pipe or a device raises OSError at once: the one
    leads elsewhere, the others wait for ever."""
    try:
        descriptor = os.open(file, open_flags(flags, "O_NONBLOCK", *(() if follow else ("O_NOFOLLOW",))), 0o666)
    except OSError as fault:
        if fault.errno not in (errno.ELOOP, errno.ENXIO):  # ENXIO: of a pipe that nobody reads
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise OSError(errno.EEXIST, "is a link or no plain file", str(file))


def open_plain(file: Path, mode: str, *, buffering: int = -1, follow: bool = False) -> Any:
    """`open` in a binary mode, by way of `descriptor_of`."""
    return open(file, mode, buffering, opener=lambda _, flags: descriptor_of(file, flags, follow=follow))


def read_plain(file: Path) -> bytes:
    """The content of a plain file, or of one that a link leads to. Raises OSError for anything else."""
    with open_plain(file, "rb", follow=True) as handle:
        return bytes(handle.read())


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, if there is one. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(file: Path, data: bytes | Iterable[bytes], temporary: Path | None = None) -> None:
    """Writes `data`, or one part of it after the other, beside `file`, or to `temporary`, and renames once, so that a
    reader sees the old file or the new one, never a half. A link of that name is replaced, not followed.

    Raises OSError; then what was there before is untouched and nothing is left beside it."""
    temporary = temporary or temporary_of(file)
    try:
        temporary.unlink(missing_ok=True)
        write_synced(temporary, data)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def temporary_of(file: Path) -> Path:
    """Where `write_whole` writes; a kill may leave it behind."""
    return file.with_name(f".{file.name}.tmp")


def write_synced(file: Path, data: bytes | Iterable[bytes]) -> None:
    """Writes a new file and waits until it is on the disk. Raises OSError, also where there is something already."""
    with open_plain(file, "xb") as handle:
        for part in [data] if isinstance(data, bytes) else data:
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk. Some network shares cannot tell, nor can Windows; they are
    believed."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def open_flags(flags: int, *names: str) -> int:
    """`flags` for `os.open`, with those of `names` that this system has: Windows knows no `O_NOFOLLOW`, and needs
    `O_BINARY`."""
    for name in ("O_BINARY", *names):
        flags |= getattr(os, name, 0)
    return flags


def lock(descriptor: int) -> bool:
    """Locks an open file for this process, or says that neither the file system nor Windows has such locks (False).

    It is a POSIX record lock: the kernel drops it when the process ends, however that happens, and children do not
    share it, so that loader workers who outlive their parent for seconds keep nobody out. Closing any descriptor of the
    file drops it too. Raises BlockingIOError when another process holds it, OSError."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        if fault.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return False
        if fault.errno == errno.EACCES:  # what some systems say for EAGAIN
            raise BlockingIOError(errno.EAGAIN, fault.strerror) from None
        raise
    return True


class Appender:
    """A file that grows by whole records. One that finds no room is kept in memory, and written once there is some.

    within: as of `make_folder`, which makes the file's folder."""

    def __init__(self, file: Path, within: Path | None = None) -> None:
        self.file, self._within = file, within
        self.waiting: deque[bytes] = deque()
        """Records that are not in the file yet."""
        self._handle: FileIO | None = None

    def write(self, record: bytes) -> None:
        """Raises OSError when the file does not hold everything so far; it ends with a whole record all the same."""
        self.waiting.append(record)
        self.flush()

    def flush(self) -> None:
        """Tries again to write what is waiting. Raises OSError."""
        if not self.waiting:
            return
        if self._handle is None:
            make_folder(self.file.parent, self._within)
            self._handle = self._open()
        while self.waiting:
            end = os.fstat(self._handle.fileno()).st_size
            left = memoryview(self.waiting[0])
            try:
                while left:
                    left = left[self._handle.write(left) :]
            except OSError:
                os.ftruncate(self._handle.fileno(), end)
                raise
            self.waiting.popleft()

    def sync(self) -> None:
        """Waits until what was written is on the disk. Raises OSError."""
        if self._handle is not None:
            os.fsync(self._handle.fileno())

    def _open(self) -> FileIO:
        handle = open_plain(self.file, "ab", buffering=0)
        if os.fstat(handle.fileno()).st_nlink > 1:  # its other name, in a backup say, is not ours to add to
            handle.close()
            write_whole(self.file, read_plain(self.file))
            handle = open_plain(self.file, "ab", buffering=0)
        return handle

    def close(self) -> None:
        """Tries once more to write what is waiting, and lets go of the file. Raises OSError when records are lost."""
        try:
            self.flush()
        except OSError as fault:
            lost = f"{fault.strerror}: the last {len(self.waiting)} records are lost"
            raise OSError(fault.errno, lost, str(self.file)) from None
        finally:
            if self._handle is not None:
                handle, self._handle = self._handle, None
                handle.close()
