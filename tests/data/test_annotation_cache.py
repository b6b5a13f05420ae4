"""A large annotation file comes from the cache as it came from the JSON, or is read again."""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import retina
from children import before_each_file_call, in_child
from retina.data import cache as annotation_cache
from retina.data.annotations import Annotations
from retina.data.cache import CACHE_FROM_BYTES, cache_folder
from retina.data.checks import DataReport, RecordsError
from retina.data.coco import read_coco


def a_document() -> dict:
    """Sound, with something to warn of: an id that is there twice, a box that is partly outside."""
    return {
        "images": [
            {"id": 50, "file_name": "sub/b.jpg", "width": 640, "height": 480},
            {"id": 7, "file_name": "a é\udce9.jpg", "width": 100, "height": 200},
            {"id": 12, "file_name": "sub/../empty.jpg", "width": 30, "height": 40},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 4, "name": "cat"}, {"id": 17, "name": "owl"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [1.5, 2, 10, 20.25]},
            {"image_id": 50, "category_id": 4, "bbox": [0, 0, 5, 5], "area": 12.5, "iscrowd": 1, "id": 0},
            {"image_id": 7, "category_id": 4, "bbox": [3, 4, 1, 2], "area": 1, "iscrowd": 0},
            {"image_id": 50, "category_id": 17, "bbox": [-2, 1, 7, 6], "area": None, "id": 0},
        ],
    }


def a_faulty_document() -> dict:
    document = a_document()
    document["images"][2]["width"] = -1
    document["annotations"][0]["bbox"] = [1, 2, -3, 4]
    document["annotations"][2]["image_id"] = 8
    return document


