"""Folders of columns: what is read is what was written, or nothing."""

import hashlib
import json
import mmap
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from children import in_child
from retina.data.columns import Columns, digest_in, digest_of, read_columns, write_columns

CHUNK = 4 << 20


def some_columns() -> Columns:
    arrays = {
        "boxes": np.array([[0.1, -0.0, np.inf, np.nan], [1e308, 5e-324, -1, 3]]),
        "none": np.empty((0, 4)),
        "labels": np.array([-(2**63), 2**63 - 1, 0]),
        "crowd": np.array([True, False, True, True, False]),
        "turned": np.arange(6).reshape(2, 3).T,
        "names": np.frombuffer(b"a.jpg", np.uint8),
        "last": np.empty(0, np.bool_),
    }
    return Columns(arrays, {"classes": ["cat", "\udce9 é"], "ids": [2**62, None]})


def assert_equal(found: Columns | None, wanted: Columns) -> None:
    assert found is not None
    assert found.notes == wanted.notes
    assert list(found.arrays) == list(wanted.arrays)
    for name, array in wanted.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes(), name


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write_columns(tmp_path / "a", some_columns())
    assert_equal(read_columns(tmp_path / "a"), some_columns())
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o077 == 0, "the user's alone"
    write_columns(tmp_path / "a", Columns({}, {}))
    assert read_columns(tmp_path / "a") == ({}, {})


def test_columns_are_mapped_aligned_and_private(tmp_path: Path) -> None:
    write_columns(tmp_path / "a", some_columns())
    first, second = (read_columns(tmp_path / "a") for _ in range(2))
    assert first is not None and second is not None  # noqa: PT018
    for array in first.arrays.values():
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, mmap.mmap)
        assert array.ctypes.data % 64 == 0 or array.size == 0
    first.arrays["boxes"][:] = 7
    assert_equal(second, some_columns())
    assert_equal(read_columns(tmp_path / "a"), some_columns())


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path: Path) -> None:
    few = Columns({"boxes": np.array([[0.1, 7.5]]), "crowd": np.array([True, False, True])}, {"classes": ["cat"]})
    write_columns(tmp_path / "a", few)
    for file in sorted((tmp_path / "a").iterdir()):
        sound = file.read_bytes()
        for place in range(len(sound)):
            file.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << place % 8]) + sound[place + 1 :])
            assert read_columns(tmp_path / "a") is None, (file, place)
        for length in range(len(sound)):
            file.write_bytes(sound[:length])
            assert read_columns(tmp_path / "a") is None, (file, length)
        file.write_bytes(sound)
    assert_equal(read_columns(tmp_path / "a"), few)


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\n", b"{}\n{}\n", os.urandom(1000), b"\0" * 1000])
def test_other_files_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert read_columns(tmp_path / "a") is None
    assert read_columns(tmp_path / "missing") is None
    assert read_columns(tmp_path) is None
    write_columns(tmp_path / "a", some_columns())  # in its place
    for file in (tmp_path / "a").iterdir():
        sound = file.read_bytes()
        file.write_bytes(content)
        assert read_columns(tmp_path / "a") is None
        file.write_bytes(sound)
    assert_equal(read_columns(tmp_path / "a"), some_columns())


def test_python_objects_are_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        write_columns(tmp_path / "a", Columns({"objects": np.array([{}], dtype=object)}, {}))
    assert os.listdir(tmp_path) == []
    write_columns(tmp_path / "a", Columns({"objects": np.zeros(1)}, {}))
    np.save(tmp_path / "a" / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    digest = digest_of(memoryview((tmp_path / "a" / "objects.npy").read_bytes()))
    notes = json.dumps({"columns": {"objects": digest}, "notes": {}}).encode()
    (tmp_path / "a" / "notes.json").write_bytes(hashlib.sha256(notes).hexdigest().encode() + b"\n" + notes)
    assert read_columns(tmp_path / "a") is None


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    write_columns(tmp_path / "a", some_columns())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 100, 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match=r"File too large|written"):
                write_columns(tmp_path / "a", Columns({"more": np.zeros(1000)}, {}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == ["a"]
        assert_equal(read_columns(tmp_path / "a"), some_columns())


def test_what_cannot_be_read_back_does_not_take_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def failing_disk(descriptor: int) -> None:
        fsync(descriptor)
        if os.fstat(descriptor).st_size:
            os.pwrite(descriptor, b"!", os.fstat(descriptor).st_size - 8)

    monkeypatch.setattr(os, "fsync", failing_disk)
    with pytest.raises(OSError, match="does not hold what was written"):
        write_columns(tmp_path / "a", Columns({"numbers": np.zeros(8)}, {}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_digest_is_that_of_the_digests_of_the_parts(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    parts = [hashlib.sha256(data[start : start + CHUNK]).digest() for start in range(0, size, CHUNK)]
    assert digest_of(memoryview(data)) == hashlib.sha256(b"".join(parts)).hexdigest()
    (tmp_path / "a").write_bytes(b"before" + data + b"behind")
    with (tmp_path / "a").open("rb") as stream:
        assert digest_in(stream, 6, size) == digest_of(memoryview(data))


def test_a_file_that_is_cut_off_while_it_is_read_ends_no_process(tmp_path: Path) -> None:
    data = bytes(2 * CHUNK)
    (tmp_path / "a").write_bytes(data)

    def read() -> None:
        with (tmp_path / "a").open("rb") as stream:
            os.truncate(tmp_path / "a", CHUNK // 2)
            assert digest_in(stream, 0, len(data)) != digest_of(memoryview(data))

    assert in_child(read) == 0
