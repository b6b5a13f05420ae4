import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from retina.files import Appender, write_whole


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
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"


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
