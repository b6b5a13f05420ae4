"""Decoding of every kind of image file, damage, and the listing of folders."""

import io
import json
import multiprocessing
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
from PIL import Image, ImageFile

from faults import refused
from retina.data.coco import read_coco
from retina.data.dataset import CocoDetection
from retina.data.image_files import opened
from retina.data.image_lists import list_images, other_files
from retina.data.images import MAX_PIXELS, image_size, read_image, read_reduced
from retina.data.pixels import FULL, PixelFormat, measured_range
from retina.data.transforms import eval_pipeline
from retina.errors import DataError

TOP, BOTTOM = (200, 40, 90), (10, 120, 250)


def a_picture() -> Image.Image:
    """24 x 16 pixels in two colours."""
    image = Image.new("RGB", (24, 16), TOP)
    image.paste(BOTTOM, (0, 8, 24, 16))
    return image


def noise(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
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


# what each EXIF orientation asks of the stored rows and columns (Exif 2.32, tag 0x0112)
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "lzw.tif"])
def test_every_exif_orientation_is_made_upright(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = a_picture()
    stored.paste((250, 250, 250), (0, 0, 8, 8))  # one corner, so that all eight differ
    options = {"compression": "tiff_lzw"} if name == "lzw.tif" else {"quality": 95}
    stored.save(tmp_path / name, exif=exif, **options)
    image = read_image(tmp_path / name)
    expected = UPRIGHT[orientation](np.asarray(stored))
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 8
    assert image_size(tmp_path / name) == expected.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_evaluation_and_inference_see_the_same_pixels(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    a_picture().save(tmp_path / "a.png", exif=exif)
    height, width = image_size(tmp_path / "a.png")
    image = {"id": 1, "file_name": "a.png", "width": width, "height": height}
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}))
    pipeline = eval_pipeline(16, None)
    read = CocoDetection(read_coco(file, tmp_path), pipeline, seed=0).read(0)
    np.testing.assert_array_equal(read.image, read_reduced(tmp_path / "a.png", pipeline.least_size)[0])
    np.testing.assert_array_equal(read.image, read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(read.image, UPRIGHT[orientation](np.asarray(a_picture())))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(path: Path, before: bytes, kind: bytes, content: bytes) -> Path:
    """A PNG with one more chunk, before its first one of the kind `before`."""
    data = path.read_bytes()
    at = data.index(before) - 4
    path.write_bytes(data[:at] + chunk(kind, content) + data[at:])
    return path


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_exif_of_a_png_may_stand_before_or_behind_the_pixels(tmp_path, before):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(tmp_path / "a.png", (24, 640))
    plain = read_image(tmp_path / "a.png")
    with_chunk(tmp_path / "a.png", before, b"eXIf", exif.tobytes()[6:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), UPRIGHT[6](plain))
    assert image_size(tmp_path / "a.png") == (640, 24)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_the_size_is_read_without_the_pixels(tmp_path, name):
    noise(tmp_path / name, (200, 300))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert image_size(tmp_path / name) == (200, 300)
    with refused("bad-image", name, kind=DataError):
        read_image(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"II", b"II*\x00\xff\xff\xff\xff", b"MM\x00*" + bytes(4), b"\xff" * 70])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_exif_data_that_make_no_sense_fail_no_image(tmp_path, content, name):
    if name == "a.png":
        a_picture().save(tmp_path / name)
        with_chunk(tmp_path / name, b"IDAT", b"eXIf", content)
    else:
        a_picture().save(tmp_path / name, exif=b"Exif\x00\x00" + content)
    assert read_image(tmp_path / name).shape == (16, 24, 3)
    assert image_size(tmp_path / name) == (16, 24)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_unknown_orientation_is_none(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    a_picture().save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(a_picture()))


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


