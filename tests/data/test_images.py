"""Decoding of every kind of image file, damage, and the listing of folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from retina.data.images import list_images, read_image
from retina.errors import DataError

TOP, BOTTOM = (200, 40, 90), (10, 120, 250)


def a_picture() -> Image.Image:
    """24 x 16 pixels in two colours."""
    image = Image.new("RGB", (24, 16), TOP)
    image.paste(BOTTOM, (0, 8, 24, 16))
    return image


def noise(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "A.PNG"])
def test_lossless_formats(tmp_path, name):
    a_picture().save(tmp_path / name)
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image, np.asarray(a_picture()))
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_rotation_is_applied(tmp_path, orientation, turns, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    a_picture().save(tmp_path / name, exif=exif)
    image = read_image(tmp_path / name)
    expected = np.rot90(np.asarray(a_picture()), turns)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    grey = Image.new("L", (5, 4), 0)
    grey.paste(255, (0, 2, 5, 4))
    if mode == "I;16":
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(name)
    else:
        grey.convert("RGB").convert(mode).save(name)
    image = read_image(name)
    np.testing.assert_array_equal(image, np.asarray(grey.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_and_not_saturated(tmp_path, name):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat((values // 256)[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_per_channel_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((4, 4), 1_000_000, dtype=dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a.tif: has 32 bits per channel - convert it"):
        read_image(tmp_path / "a.tif")


def test_transparency_is_dropped(tmp_path):
    image = a_picture().convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(a_picture()))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_cut_off_files_are_an_error(tmp_path, name, share):
    content = noise(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def test_cut_off_files_are_an_error_whatever_another_library_has_set(tmp_path, monkeypatch):
    content = noise(tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match=r"a.jpg: cannot be decoded \(.*\) - copy or download it again"):
        read_image(tmp_path / "a.jpg")


def test_damaged_png_is_an_error(tmp_path):
    content = bytearray(noise(tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a.png: cannot be decoded"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_not_an_image(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a.jpg: is not an image that Pillow can read - "):
        read_image(tmp_path / "a.jpg")


def test_missing_image_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"gone.jpg: no such image - "):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"cannot be decoded"):
        read_image(tmp_path)
    with pytest.raises(DataError, match=r"gone: no such folder of images - "):
        list_images(tmp_path / "gone")


def test_list_images(tmp_path):
    names = ["b.JPG", "a/z.png", "a/deep/y.Tiff", "c.webp", "d.bmp", "e.jpeg", "f.tif"]
    for name in [*names, "notes.txt", "labels.json", "a/._z.png", "nosuffix"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list_images(tmp_path)
    assert found == sorted(tmp_path / name for name in names)
    assert list_images(tmp_path / "a" / "deep") == [tmp_path / "a/deep/y.Tiff"]
