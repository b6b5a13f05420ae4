"""Parts of large TIFFs, read without the rest: the same pixels as of the whole, in little memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from children import in_child
from faults import refused
from retina.data.images import read_image
from retina.data.pixels import PixelFormat
from retina.data.regions import RegionReader, Regions, regions_of

tifffile = pytest.importorskip("tifffile", reason="extra tiff")

LAYOUTS: dict[str, dict[str, Any]] = {
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (32, 48)},
    "deflate": {"tile": (16, 16), "compression": "zlib", "predictor": True},
    "geo": {
        "tile": (64, 64),
        "extratags": [(33550, "d", 3, (0.5, 0.5, 0.0), True), (34735, "H", 4, (1, 1, 0, 0), True)],
    },
}


def values(channels: int, dtype: Any = np.uint8) -> np.ndarray:
    """100 x 130, smooth enough for a wrong row to be seen."""
    y, x, c = np.mgrid[:100, :130, :channels]
    array = ((y * 2 + x + 40 * c) % 256).astype(dtype)
    return array * 257 if dtype == np.uint16 else array


def write(file: Path, array: np.ndarray, **options: Any) -> Path:
    photometric = "rgb" if array.shape[2] in (3, 4) else "minisblack"
    stored = array[..., 0] if array.shape[2] == 1 else array
    tifffile.imwrite(file, stored, photometric=photometric, **options)
    return file


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("stored", "channels"), [(3, 3), (1, 3), (4, 3), (3, 1)])
def test_a_part_is_that_of_the_whole(tmp_path: Path, layout: str, stored: int, channels: int) -> None:
    options = {**LAYOUTS[layout], **({"extrasamples": ["unassalpha"]} if stored == 4 else {})}
    file = write(tmp_path / "a.tif", values(stored), **options)
    pixels = PixelFormat(channels=channels)
    whole, parts = read_image(file, pixels=pixels), regions_of(file, pixels=pixels)
    assert isinstance(parts, Regions)
    assert parts.shape == whole.shape
    for top, left, bottom, right in ((0, 0, 100, 130), (5, 7, 40, 60), (31, 47, 33, 49), (90, 100, 100, 130)):
        assert (parts[top:bottom, left:right] == whole[top:bottom, left:right]).all()


@pytest.mark.parametrize("value_range", [(0, 65535), (1000, 30000)])
def test_sixteen_bits_become_what_they_are_elsewhere(tmp_path: Path, value_range: tuple[int, int]) -> None:
    pixels = PixelFormat(value_range)
    file = write(tmp_path / "a.tif", values(1, np.uint16), tile=(32, 32))
    part = regions_of(file, pixels=pixels)[10:90, 3:77]
    assert (part == read_image(file, pixels=pixels)[10:90, 3:77]).all()


def test_other_files_are_read_whole(tmp_path: Path) -> None:
    turned = write(tmp_path / "a.tif", values(3), extratags=[(274, "H", 1, 6, True)])
    assert isinstance(regions_of(turned), np.ndarray)
    assert regions_of(turned).shape == (130, 100, 3)
    reader = RegionReader(10**6, PixelFormat())
    part, size = reader(turned, (10, 20, 40, 60))
    assert (size, part.shape) == ((130, 100), (30, 40, 3))


def test_damage_is_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tif", values(3), tile=(32, 32))
    file.write_bytes(file.read_bytes()[:-2000])
    with refused("bad-image", "a.tif"):
        regions_of(file)
    file = write(tmp_path / "b.tif", values(3), tile=(32, 32), compression="zlib")
    data = bytearray(file.read_bytes())
    with tifffile.TiffFile(file) as tiff:
        at = tiff.pages[0].dataoffsets[3]
    data[at : at + 8] = b"\xff" * 8
    file.write_bytes(data)
    with refused("bad-image", "b.tif"):
        regions_of(file)[0:100, 0:130]


def test_limits_are_those_of_a_part(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tif", values(3), tile=(32, 32))
    parts = regions_of(file, max_pixels=2000)
    assert parts[0:40, 0:50].shape == (40, 50, 3)
    with refused("too-many-pixels", "a.tif"):
        parts[0:50, 0:50]
    strips = write(tmp_path / "b.tif", values(3), rowsperstrip=100)
    with refused("too-many-pixels", "b.tif"):
        regions_of(strips, max_pixels=2000)


def test_a_shrunk_image_has_the_means(tmp_path: Path) -> None:
    array = values(3)
    parts = regions_of(write(tmp_path / "a.tif", array, tile=(16, 16)))
    small, factor = parts.shrunk(array.shape[0] * array.shape[1] // 4)
    assert factor == 2
    means = array.reshape(50, 2, 65, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - means).max() <= 1


def write_large(file: Path, side: int) -> None:
    """Row after row of tiles, so that it is never whole in memory."""
    tile = np.zeros((256, 256, 3), np.uint8)
    tile[100:120, 100:120] = 200
    count = (-(-side // 256)) ** 2
    options: dict[str, Any] = {"shape": (side, side, 3), "dtype": np.uint8, "tile": (256, 256), "photometric": "rgb"}
    tifffile.imwrite(file, (tile for _ in range(count)), compression="zlib", **options)


@pytest.mark.parametrize("side", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_memory_is_that_of_parts(tmp_path: Path, side: int) -> None:
    """Within 400 MB beside the program itself, of which 256 MB are kept strips: the large one has 1.2 GB of pixels."""
    file = tmp_path / "large.tif"
    write_large(file, side)

    def look() -> None:
        from resource import RUSAGE_SELF, getrusage

        from retina.data.windows import Tiling
        from retina.inference import detect_in_tiles
        from retina.types import Detections

        def find(images: Any) -> list[Detections]:
            import torch

            found = []
            for image in images:
                corners = np.argwhere((image[..., 0] > 0) & (np.roll(image[..., 0], (1, 1), (0, 1)) == 0))
                corners = [yx for yx in corners.tolist() if not any(image[yx[0], max(0, yx[1] - 1) : yx[1], 0])]
                corners = [yx for yx in corners if not any(image[max(0, yx[0] - 1) : yx[0], yx[1], 0])]
                boxes = torch.tensor([[x, y, x + 20, y + 20] for y, x in corners], dtype=torch.float32).reshape(-1, 4)
                found.append(Detections(boxes, torch.ones(len(boxes)), torch.zeros(len(boxes), dtype=torch.int64)))
            return found

        before = getrusage(RUSAGE_SELF).ru_maxrss
        detections = detect_in_tiles(find, regions_of(file), Tiling((1000, 1000), 0.1))
        assert len(detections.scores) == (-(-(side - 100) // 256)) ** 2
        assert getrusage(RUSAGE_SELF).ru_maxrss - before < 400_000

    assert in_child(look) == 0