def test_16_bit_colour_is_scaled_and_not_saturated(tmp_path):
    """Written by hand, for Pillow cannot."""
    values = np.arange(0, 65536, 257, dtype=">u2").reshape(4, 64)  # of which 3 and 21 are a pixel and a row
    pixels = values.reshape(-1)[: 4 * 21 * 3].reshape(4, 21, 3)
    header = struct.pack(">IIBBBBB", 21, 4, 16, 2, 0, 0, 0)
    rows = b"".join(b"\x00" + row.tobytes() for row in pixels)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels // 256)


def write_16_bit(file: Path, values: np.ndarray, orientation: int = 1) -> None:
    """Grey by Pillow, colours by OpenCV, since each writes only one of them."""
    if values.ndim == 2:
        Image.fromarray(values).save(file)
    else:
        cv2.imwrite(str(file), values[..., ::-1])
    if orientation != 1 and file.suffix == ".png":
        exif = Image.Exif()
        exif[0x0112] = orientation
        with_chunk(file, b"IDAT", b"eXIf", exif.tobytes()[6:])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_12_bits_in_16_are_stretched_over_the_range_of_their_set(tmp_path, channels, name, orientation):
    values = np.random.default_rng(0).integers(500, 4000, (40, 60, *channels), dtype=np.uint16)
    values[0, 0], values[0, 1] = 500, 3999
    write_16_bit(tmp_path / name, values, orientation)
    assert read_image(tmp_path / name).max() == 15  # nearly black
    image = read_image(tmp_path / name, pixels=PixelFormat((500, 3999)))
    expected = ((values.astype(int) - 500) * 255 // 3499).astype(np.uint8)
    expected = np.repeat(expected[..., None], 3, axis=2) if not channels else expected
    turned = orientation == 6 and name == "a.png"
    np.testing.assert_array_equal(image, np.rot90(expected, -1) if turned else expected)
    assert measured_range([tmp_path / name], max_pixels=MAX_PIXELS) == (500, 3999)


def test_the_range_is_that_of_the_set_without_outliers(tmp_path):
    files = [tmp_path / f"{n}.png" for n in range(4)]
    for n, file in enumerate(files):
        values = np.full((200, 200), 1000 * n + 100, dtype=np.uint16)
        values[0, 0] = 65535  # a hot pixel
        write_16_bit(file, values)
    files[2].write_bytes(files[2].read_bytes()[:100])
    assert measured_range(files, max_pixels=MAX_PIXELS) == (100, 3100)
    assert measured_range(files[:1], max_pixels=MAX_PIXELS) == FULL  # one value has no range
    assert measured_range([], max_pixels=MAX_PIXELS) == FULL
    write_16_bit(files[0], np.arange(65536, dtype=np.uint16).reshape(256, 256))
    assert measured_range(files, max_pixels=MAX_PIXELS) == FULL


@pytest.mark.parametrize("value", [1_000_000, 1000])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_per_channel_are_refused(tmp_path, dtype, value):
    Image.fromarray(np.full((4, 4), value, dtype=dtype)).save(tmp_path / "a.tif")
    with refused("bad-image", "a.tif", "32 bits", kind=DataError):
        read_image(tmp_path / "a.tif")


def test_transparency_is_dropped(tmp_path):
    image = a_picture().convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(a_picture()))


@pytest.mark.parametrize("transparency", [1, bytes([255, 128])])
@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_palette_with_transparency_keeps_its_colours_and_warns_of_nothing(tmp_path, transparency, name):
    image = a_picture().quantize(2)
    colour = image.getpixel((0, 0)) if name == "a.gif" else transparency
    image.save(tmp_path / name, transparency=colour)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(tmp_path / name), np.asarray(a_picture()))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (24, 16), (index * 60, 0, 0)) for index in range(1, 4)]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(read_image(tmp_path / name), np.asarray(frames[0]), name)


