import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from children import in_child
from retina import files
from retina.files import Appender, lock, temporary_of, write_whole


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    write_whole(file, b"old")
    for size in (0, 1, 99_999):
        with file_limit(size), pytest.raises(OSError, match="File too large"):
            write_whole(file, b"n" * 100_000)
        assert file.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["numbers"]
    temporary_of(file).write_bytes(b"half, as a kill leaves it")
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["numbers"]


def test_what_is_synced_is_renamed_and_then_its_folder_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "numbers").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    write_whole(tmp_path / "numbers", b"new")
    assert synced == [(str(tmp_path / ".numbers.tmp"), False), (str(tmp_path), True)]


def test_records_are_appended_whole_and_none_is_lost(tmp_path: Path) -> None:
    appender = Appender(tmp_path / "deep" / "records")
    appender.write(b"first\n")
    for size in (6, 7, 12):
        with file_limit(size), pytest.raises(OSError, match="File too large"):
            appender.write(b"record\n")
        assert appender.file.read_bytes() == b"first\n"
    with file_limit(20), pytest.raises(OSError, match="File too large"):
        appender.flush()
    assert appender.file.read_bytes() == b"first\nrecord\nrecord\n"[:20], "as many as there is room for"
    appender.write(b"last\n")
    assert appender.file.read_bytes() == b"first\n" + b"record\n" * 3 + b"last\n"
    assert not appender.waiting
    appender.close()


def test_a_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    file = tmp_path / "lock"

    def second() -> None:
        with file.open("a") as handle, pytest.raises(BlockingIOError):
            lock(handle.fileno())

    with file.open("a") as handle:
        assert lock(handle.fileno())
        assert in_child(second) == 0
    with file.open("a") as handle:
        assert in_child(lambda: lock(handle.fileno()) or os._exit(3)) == 0, "closing it has let it go"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with (tmp_path / "lock").open("a") as handle:
        assert lock(handle.fileno()) is False


def test_without_fcntl_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    with (tmp_path / "lock").open("a") as handle:
        assert lock(handle.fileno()) is False


def test_every_module_is_imported_without_what_windows_lacks(tmp_path: Path) -> None:
    """Then a run starts as on a file system without locks, and says so."""
    code = """
import importlib, os, pkgutil, sys
from pathlib import Path
sys.modules["fcntl"] = None
for name in ("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK"):
    delattr(os, name)
import retina
names = [module.name for module in pkgutil.walk_packages(retina.__path__, "retina.")]
for name in names:
    importlib.import_module(name)
from retina.cli.run_folder import open_run
opened = open_run(Path("run"), {"name": "run"}, overwrite=False)
print(len(names) > 80, *opened.notes)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.startswith("True warning: this file system has no locks"), run.stderr