def save(file: Path, document: dict) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(document))
    (file.parent / "images" / "sub").mkdir(parents=True, exist_ok=True)
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which is used for files of any size."""
    monkeypatch.setenv("RETINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "CACHE_FROM_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "data" / "instances.json", a_document())


def read(file: Path, **options: object) -> tuple[Annotations, DataReport]:
    report = DataReport()
    return read_coco(file, file.parent / "images", report=report, **options), report


def parse(file: Path, **options: object) -> tuple[Annotations, DataReport]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETINA_CACHE", "")
        return read(file, **options)


def is_mapped(annotations: Annotations) -> bool:
    return annotations.image_ids.base is not None


def assert_equal(one: tuple[Annotations, DataReport], other: tuple[Annotations, DataReport]) -> None:
    assert one[1] == other[1]
    for name, value in vars(one[0]).items():
        if isinstance(value, np.ndarray):
            assert value.dtype == getattr(other[0], name).dtype
            assert value.flags.writeable == (name != "names") or is_mapped(one[0])
            np.testing.assert_array_equal(value, getattr(other[0], name), err_msg=name)
        else:
            assert value == getattr(other[0], name)
    assert [one[0].file_name(i) for i in range(len(one[0]))] == [other[0].file_name(i) for i in range(len(other[0]))]
    assert one[0].fingerprint() == other[0].fingerprint()


@pytest.mark.parametrize(
    "options",
    [{}, {"classes": ["owl", "lynx", "cat", "dog"]}, {"allow_outside": True}, {"skip_faulty": True}],
    ids=str,
)
def test_the_same_from_the_cache_as_from_the_file(file: Path, cache: Path, options: dict) -> None:
    plain = parse(file, **options)
    assert len(plain[1].warnings) == 2
    first, second = read(file, **options), read(file, **options)
    assert not is_mapped(first[0])
    assert is_mapped(second[0])
    assert_equal(first, plain)
    assert_equal(second, plain)
    assert len(os.listdir(cache)) == 1


def test_a_file_without_objects(tmp_path: Path, cache: Path) -> None:
    file = save(tmp_path / "data" / "a.json", a_document() | {"annotations": []})
    assert_equal(read(file), parse(file))
    again = read(file)
    assert is_mapped(again[0])
    assert_equal(again, parse(file))


def test_faults_are_kept_with_what_is_left(tmp_path: Path, cache: Path) -> None:
    file = save(tmp_path / "data" / "a.json", a_faulty_document())
    with pytest.raises(RecordsError) as plain:
        read(file)
    assert not any(cache.iterdir()), "what is refused is not kept"
    first, second = (read(file, skip_faulty=True) for _ in range(2))
    assert is_mapped(second[0])
    assert RecordsError(first[1].faults).faults == plain.value.faults
    assert len(first[1].faults) == 3
    assert_equal(second, first)
    with pytest.raises(RecordsError) as kept:
        read(file)
    assert kept.value.faults == plain.value.faults
    assert str(kept.value) == str(plain.value)


def test_other_bytes_and_other_wishes_are_another_entry(file: Path, cache: Path) -> None:
    def entries(**options: object) -> int:
        read(file, **options)
        return len(os.listdir(cache))

    assert entries() == entries() == entries(skip_faulty=True) == 1
    assert entries(classes=["cat", "dog", "owl"]) == 2
    assert entries(classes=["dog", "cat", "owl"]) == 3
    assert entries(allow_outside=True) == 4
    document = a_document()
    document["annotations"][0]["bbox"][0] = 2.5
    stamp = file.stat()
    save(file, document)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    assert entries() == 5
    assert read(file)[0].boxes[2, 0] == 2.5


def test_other_rules_are_another_entry(tmp_path: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from retina.data.cache import Request, entry_of, CACHE_FROM_BYTES\n"
        "print(entry_of('0', CACHE_FROM_BYTES, Request(classes=None, allow_outside=False)))"
    )
    package = tmp_path / "copy" / "retina"
    shutil.copytree(Path(retina.__file__).parent, package)
    checks = package / "data" / "checks.py"
    names = []
    for text in (checks.read_text(), checks.read_text(), checks.read_text() + "\n# stricter\n"):
        checks.write_text(text)
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, check=True
        )
        names.append(run.stdout)
    assert names[0] == names[1] != names[2]
    assert names[0].startswith(f"{cache}/")


def test_a_data_set_may_move(tmp_path: Path, file: Path, cache: Path) -> None:
    read(file)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "instances.json"
    found = read(moved)
    assert is_mapped(found[0])
    assert_equal(found, parse(moved))
    assert found[0].path(0) == tmp_path / "elsewhere" / "images" / "sub" / "b.jpg"
    assert all(line.startswith(f"{moved}: ") for line in found[1].warnings)


def test_small_files_are_left_alone(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_cache, "CACHE_FROM_BYTES", CACHE_FROM_BYTES)
    file = tmp_path / "a.json"
    content = json.dumps(a_document()).encode()
    file.write_bytes(b" " * (CACHE_FROM_BYTES - 1 - len(content)) + content)
    read(file)
    assert not cache.exists()
    file.write_bytes(b" " * (CACHE_FROM_BYTES - len(content)) + content)
    read(file)
    assert len(os.listdir(cache)) == 1
    assert is_mapped(read(file)[0])


def damage(entry: Path, how: str) -> None:
    file = entry / ("notes.json" if how == "notes" else "boxes.npy")
    data = bytearray(file.read_bytes())
    if how == "cut off":
        file.write_bytes(data[:-10])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "missing":
        file.unlink()
    elif how == "a file":
        shutil.rmtree(entry)
        entry.write_bytes(data)
    else:
        data[100 if how == "notes" else data.index(np.float64(11.5).tobytes())] ^= 4
        file.write_bytes(data)


def content_of(entry: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in entry.iterdir()}


@pytest.mark.parametrize("how", ["cut off", "empty", "missing", "a file", "notes", "column"])
def test_a_damaged_entry_is_not_used_but_written_anew(file: Path, cache: Path, how: str) -> None:
    plain = read(file, allow_outside=True)  # without the folders' stamps, which depend on the clock
    (entry,) = cache.iterdir()
    sound = content_of(entry)
    damage(entry, how)
    again = read(file, allow_outside=True)
    assert not is_mapped(again[0])
    assert_equal(again, plain)
    assert os.listdir(cache) == [entry.name]
    assert content_of(entry) == sound
    recalled = read(file, allow_outside=True)
    assert is_mapped(recalled[0])
    assert_equal(recalled, plain)


def test_where_the_cache_cannot_be_written_one_warning_says_so(
    tmp_path: Path, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = parse(file)
    other = save(tmp_path / "data" / "other.json", a_document() | {"info": "val"})
    cache.write_text("no folder")
    monkeypatch.setenv("RETINA_CACHE", str(cache / "deep"))
    annotations, report = read(file)
    read_coco(other, file.parent / "images", report=report)
    told = [line for line in report.warnings if "cannot be kept" in line]
    assert told == [
        f"{cache}/deep: annotations cannot be kept for the next start (Not a directory) - move what is in "
        "the way, or set the environment variable RETINA_CACHE to another folder, or to nothing"
    ]
    report.warnings = [line for line in report.warnings if line not in told and str(other) not in line]
    assert_equal((annotations, report), plain)


def test_a_full_disk(file: Path, cache: Path) -> None:
    plain = parse(file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        annotations, report = read(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "annotations cannot be kept" in report.warnings.pop()
    assert_equal((annotations, report), plain)
    assert os.listdir(cache) == []


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETINA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "retina"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/retina")
    monkeypatch.setenv("RETINA_CACHE", "/fast/disk")
    assert cache_folder() == Path("/fast/disk")
    monkeypatch.setenv("RETINA_CACHE", "")
    assert cache_folder() is None


def test_the_users_folder_is_not_touched(file: Path, cache: Path) -> None:
    def state() -> list[tuple[str, int, int]]:
        return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in file.parent.rglob("*"))

    before = state()
    read(file)
    read(file)
    assert state() == before
    assert cache.stat().st_mode & 0o077 == 0


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["sub/b.jpg", "empty.jpg"])
def test_a_link_that_leads_out_is_a_fault_also_when_it_comes_later(
    tmp_path: Path, file: Path, cache: Path, name: str
) -> None:
    read(file)
    link(file.parent / "images" / name, tmp_path / "secret.jpg")
    for skip in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RETINA_CACHE", "")
            plain = outcome(file, skip)
        assert len(plain) == 1
        assert "a symbolic link leads out" in plain[0]
        assert outcome(file, skip) == plain
    assert is_mapped(read(file, allow_outside=True)[0]) is False
    assert is_mapped(read(file, allow_outside=True)[0])
    assert len(os.listdir(cache)) == 2, "a reading without that image is not kept"
    (file.parent / "images" / name).unlink()
    assert is_mapped(read(file)[0])


def outcome(file: Path, skip: bool) -> list[str]:
    try:
        return read(file, skip_faulty=skip)[1].faults
    except RecordsError as fault:
        return fault.faults


def test_a_folder_that_leads_out(tmp_path: Path, file: Path, cache: Path) -> None:
    read(file)
    (tmp_path / "other").mkdir()
    (file.parent / "images" / "sub").rmdir()
    link(file.parent / "images" / "sub", tmp_path / "other")
    assert [line.split(": ")[1] for line in outcome(file, skip=False)] == [
        "image 50 (sub/b.jpg)",
        "image 12 (sub/../empty.jpg)",
    ]


def test_folders_are_listed_again_only_if_something_was_put_there(tmp_path: Path, file: Path, cache: Path) -> None:
    """And not at all if they had settled when the entry was written, two seconds being the clock of a FAT disk."""
    folders = [str(file.parent / "images"), str(file.parent / "images" / "sub"), f"{file.parent}/images/sub/.."]

    def listed() -> set[str]:
        seen: list[object] = []

        def child() -> None:
            before_each_file_call(lambda _, event, arguments: event == "os.scandir" and seen.append(arguments[0]))
            outcome(file, skip=False)
            (tmp_path / "seen").write_text("\n".join(str(folder).rstrip("/") for folder in seen))

        assert in_child(child) == 0
        return set((tmp_path / "seen").read_text().split()) & set(folders)

    for folder in folders:
        os.utime(folder, (time.time() + 1000,) * 2)
    read(file)
    assert listed() == set(folders), "too young to be sure"
    for folder in folders:
        os.utime(folder)
    time.sleep(2.1)
    shutil.rmtree(cache)
    read(file)
    assert listed() == set()
    (file.parent / "images" / "sub" / "b.jpg").touch()
    assert listed() == {folders[1]}
    link(file.parent / "images" / "a é\udce9.jpg", tmp_path / "secret.jpg")
    assert "a symbolic link leads out" in outcome(file, skip=False)[0]


def test_a_link_that_is_followed_out_of_an_unnamed_folder(tmp_path: Path, file: Path, cache: Path) -> None:
    """The folder that the image is named in stays as it was."""
    hop = file.parent / "images" / "store" / "real.jpg"
    link(file.parent / "images" / "sub" / "b.jpg", hop)
    link(hop, file.parent / "images" / "here.jpg")
    time.sleep(2.1)
    read(file)
    assert is_mapped(read(file)[0])
    hop.unlink()
    link(hop, tmp_path / "secret.jpg")
    assert [line.split(": ")[1] for line in outcome(file, skip=False)] == ["image 50 (sub/b.jpg)"]


def test_links_that_stay_inside_and_links_of_others_do_no_harm(tmp_path: Path, file: Path, cache: Path) -> None:
    read(file)
    link(file.parent / "images" / "sub" / "b.jpg", file.parent / "images" / "real.jpg")
    link(file.parent / "images" / "unnamed.jpg", tmp_path / "secret.jpg")
    found = read(file)
    assert is_mapped(found[0])
    assert_equal(found, parse(file))


def test_an_image_folder_that_is_not_there(file: Path, cache: Path) -> None:
    read(file)
    shutil.rmtree(file.parent / "images")
    assert is_mapped(read(file)[0])


def test_many_processes_at_once(tmp_path: Path, file: Path, cache: Path) -> None:
    fingerprint = parse(file)[0].fingerprint()

    def child() -> None:
        for _ in range(3):
            assert read(file)[0].fingerprint() == fingerprint

    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            os._exit(in_child(child))
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert len(os.listdir(cache)) == 1
    assert is_mapped(read(file)[0])


def test_what_nobody_used_for_a_month_goes(file: Path, cache: Path) -> None:
    cache.mkdir()
    month = 30 * 24 * 3600
    for name, age in [("a.annotations", 2 * month), ("b.annotations", month / 2), (".c.tmp", 2 * month), ("d", month)]:
        (cache / name).write_text("")
        os.utime(cache / name, (0, time.time() - age))
    read(file)
    assert {"b.annotations", "d"} < set(os.listdir(cache))
    (entry,) = set(os.listdir(cache)) - {"b.annotations", "d"}
    os.utime(cache / entry, (0, time.time() - 2 * month))
    read(file)
    save(file, a_document() | {"info": "new"})
    read(file)
    assert len(os.listdir(cache)) == 4, "reading an entry is using it"


def test_the_garbage_collector_is_on_again(file: Path, cache: Path) -> None:
    save(file, a_faulty_document())
    with pytest.raises(RecordsError):
        read(file)
    assert gc.isenabled()
    gc.disable()
    try:
        read(file, skip_faulty=True)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_one_process_parses_and_the_others_wait_for_what_comes_of_it(file: Path, cache: Path) -> None:
    """Also processes of other machines that have the same folder."""
    entry = annotation_cache.find_entry(file, annotation_cache.Request(classes=None, allow_outside=False))
    assert entry is not None
    ready, tell = os.pipe()

    def task() -> None:
        os.write(tell, b"!")
        assert is_mapped(read(file)[0]), "it has not parsed"

    with annotation_cache.only_one(entry):
        child = get_context("fork").Process(target=task)
        child.start()
        os.read(ready, 1)
        time.sleep(1)
        assert not os.path.exists(entry)
        annotations = read_coco(file, file.parent / "images")  # makes the entry
    child.join(1000)
    assert child.exitcode == 0
    assert not is_mapped(annotations)
    assert [path.suffix for path in cache.iterdir()] == [".annotations"]


def test_a_process_that_ends_keeps_nobody_waiting(file: Path, cache: Path) -> None:
    entry = annotation_cache.find_entry(file, annotation_cache.Request(classes=None, allow_outside=False))
    assert entry is not None

    def die() -> None:
        with annotation_cache.only_one(entry):
            os._exit(3)

    child = get_context("fork").Process(target=die)
    child.start()
    child.join(1000)
    assert child.exitcode == 3
    assert not is_mapped(read(file)[0])
    assert is_mapped(read(file)[0])