@pytest.mark.parametrize("true_name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif", "a.gif", "a.ppm"])
def test_the_content_decides_what_a_file_is(tmp_path, true_name):
    file = noise(tmp_path / true_name)
    expected = read_image(file)
    for wrong in ("b.jpg", "b.png", "b.tif"):
        file = file.rename(tmp_path / wrong)
        np.testing.assert_array_equal(read_image(file), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_thin_images(tmp_path, size, name):
    file = noise(tmp_path / name, size)
    assert read_image(file).shape == (*size, 3)
    assert image_size(file) == size


def test_names_of_any_kind(tmp_path):
    names = ["Größe 写真 🐈.png", "\u200fعربي.png", "n" * 251 + ".png", "two\nlines.png", "-rf.png", "\udcff.png"]
    for name in names:
        file = tmp_path / name
        noise(tmp_path / "plain.png").rename(file)
        assert read_image(file).shape == (64, 64, 3)
        file.write_bytes(b"damaged")
        with pytest.raises(DataError) as caught:
            read_image(file)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()  # it can be printed
    assert len(list_images(tmp_path)) == len(names)
    with refused("unreadable-image", "File name too long", kind=DataError):
        read_image(tmp_path / ("n" * 256))
    with refused("unreadable-image", "embedded null byte", kind=DataError):
        read_image(tmp_path / "nul\0.png")


def test_the_limits_of_the_host_s_pillow_are_left_as_they_were(tmp_path, monkeypatch):
    """Also after a fault, and while another image is still open; in between, half an image stays a fault."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    good, cut = tmp_path / "good.png", tmp_path / "cut.png"
    Image.new("RGB", (40, 30), "red").save(good)
    cut.write_bytes(good.read_bytes()[:60])
    with opened(good, 5000):
        assert read_image(good).shape == (30, 40, 3)
        with pytest.raises(DataError):
            read_image(cut)
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == (True, 50)


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
    with refused("bad-image", "a.jpg", kind=DataError):
        read_image(tmp_path / "a.jpg")


def test_damaged_png_is_an_error(tmp_path):
    content = bytearray(noise(tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(content)
    with refused("bad-image", "a.png", kind=DataError):
        read_image(tmp_path / "a.png")


def test_every_single_bad_byte_of_a_png_is_an_error_or_harmless(tmp_path):
    """Here is what kills processes that decode with other libraries."""
    content = noise(tmp_path / "a.png", (8, 8)).read_bytes()
    expected = read_image(tmp_path / "a.png")
    errors = 0
    for at in range(len(content)):
        (tmp_path / "a.png").write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)
        except DataError:
            errors += 1
    assert errors > 0.9 * len(content)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is not an image that can be read here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image that can be read here"),
        (b"\xff\xd8\xff", "cannot be decoded"),
        (b"GIF89a", "cannot be decoded"),
    ],
)
def test_not_an_image(tmp_path, content, problem):
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_image, image_size):
        with refused("bad-image", "a.jpg", problem, kind=DataError):
            read(tmp_path / "a.jpg")


def test_what_is_no_file_is_an_error_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("gone.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for read in (read_image, image_size):
        for name in ("pipe.jpg", ".", "/dev/zero", "/dev/tty"):
            with refused("not-a-file", (tmp_path / name).resolve(), kind=DataError):
                read(tmp_path / name)
        with refused("no-such-image", "link.jpg", "gone.jpg", kind=DataError):
            read(tmp_path / "link.jpg")
        with refused("unreadable-image", "loop.jpg", "symbolic links", kind=DataError):
            read(tmp_path / "loop.jpg")
        with refused("no-such-image", "gone.jpg", kind=DataError):
            read(tmp_path / "gone.jpg")
        with refused("unreadable-image", "b.png", "Not a directory", kind=DataError):
            read(noise(tmp_path / "a.png") / "b.png")


def in_a_fork(task: Callable[[], None], path: Path, *, read: Callable[[Path], object] = read_image) -> str:
    """The line of the DataError that `read` raises in a process of its own, where `task` has been called before."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def run() -> None:
        task()
        try:
            theirs.send(f"no error: {read(path)!r}"[:200])
        except DataError as error:
            theirs.send(str(error))

    process = fork.Process(target=run)
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), "no answer"
        return ours.recv()
    finally:
        process.kill()
        process.join()


