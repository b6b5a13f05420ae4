"""Which images are looked at, and that no picture of one takes the place of another's."""

import io
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from faults import refused
from retina.cli.sources import expand, find_images, groups_of, name_sources
from retina.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def seconds() -> Iterator[None]:
    """Nothing here may block or walk for ever."""
    signal.alarm(1000)
    yield
    signal.alarm(0)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name, "PNG")


def found(source: object, output: Path, root: Path) -> list[str]:
    base, files = find_images(str(source), output)
    assert base.resolve() == root.resolve()
    return [source.name for source in name_sources(base, files)]


def pictures(*names: str) -> list[str]:
    return [source.picture for source in name_sources(Path("/r"), [Path("/r", name) for name in names])]


def test_a_picture_has_the_name_of_its_image() -> None:
    names = ["a/x.jpg", "b/x.jpg", "x.JPG", "x.jpeg", "x.png", "y.tiff"]
    assert pictures(*reversed(names)) == names  # in the order of their names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x.gif", "x.gif.jpg"], ["x.gif.jpg", "x.gif~2.jpg"]),
        (["x", "x.dat"], ["x.jpg", "x.dat.jpg"]),
        (["X.jpg", "x.jpg", "x.JPG"], ["X.jpg", "x~2.JPG", "x~3.jpg"]),
        (["A/x.jpg", "a/x.jpg"], ["A/x.jpg", "a/x~2.jpg"]),
        (["X.jpg", "x.jpg", "x~2.jpg"], ["X.jpg", "x~2.jpg", "x~2~2.jpg"]),
        (["X.jpg", "x.jpg/y.png"], ["X~2.jpg", "x.jpg/y.png"]),
        (["e\u0301.jpg", "\u00e9.jpg"], ["e\u0301.jpg", "\u00e9~2.jpg"]),
        (["detections.json"], ["detections.json.jpg"]),
        (["stra\u00dfe.jpg", "strasse.jpg"], ["strasse.jpg", "stra\u00dfe~2.jpg"]),
    ],
)
def test_no_two_pictures_share_a_name(names: list[str], expected: list[str]) -> None:
    assert pictures(*names) == expected
    folded = [picture.casefold() for picture in expected]
    assert len(set(folded)) == len(names)


def test_long_names_stay_within_what_file_systems_take(tmp_path: Path) -> None:
    names = ["\u00e9" * 126 + ".gi", "y" * 251 + ".dat", "y" * 251 + ".gif", "y" * 251 + ".jpg", "Y" * 251 + ".jpg"]
    found = pictures(*names)
    assert len({picture.casefold() for picture in found}) == len(names)
    for picture in found:
        assert picture.endswith(".jpg")
        (tmp_path / picture).touch()


def test_a_folder_a_glob_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in", "a.jpg", "b/c.png", "b/d/e.jpg", ".hidden.jpg", "notes.txt")
    output = tmp_path / "out"
    assert found(tmp_path / "in", output, tmp_path / "in") == ["a.jpg", "b/c.png", "b/d/e.jpg"]
    assert found(tmp_path / "in" / "b" / "c.png", output, tmp_path / "in" / "b") == ["c.png"]
    monkeypatch.chdir(tmp_path)
    assert found("in/**/*.jpg", output, tmp_path / "in") == ["a.jpg", "b/d/e.jpg"]
    assert found("in/*", output, tmp_path / "in") == ["a.jpg", "notes.txt"]
    assert found("in/b/../[ab].jpg", output, tmp_path / "in") == ["a.jpg"]
    for up in ("in/*/../a.jpg", "in/b/*/../../a.jpg"):
        with suppress(DataError):  # older versions of Python find nothing there
            assert found(up, output, tmp_path / "in") == ["a.jpg"]  # never as `b/../a.jpg`, which might lead out
    for nothing in ("in/*.bmp", "in/nowhere.jpg", "nowhere"):
        with refused("no-images", nothing, kind=DataError):
            find_images(nothing, output)
    with refused("bad-pattern", "source: in/**.jpg", kind=ConfigError):
        find_images("in/**.jpg", output)


