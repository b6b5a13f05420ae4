"""File names stay inside the image folder, by their spelling and by what links lead to."""

import os
import time
from pathlib import Path

import pytest

from retina.data.paths import (
    folder_stamps,
    folders_of,
    is_free_of_links,
    is_listed,
    links_outside,
    list_folders,
    name_problem,
)


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "sub/a.jpg",
        "a..jpg",
        "..a/b",
        "a/../b.jpg",
        "./a.jpg",
        "é ü.jpg",
        "ab:c.jpg",
        "\udce9.jpg",
        "~/a.jpg",
        " ",
    ],
)
def test_names_that_stay_inside(name: str) -> None:
    assert name_problem(name, allow_outside=False) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("..", "leads out"),
        ("../a.jpg", "leads out"),
        ("a/../../b.jpg", "leads out"),
        ("./../b.jpg", "leads out"),
        ("a//../../b.jpg", "leads out"),
        ("/a.jpg", "absolute"),
        ("//host/a.jpg", "absolute"),
        ("C:\\a.jpg", "drive"),
        ("c:a.jpg", "drive"),
        ("..\\a.jpg", "backslashes"),
        ("\\\\host\\a.jpg", "backslashes"),
    ],
)
def test_names_that_lead_out_unless_allowed(name: str, problem: str) -> None:
    found = name_problem(name, allow_outside=False)
    assert found is not None
    assert problem in found
    assert "allow_outside=true" in found
    assert name_problem(name, allow_outside=True) is None


@pytest.mark.parametrize("name", ["a\0.jpg", "\0", "../\0", "\ud800.jpg"])
@pytest.mark.parametrize("allowed", [False, True])
def test_names_that_no_file_can_have(name: str, allowed: bool) -> None:
    assert "no file name can have" in (name_problem(name, allow_outside=allowed) or "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Links of every kind, inside and out."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for file in (root / "a.jpg", root / "sub" / "b.jpg", tmp_path / "other" / "c.jpg"):
        file.touch()
    for link, target in {
        "in.jpg": "a.jpg",
        "in_absolute.jpg": str(root / "a.jpg"),
        "dangling.jpg": "nowhere.jpg",
        "loop.jpg": "loop.jpg",
        "out.jpg": "../other/c.jpg",
        "out_twice.jpg": "out.jpg",
        "out_dangling.jpg": "/nowhere/a.jpg",
        "sub/back.jpg": "../a.jpg",
        "sub/out.jpg": "../../other/c.jpg",
        "other": "../other",
        "inner": "sub",
    }.items():
        (root / link).symlink_to(target)
    return root


def test_links_that_lead_out(folder: Path) -> None:
    inside = [
        "a.jpg",
        "sub/b.jpg",
        "in.jpg",
        "in_absolute.jpg",
        "dangling.jpg",
        "loop.jpg",
        "sub/back.jpg",
        "inner/b.jpg",
    ]
    outside = [
        "out.jpg",
        "out_twice.jpg",
        "out_dangling.jpg",
        "sub/out.jpg",
        "other/c.jpg",
        "other/../a.jpg",
        "inner/out.jpg",
    ]
    found = links_outside(folder, inside + outside + ["none.jpg", "none/none.jpg"])
    assert sorted(found) == list(range(len(inside), len(inside) + len(outside)))
    assert found[len(inside)] == str(folder.parent / "other" / "c.jpg")


def test_folders_without_links_need_no_look_at_names(folder: Path) -> None:
    (folder / "plain" / "deep").mkdir(parents=True)
    (folder / "plain" / "a.jpg").touch()
    (folder / "here").symlink_to(".")
    free = ["plain/a.jpg", "plain/deep/b.jpg", "plain/../plain/a.jpg", "plain/deep/", "none/a.jpg"]
    assert is_free_of_links(folder, folders_of(free), {})
    for name in ["a.jpg", "sub/b.jpg", "other/c.jpg", "other/../a.jpg", "here/..", "plain/..", "plain/../a.jpg"]:
        assert not is_free_of_links(folder, folders_of([*free, name]), {}), name
    assert list(links_outside(folder, ["here/..", *free])) == [0]


def test_a_folder_has_another_stamp_once_something_was_put_there(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.jpg").touch()
    os.utime(tmp_path / "old", (time.time() + 1000,) * 2)
    assert folder_stamps(tmp_path, ["old", "none"]) == {}, "too young to be sure"
    os.utime(tmp_path / "old")
    time.sleep(2.1)
    stamps = folder_stamps(tmp_path, ["old", "none"])
    assert list(stamps) == ["old"]
    assert is_free_of_links(tmp_path, ["old"], stamps)
    before = (tmp_path / "old").stat()
    (tmp_path / "old" / "a.jpg").unlink()
    (tmp_path / "old" / "a.jpg").symlink_to("/")
    os.utime(tmp_path / "old", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not is_free_of_links(tmp_path, ["old"], stamps)


def test_the_image_folder_itself_may_be_a_link(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert links_outside(folder.parent / "link", ["a.jpg", "in.jpg", "sub/b.jpg"]) == {}
    assert list(links_outside(folder.parent / "link", ["a.jpg", "out.jpg"])) == [1]


def test_a_sibling_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images_2").mkdir()
    (tmp_path / "images_2" / "a.jpg").touch()
    (tmp_path / "images" / "a.jpg").symlink_to("../images_2/a.jpg")
    assert list(links_outside(tmp_path / "images", ["a.jpg"])) == [0]


def test_listing(folder: Path) -> None:
    names = ["a.jpg", "sub/b.jpg", "A.jpg", "none/c.jpg", "a.jpg/d.jpg"]
    folders = list_folders(folder, names)
    assert sorted(folders) == ["", "a.jpg", "none", "sub"]
    assert [is_listed(name, folders) for name in names] == [True, True, False, False, False]
    assert (folders["none"].fault, folders["a.jpg"].fault) == ("No such file or directory", "Not a directory")
    assert folders["sub"].links == {"back.jpg", "out.jpg"}
