"""Images of other than three channels, from the file to the batch. Those of TIFF need tifffile."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from faults import refused
from retina.data.channels import read_header_of
from retina.data.coco import read_coco
from retina.data.dataset import CocoDetection
from retina.data.images import MAX_PIXELS, read_image
from retina.data.loader import Canvas, collate
from retina.data.pixels import FULL, PixelFormat, measured_range
from retina.data.transforms import HorizontalFlip, Pipeline, ResizeShortSide, resize
from retina.errors import ConfigError, DataError


def values(channels: int, *, dtype: Any = np.uint8, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    high = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return np.random.default_rng(0).integers(0, int(high), (*size, channels)).astype(dtype)


def write_tiff(file: Path, array: np.ndarray, **options: Any) -> Path:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    tifffile.imwrite(file, array, **{"photometric": "minisblack", "planarconfig": "contig"} | options)
    return file


def read(file: Path, channels: int, value_range: tuple[int, int] = FULL) -> np.ndarray:
    return read_image(file, pixels=PixelFormat(value_range, channels))


def test_grey_is_the_brightness_and_of_grey_files_their_own_values(tmp_path: Path) -> None:
    grey = values(1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read(tmp_path / "grey.png", 1)[..., 0], grey)
    colors = values(3)
    Image.fromarray(colors).save(tmp_path / "colors.png")
    expected = colors @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(tmp_path / "colors.png", 1)[..., 0] - expected).max() <= 1
    deep = values(1, dtype=np.uint16)[..., 0]
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read(tmp_path / "deep.png", 1)[..., 0], deep >> 8)


@pytest.mark.parametrize(("channels", "mode"), [(4, "RGBA"), (2, "LA")])
def test_transparency_is_a_channel_where_it_is_asked_for(tmp_path: Path, channels: int, mode: str) -> None:
    stored = values(channels)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored, mode).save(tmp_path / "a.png", exif=exif)
    image = read(tmp_path / "a.png", channels)
    np.testing.assert_array_equal(image, stored.swapaxes(0, 1)[:, ::-1])
    header = read_header_of(tmp_path / "a.png", channels, max_pixels=MAX_PIXELS)
    assert header.size == image.shape[:2]
    for other in (5, 2 if channels == 4 else 4):
        with refused("other-channels", "a.png", kind=DataError):
            read(tmp_path / "a.png", other)
        with refused("other-channels", "a.png", kind=DataError):
            read_header_of(tmp_path / "a.png", other, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
@pytest.mark.parametrize("layout", ["contig", "separate", "pages", "zlib", "tiles"])
def test_every_layout_of_a_tiff_is_the_same_image(tmp_path: Path, channels: int, layout: str) -> None:
    stored, options = values(channels), dict[str, Any]()
    if layout in ("separate", "pages"):
        stored = np.ascontiguousarray(stored.transpose(2, 0, 1))
        options = {"planarconfig": "separate"} if layout == "separate" else {"planarconfig": None}
    options |= {"zlib": {"compression": "zlib"}, "tiles": {"tile": (16, 16)}}.get(layout, {})
    file = write_tiff(tmp_path / "a.tif", stored, **options)
    image = read(file, channels)
    np.testing.assert_array_equal(image, values(channels))
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous
    assert read_header_of(file, channels, max_pixels=MAX_PIXELS).size == (24, 32)
    with refused("other-channels", "a.tif", kind=DataError):
        read(file, channels + 7)
    with refused("too-many-pixels", "a.tif", kind=DataError):
        read_image(file, max_pixels=700, pixels=PixelFormat(channels=channels))


def test_values_of_16_bits_keep_their_high_byte_or_are_stretched_over_the_range_of_the_set(tmp_path: Path) -> None:
    stored = values(5, dtype=np.uint16)
    file = write_tiff(tmp_path / "a.tif", stored)
    np.testing.assert_array_equal(read(file, 5), stored >> 8)
    narrow = (1000 + stored // 22).astype(np.uint16)
    file = write_tiff(tmp_path / "b.tif", narrow)
    low, high = measured_range([file], max_pixels=MAX_PIXELS, channels=5)
    assert narrow.min() <= low < high <= narrow.max()
    image = read(file, 5, (low, high))
    assert (image.min(), image.max()) == (0, 255)
    expected = np.clip((narrow.astype(np.float64) - low) / (high - low), 0, 1) * 255
    assert np.abs(image - expected).max() <= 1


def test_a_turned_tiff_is_upright(tmp_path: Path) -> None:
    stored = values(5)
    file = write_tiff(tmp_path / "a.tif", stored, extratags=[(274, "H", 1, 6, True)])
    np.testing.assert_array_equal(read(file, 5), stored.swapaxes(0, 1)[:, ::-1])
    assert read_header_of(file, 5, max_pixels=MAX_PIXELS).size == (32, 24)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_damaged_tiff_is_an_error(tmp_path: Path, compression: str | None) -> None:
    """Nothing of it is black instead."""
    content = write_tiff(tmp_path / "a.tif", values(5), compression=compression, rowsperstrip=8).read_bytes()
    for end in range(0, len(content), max(1, len(content) // 40)):
        (tmp_path / "cut.tif").write_bytes(content[:end])
        with pytest.raises(DataError) as caught:
            read(tmp_path / "cut.tif", 5)
        assert "\n" not in str(caught.value)


def test_floating_point_values_are_refused(tmp_path: Path) -> None:
    file = write_tiff(tmp_path / "a.tif", values(5).astype(np.float32))
    with refused("bad-image", "float32", kind=DataError):
        read(file, 5)


def test_a_tiff_of_many_channels_names_the_setting_and_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tiff(tmp_path / "a.tif", values(5))
    with refused("other-channels", "data.channels", kind=DataError):
        read_image(file)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with refused("missing-package", "retina-detect[tiff]", kind=DataError):
        read(file, 5)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("size", [(10, 15), (40, 50), (24, 32)], ids=["smaller", "larger", "same"])
def test_each_channel_is_resized_as_alone(channels: int, size: tuple[int, int]) -> None:
    image = values(channels)
    interpolation = cv2.INTER_AREA if size < image.shape[:2] else cv2.INTER_LINEAR
    alone = [
        cv2.resize(np.ascontiguousarray(image[..., k]), size[::-1], interpolation=interpolation)
        for k in range(channels)
    ]
    np.testing.assert_array_equal(resize(image, size), np.stack(alone, axis=-1))
    canvas = np.zeros((64, 64, channels), dtype=np.uint8)
    resize(image, size, out=canvas[: size[0], : size[1]])
    np.testing.assert_array_equal(canvas[: size[0], : size[1]], resize(image, size))
    assert canvas[size[0] :].max() == canvas[:, size[1] :].max() == 0


def a_set(folder: Path, names: Sequence[str]) -> Path:
    content = {
        "images": [{"id": i, "file_name": name, "width": 32, "height": 24} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "category_id": 1, "bbox": [2, 3, 9, 9]} for i in range(len(names))],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


@pytest.mark.parametrize("channels", [1, 4])
def test_batches_have_the_channels_and_their_padding(tmp_path: Path, channels: int) -> None:
    from dataclasses import replace

    Image.fromarray(values(4), "RGBA").save(tmp_path / "a.png")
    pixels = PixelFormat(channels=channels)
    annotations = replace(read_coco(a_set(tmp_path, ["a.png"]), tmp_path), pixels=pixels)
    pipeline = Pipeline({"flip": HorizontalFlip(p=1.0), "resize": ResizeShortSide(48)})
    dataset = CocoDetection(annotations, pipeline)
    colour = tuple(range(10, 10 + channels))
    batch = collate([dataset[0, 0]], Canvas(32, colour))
    assert batch.images.shape == (1, channels, 64, 64)
    assert batch.images[0, :, 50, 0].tolist() == list(colour)
    flipped = read_image(tmp_path / "a.png", pixels=pixels)[:, ::-1]
    np.testing.assert_array_equal(batch.images[0, :, :48].permute(1, 2, 0).numpy(), resize(flipped, (48, 64)))
    assert dataset[0].image.shape == (48, 64, channels)


def test_a_transform_that_changes_the_channels_is_refused(tmp_path: Path) -> None:
    import albumentations as A

    Image.fromarray(values(3)).save(tmp_path / "a.png")
    dataset = CocoDetection(
        read_coco(a_set(tmp_path, ["a.png"]), tmp_path), Pipeline({"grey": A.ToGray(num_output_channels=1, p=1)})
    )
    with refused("augment", "grey", kind=ConfigError):
        dataset[0]