def test_circles_of_links_end(tmp_path: Path) -> None:
    root = tmp_path / "in"
    touch(root, "a.jpg", "sub/b.jpg")
    for place in (root, root / "sub"):
        for name in ("up", "round"):
            (place / name).symlink_to(root, target_is_directory=True)
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    assert [name for name in found(root, tmp_path / "out", root) if "/" in name] == ["sub/b.jpg"]
    assert found(f"{root}/**/*.jpg", tmp_path / "out", root) == ["a.jpg", "sub/b.jpg"]


def test_pipes_do_not_block(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.jpg")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    assert expand(f"{tmp_path}/in/*.jpg") == [tmp_path / "in" / "a.jpg"]
    with refused("no-images", "pipe.jpg", kind=DataError):
        find_images(str(tmp_path / "in" / "pipe.jpg"), tmp_path / "out")


def test_what_lies_in_the_output_is_not_looked_at(tmp_path: Path) -> None:
    root, output = tmp_path / "in", tmp_path / "in" / "out"
    touch(root, "a.jpg", "out/a.jpg", "out/sub/b.jpg", "output.jpg")
    for source in (root, f"{root}/**/*.jpg"):
        assert found(source, output, root) == ["a.jpg", "output.jpg"]
    (tmp_path / "way").symlink_to(root)
    assert found(tmp_path / "way", output, root) == ["a.jpg", "output.jpg"]
    assert found(root, tmp_path / "way" / "out", root) == ["a.jpg", "output.jpg"]


def test_links_into_the_output_are_not_looked_at(tmp_path: Path) -> None:
    root, output = tmp_path / "in", tmp_path / "out"
    touch(root, "a.jpg")
    touch(output, "a.jpg")
    (root / "link.jpg").symlink_to(output / "a.jpg")
    (root / "folder").symlink_to(output)
    for source in (root, f"{root}/*.jpg", f"{root}/**/*.jpg"):
        assert found(source, output, root) == ["a.jpg"]
    assert [path.name for path in find_images(f"{root}/*/*.jpg", tmp_path / "other")[1]] == ["a.jpg"]
    with refused("output-in-data", output, kind=ConfigError):
        find_images(f"{root}/*/*.jpg", output)


def test_an_output_above_the_source_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.jpg", "b/c.jpg")
    for source in (tmp_path / "in", tmp_path / "in" / "b", tmp_path / "in" / "a.jpg", f"{tmp_path}/in/b/*.jpg"):
        with refused("output-in-data", "output: ", tmp_path / "in", source, kind=ConfigError):
            find_images(str(source), tmp_path / "in")


def test_a_folder_whose_name_looks_like_a_glob_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "[2024] trip").mkdir()
    file = tmp_path / "[2024] trip" / "a.jpg"
    file.touch()
    assert [path.name for path in expand(f"{tmp_path}/[2024] trip/*.jpg")] == ["a.jpg"]


def test_images_in_memory_are_bounded_by_their_pixels(tmp_path: Path) -> None:
    for name, side in {"a": 10, "b": 30, "c": 50, "d": 70, "e": 10}.items():
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    (tmp_path / "f.png").write_bytes(b"no image")
    sources = name_sources(*find_images(str(tmp_path), tmp_path.parent / "out"))
    groups = [[source.file.stem for source in group] for group, _ in groups_of(sources, 4900)]
    assert groups == [["a", "b", "c"], ["d"], ["e", "f"]]


def test_paths_of_a_list_and_of_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the working directory, each once; what is not there is told by whoever reads it."""
    for name in ("in/a.jpg", "in/sub/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    lines = f"in/a.jpg\n\n{tmp_path}/in/sub/b.png\nin/gone.jpg\r\nin/a.jpg\n"
    (tmp_path / "list.txt").write_text(lines)
    expected = [tmp_path / name for name in ("in/a.jpg", "in/sub/b.png", "in/gone.jpg")]
    assert find_images("list.txt", tmp_path / "out") == (tmp_path / "in", expected)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert find_images("-", tmp_path / "out") == (tmp_path / "in", expected)
    assert [source.name for source in name_sources(tmp_path / "in", expected)] == ["a.jpg", "gone.jpg", "sub/b.png"]

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with refused("no-images", "-"):
        find_images("-", tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("contradiction", "source", kind=ConfigError):
        find_images("-", tmp_path / "out")
