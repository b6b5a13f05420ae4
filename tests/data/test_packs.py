"""Images of a pack are read as files are, and nothing that a pack says is believed."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faults import refused
from retina.cli.journal import version_of
from retina.data.columns import Columns, read_columns, write_columns
from retina.data.image_lists import list_images, other_files
from retina.data.images import image_size, read_image
from retina.data.pack_writer import damaged, plan, write_index, write_shard
from retina.data.packs import INDEX, list_folders, open_stored, pack_of
from retina.errors import DataError

NAMES = ["b.png", "a.jpg", "sub/deep/c.jpg", "sub/é.png"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`files/` with four images, and `packed/` with them in three archives."""
    root = tmp_path_factory.mktemp("packs")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (root / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / "files" / name)
    (root / "packed").mkdir()

    shards = plan(root / "files", NAMES, 3000)
    assert len(shards) == 3
    for shard in shards:
        assert write_shard(root / "packed", root / "files", shard)
        assert not write_shard(root / "packed", root / "files", shard), "it is there, whole"
    write_index(root / "packed", shards)
    return root


@pytest.fixture
def pack(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "packed", tmp_path / "packed")
    return tmp_path / "packed"


def test_images_are_read_as_files_are(made: Path) -> None:
    for name in NAMES:
        file, packed = made / "files" / name, made / "packed" / name
        np.testing.assert_array_equal(read_image(packed), read_image(file))
        assert image_size(packed) == image_size(file)
        with open_stored(packed) as content:
            assert content.read() == file.read_bytes()
        assert version_of(packed)[0] == file.stat().st_size
    with refused("no-such-image", made / "packed" / "x.jpg"):
        read_image(made / "packed" / "x.jpg")
    assert damaged(pack_of(made / "packed")) == []  # type: ignore[arg-type]


def test_images_of_a_pack_are_listed(made: Path) -> None:
    for root in (made / "packed", made):
        paths = [path.relative_to(made / "packed").as_posix() for path in list_images(root) if "packed" in path.parts]
        assert sorted(paths) == sorted(NAMES)
        assert other_files(root) == []
    folders = list_folders(made, [f"packed/{name}" for name in NAMES])
    assert {"a.jpg", "b.png"} <= folders["packed"].names
    assert folders["packed/sub"].names == {"é.png"}
    assert folders["packed/sub/deep"].names == {"c.jpg"}


def test_tar_gives_the_files_back(made: Path, tmp_path: Path) -> None:
    for file in sorted((made / "packed").glob("*.tar")):
        with tarfile.open(file) as archive:
            archive.extractall(tmp_path, filter="data")
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (made / "files" / name).read_bytes()


def test_a_file_comes_before_what_is_packed(pack: Path) -> None:
    Image.new("RGB", (5, 7)).save(pack / "b.png")
    assert image_size(pack / "b.png") == (7, 5)


def test_flipped_bits_are_told(pack: Path) -> None:
    """A decoder would take most of them for pixels."""
    stored = pack_of(pack).find("a.jpg")  # type: ignore[union-attr]
    assert stored
    shard, offset = stored.pack.locate(stored.row)
    with open(
        pack / "00000.tar" if shard.size == (pack / "00000.tar").stat().st_size else pack / "00001.tar", "r+b"
    ) as f:
        f.seek(offset + stored.size // 2)
        byte = f.read(1)[0]
        f.seek(offset + stored.size // 2)
        f.write(bytes([byte ^ 1]))
    with refused("damaged-pack", pack / "a.jpg", kind=DataError):
        read_image(pack / "a.jpg")
    (line,) = damaged(stored.pack)
    assert str(pack / "a.jpg") in line
    assert read_image(pack / "b.png").shape == (40, 60, 3)


def changed(pack: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Writes the index anew, with sound digests of its own: whoever makes a pack can do so."""
    columns = read_columns(pack / INDEX)
    assert columns
    arrays = {name: array.copy() for name, array in columns.arrays.items()}
    change(arrays)
    write_columns(pack / INDEX, Columns(arrays, {}))


def put(name: str, value: object) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][:] = value

    return change


HOSTILE: dict[str, Callable[[dict[str, np.ndarray]], None]] = {
    "a place before the archive": put("offsets", -1),
    "a place behind it": put("offsets", 2**62),
    "a size beyond it": put("sizes", 2**62),
    "a negative size": put("sizes", -5),
    "an archive that is not there": put("shards", 77),
    "a negative archive": put("shards", -1),
    "another digest": put("digests", 0),
    "no sizes": lambda arrays: arrays.__delitem__("sizes"),
    "fewer sizes": lambda arrays: arrays.update(sizes=arrays["sizes"][:2]),
    "sizes that are fractions": lambda arrays: arrays.update(sizes=arrays["sizes"].astype(float)),
    "a column more": lambda arrays: arrays.update(more=arrays["sizes"]),
    "short digests": lambda arrays: arrays.update(digests=arrays["digests"][:, :5]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_indices_are_refused(pack: Path, what: str) -> None:
    changed(pack, HOSTILE[what])
    with refused("damaged-pack", pack, kind=DataError):
        read_image(pack / "a.jpg")


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "s/../../a.jpg", "C:/a.jpg", "s\\a.jpg", "", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(pack: Path, name: str) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["names"] = np.frombuffer(name.encode() * 4, np.uint8)
        arrays["name_offsets"] = np.arange(5) * len(name.encode())

    changed(pack, change)
    with refused("damaged-pack", pack, kind=DataError):
        list_images(pack)


def test_archives_that_are_no_files_are_refused(pack: Path, tmp_path: Path) -> None:
    for archive in pack.glob("*.tar"):
        archive.rename(tmp_path / archive.name)
        archive.symlink_to(tmp_path / archive.name)
    with refused("damaged-pack", pack / "a.jpg"):
        read_image(pack / "a.jpg")
    for archive in pack.glob("*.tar"):
        archive.unlink()
        os.mkfifo(archive)
    with refused("damaged-pack", pack / "b.png"):
        read_image(pack / "b.png")


def test_a_damaged_index_is_one_line(pack: Path) -> None:
    file = pack / INDEX / "offsets.npy"
    file.write_bytes(file.read_bytes()[:-1])
    for read in (lambda: read_image(pack / "a.jpg"), lambda: list_images(pack)):
        with refused("damaged-pack", pack, kind=DataError):
            read()


def test_archives_cut_off_by_a_kill_or_altered_are_made_anew(made: Path, tmp_path: Path) -> None:
    whole = {file.name: file.read_bytes() for file in (made / "packed").glob("*.tar")}
    shards = plan(made / "files", NAMES, 1)
    assert [shard.names for shard in shards] == [[name] for name in NAMES]
    shards = plan(made / "files", NAMES, max(map(len, whole.values())) * 9)
    assert len(shards) == 1
    write_shard(tmp_path, made / "files", shards[0])
    first = (tmp_path / "00000.tar").read_bytes()
    for content in (first[:1000], first[:2000] + b"?" + first[2001:], b""):
        (tmp_path / "00000.tar").write_bytes(content)
        assert write_shard(tmp_path, made / "files", shards[0])
        assert (tmp_path / "00000.tar").read_bytes() == first
    (tmp_path / ".00000.json").write_text('{"key": 1, "members": [{"name": 1}]}')
    assert write_shard(tmp_path, made / "files", shards[0])