def become_nobody() -> None:
    if os.geteuid() == 0:  # whom permissions do not stop
        os.setresuid(65534, 65534, 65534)


def test_no_permission():
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a folder that nobody else may enter
        folder = Path(name)
        folder.chmod(0o755)
        file = noise(folder / "a.png")
        file.chmod(0)
        assert "a.png: cannot be opened (Permission denied) - " in in_a_fork(become_nobody, file)
        assert in_a_fork(become_nobody, folder, read=list_images) == f"no error: {[file]}"
        (folder / "sub").mkdir(mode=0)
        assert "sub: cannot be listed (Permission denied) - " in in_a_fork(become_nobody, folder, read=list_images)
        assert "sub/x: no such folder of" in in_a_fork(become_nobody, folder / "sub" / "x", read=list_images)


def keep_50_mb() -> None:
    """From here on this process may grow by no more than that."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 50_000_000,) * 2)


def read_with_50_mb(path: str) -> None:
    keep_50_mb()
    with refused("out-of-memory", "a.png", kind=DataError):
        read_image(Path(path))


def test_too_little_memory(tmp_path):
    """In a process that is new, because this one may have kept what it freed, and would use that again."""
    Image.new("L", (9000, 9000)).save(tmp_path / "a.png")
    code = "import sys; from test_images import read_with_50_mb; read_with_50_mb(sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], env=environment, check=True)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that claim 60000 x 60000 pixels."""
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    yield "a.png", head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    for kind, places in {
        "JPEG": {struct.pack(">HH", 33, 47): struct.pack(">HH", 60000, 60000)},
        "GIF": {struct.pack("<HH", 47, 33): struct.pack("<HH", 60000, 60000)},
        "BMP": {struct.pack("<ii", 47, 33): struct.pack("<ii", 60000, 60000)},
        "TIFF": {
            struct.pack("<HHII", tag, 4, 1, side): struct.pack("<HHII", tag, 4, 1, 60000)
            for tag, side in ((256, 47), (257, 33))
        },
        "PPM": {b"47 33": b"60000 60000"},
    }.items():
        stream = io.BytesIO()
        Image.new("RGB", (47, 33)).save(stream, kind)
        content = stream.getvalue()
        for honest, claimed in places.items():
            assert honest in content, kind
            content = content.replace(honest, claimed)
        yield f"a.{kind.lower()}", content
    canvas = (60000 - 1).to_bytes(3, "little") * 2
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + b"VP8 " + struct.pack("<I", 0)
    yield "a.webp", b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(("name", "content"), list(bombs()), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("read", [read_image, image_size])
def test_bombs_are_refused_from_the_header(tmp_path, name, content, read):
    (tmp_path / name).write_bytes(content)

    def with_little_memory_and_no_warning() -> None:
        keep_50_mb()
        warnings.simplefilter("error")

    line = in_a_fork(with_little_memory_and_no_warning, tmp_path / name, read=read)
    if name == "a.webp" and int(PIL.__version__.partition(".")[0]) < 13:  # makes no decoder of so short a file
        assert line.startswith(f"{tmp_path / name}: cannot be decoded")
        return
    assert line.startswith(f"{tmp_path / name}: has ")
    assert "60000x60000 pixels, more than" in line or "too many pixels" in line


def test_a_gif_that_asks_for_a_whole_frame_in_its_header(tmp_path):
    """Of a size at which Pillow would warn and make it."""
    stream = io.BytesIO()
    Image.new("P", (47, 33)).save(stream, "GIF", disposal=2)
    content = stream.getvalue().replace(struct.pack("<HH", 47, 33), struct.pack("<HH", 12000, 12000))
    assert content.count(struct.pack("<HH", 12000, 12000)) == 2
    (tmp_path / "a.gif").write_bytes(content)
    line = in_a_fork(lambda: warnings.simplefilter("error"), tmp_path / "a.gif")
    assert "a.gif: has 12000x12000 pixels, more than" in line


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_whose_text_is_a_bomb(tmp_path, kind):
    bomb = zlib.compress(bytes(60_000_000))
    text = b"k\x00\x01\x00\x00\x00" + bomb if kind == b"iTXt" else b"k\x00\x00" + bomb
    file = with_chunk(noise(tmp_path / "a.png"), b"IDAT", kind, text)
    assert "a.png: cannot be decoded (Decompressed data too large" in in_a_fork(keep_50_mb, file)


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.tif", "a.webp"])
def test_max_pixels_is_the_only_limit(tmp_path, name, monkeypatch):
    """Pillow's own is far lower here, and would warn."""
    noise(tmp_path / name, (40, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / name, max_pixels=2000).shape == (40, 50, 3)
        for read in (read_image, image_size):
            with refused("too-many-pixels", "50x40", "max_pixels=1999", kind=DataError):
                read(tmp_path / name, max_pixels=1999)


def many_scans(number: int) -> bytes:
    """A progressive JPEG of 32x32 pixels whose first scan comes that many times."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(
        stream, "JPEG", progressive=True
    )
    content = stream.getvalue()
    begin = content.index(b"\xff\xda")
    end = begin + 2
    while content[end] != 0xFF or content[end + 1] == 0:
        end += 1
    return content[:begin] + content[begin:end] * number + content[end:]


def test_the_scans_of_a_jpeg_are_bounded_by_the_pixels_that_they_go_over(tmp_path):
    (tmp_path / "a.jpg").write_bytes(many_scans(1000))
    for read in (read_image, lambda path, **options: read_reduced(path, lambda size: (4, 4), **options)):
        with refused("too-many-scans", "a.jpg", "max_pixels=50000", kind=DataError):
            read(tmp_path / "a.jpg", max_pixels=50_000)
    assert read_image(tmp_path / "a.jpg", max_pixels=200_000).shape == (32, 32, 3)
    (tmp_path / "b.jpg").write_bytes(many_scans(5))
    assert read_image(tmp_path / "b.jpg", max_pixels=32 * 32).shape == (32, 32, 3)


def test_what_metadata_hold_is_no_scan(tmp_path):
    stream = io.BytesIO()
    comment = b"\xff\xda" * 30_000
    Image.new("RGB", (32, 32)).save(stream, "JPEG", comment=comment)
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    assert read_image(tmp_path / "a.jpg", max_pixels=32 * 32).shape == (32, 32, 3)


def long_headers() -> Iterator[tuple[str, bytes]]:
    yield "comment.ppm", b"P6\n#" + b"x" * 1_000_000 + b"\n1 1\n255\n" + bytes(3)
    # 500 fields of a TIFF that share the same 100,000 bytes
    fields = b"".join(struct.pack("<HHII", 40000 + i, 1, 100_000, 8) for i in range(500))
    size = b"".join(struct.pack("<HHII", tag, 4, 1, 1) for tag in (256, 257))
    body = bytes(100_000) + struct.pack("<H", 502) + size + fields + bytes(4)
    yield "fields.tif", b"II*\0" + struct.pack("<I", 100_008) + body


@pytest.mark.parametrize(("name", "content"), list(long_headers()), ids=lambda value: str(value)[:11])
@pytest.mark.parametrize("read", [read_image, image_size])
def test_headers_have_an_end(tmp_path, name, content, read):
    (tmp_path / name).write_bytes(content)
    with refused("long-header", name, kind=DataError):
        read(tmp_path / name)


def test_an_image_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    """Whatever it is that takes so long: a clock that runs a million times as fast stands for it."""
    a_picture().save(tmp_path / "a.png")
    clock = time.thread_time
    assert read_image(tmp_path / "a.png").any()
    monkeypatch.setattr(time, "thread_time", lambda: clock() * 1e6)
    with refused("too-slow", "a.png", "max_pixels", kind=DataError):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.bmp", "a.tif"])
def test_a_file_that_another_process_shortens_does_not_kill_the_reader(tmp_path, name):
    """Pillow maps such a file into memory if it is given its name; what it reads from there is gone with the file."""
    Image.new("L", (200, 200), 77).save(tmp_path / name)

    def read(path: Path) -> int:
        with opened(path, 40_000) as image:
            image.load()
            os.truncate(path, 0)
            return int(np.asarray(image).min())

    assert in_a_fork(lambda: None, tmp_path / name, read=read) == "no error: 77"


def a_photograph(path: Path, size: tuple[int, int], **options: object) -> Path:
    """Smooth, with a bright rectangle from 1/4 to 3/4 of the height and 1/2 to 7/8 of the width."""
    height, width = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 120, width)
    pixels[..., 2] = np.linspace(0, 90, height)[:, None]
    pixels[height // 4 : height * 3 // 4, width // 2 : width * 7 // 8] = 250
    Image.fromarray(pixels).save(path, quality=95, **options)
    return path


@pytest.mark.parametrize(
    ("size", "least", "reduced"),
    [
        ((480, 640), (240, 320), (240, 320)),
        ((480, 640), (241, 320), (480, 640)),  # half would be too small
        ((480, 640), (100, 100), (120, 160)),
        ((480, 640), (1, 1), (60, 80)),  # an eighth is all that libjpeg can
        ((484, 644), (1, 1), (121, 161)),  # an eighth leaves a rest
        ((481, 640), (1, 1), (481, 640)),
        ((480, 640), None, (480, 640)),
        ((480, 640), (900, 1200), (480, 640)),
    ],
)
def test_a_jpeg_is_reduced_as_far_as_it_may_be(tmp_path, size, least, reduced):
    file = a_photograph(tmp_path / "a.jpg", size)
    asked = []
    image, true_size = read_reduced(file, lambda found: asked.append(found) or least)
    assert asked == [size]
    assert image.shape == (*reduced, 3)
    assert true_size == size == image_size(file)
    assert image.flags.writeable
    whole, factor = read_image(file).astype(float), size[0] // reduced[0]
    blocks = whole.reshape(reduced[0], factor, reduced[1], factor, 3).mean((1, 3))
    assert np.abs(image - blocks).mean() < 1.5


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_what_a_reduced_jpeg_shows_stays_where_it_is(tmp_path, options):
    file = a_photograph(tmp_path / "a.jpg", (480, 640), **options)
    for factor in (2, 4, 8):
        image, _ = read_reduced(file, lambda size, by=factor: (size[0] // by, size[1] // by))
        bright = image[..., 1] > 125
        ys, xs = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        found = np.array([ys[0], ys[-1] + 1, xs[0], xs[-1] + 1]) * factor
        np.testing.assert_array_equal(found, [120, 360, 320, 560])


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_reduced_jpeg_is_made_upright_too(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = a_photograph(tmp_path / "a.jpg", (160, 480), exif=exif.tobytes())
    whole = read_image(file)
    height, width = whole.shape[:2]
    asked = []
    # an eighth of the one side is enough, but not of the other: turned about, this would not do
    image, true_size = read_reduced(file, lambda size: asked.append(size) or (height // 8, width // 4))
    assert asked == [true_size] == [(height, width)]
    assert image.shape == (height // 4, width // 4, 3)
    assert np.abs(image - whole.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3))).mean() < 2


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.gif"])
def test_other_formats_are_never_reduced(tmp_path, name):
    file = noise(tmp_path / name)
    image, true_size = read_reduced(file, lambda size: (1, 1))
    np.testing.assert_array_equal(image, read_image(file))
    assert true_size == (64, 64)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_reduced_or_not_the_same_damage_is_an_error(tmp_path, options):
    content = a_photograph(tmp_path / "a.jpg", (96, 128), **options).read_bytes()
    rng = np.random.default_rng(0)
    variants = [content[:end] for end in range(0, len(content), 29)]
    for _ in range(150):
        data = bytearray(content)
        data[rng.integers(len(data))] = rng.integers(256)
        variants.append(bytes(data))
    outcomes = {True: 0, False: 0}
    for variant in variants:
        (tmp_path / "a.jpg").write_bytes(variant)
        errors = []
        for least in (None, (1, 1)):
            try:
                read_reduced(tmp_path / "a.jpg", lambda size, least=least: least, max_pixels=1_000_000)
                errors.append(None)
            except DataError as error:
                errors.append(str(error))
        assert (errors[0] is None) == (errors[1] is None), errors
        outcomes[errors[0] is None] += 1
    assert min(outcomes.values()) > 20


def test_max_pixels_counts_the_whole_of_what_is_reduced(tmp_path):
    file = a_photograph(tmp_path / "a.jpg", (96, 128))
    with refused("too-many-pixels", "128x96", "max_pixels=5000", kind=DataError):
        read_reduced(file, lambda size: (12, 16), max_pixels=5000)


def test_missing_folder(tmp_path):
    with refused("no-such-folder", "gone", kind=DataError):
        list_images(tmp_path / "gone")


def test_list_images(tmp_path):
    names = ["b.JPG", "a/z.png", "a/deep/y.Tiff", "c.webp", "d.bmp", "e.jpeg", "f.tif", "g.gif"]
    for name in [*names, "notes.txt", "labels.json", "a/._z.png", "nosuffix"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list_images(tmp_path)
    assert found == sorted(tmp_path / name for name in names)
    assert list_images(tmp_path / "a" / "deep") == [tmp_path / "a/deep/y.Tiff"]


def test_content_tells_images_where_the_suffix_does_not(tmp_path):
    kinds = {"a.jfif": "JPEG", "b.ppm": "PPM", "c.mpo": "MPO", "d": "PNG", "e.JPG_large": "JPEG", "f.dib": "BMP"}
    for name, kind in kinds.items():
        a_picture().save(tmp_path / name, kind)
    (tmp_path / "g.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    a_picture().save(tmp_path / "raw.dng", "TIFF")
    for name in ("notes.txt", "table.csv", "h.pdf", "i.mp4"):
        (tmp_path / name).write_bytes(b"P5 is a grey image, and this is none")
    (tmp_path / "Python").write_bytes(b"Python is no PPM")
    os.mkfifo(tmp_path / "pipe")
    others = ["Python", "h.pdf", "i.mp4", "pipe", "raw.dng"]
    expected = [*kinds, "g.heic", "h.pdf", "i.mp4"]
    assert [path.name for path in list_images(tmp_path)] == sorted(expected)
    assert [path.name for path in other_files(tmp_path)] == [name for name in others if name not in expected]
    for name in kinds:
        assert read_image(tmp_path / name).shape == (16, 24, 3)


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_heic_names_the_package_that_reads_it(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    with refused("missing-package", "a.heic", "pillow-heif", kind=DataError):
        read_image(tmp_path / "a.heic")


def test_heic_is_read_where_the_package_is(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.register_heif_opener()
    a_picture().save(tmp_path / "a.heic", quality=-1, chroma=444)
    assert np.abs(read_image(tmp_path / "a.heic").astype(int) - np.asarray(a_picture())).max() < 8


def test_links_to_folders_are_not_followed_and_links_to_files_are(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/x.png", "y.png"):
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self.jpg").symlink_to(tmp_path / "a")
    (tmp_path / "z.png").symlink_to("y.png")
    (tmp_path / "lost.png").symlink_to("gone.png")
    assert list_images(tmp_path) == [tmp_path / name for name in ("a/x.png", "lost.png", "y.png", "z.png")]
