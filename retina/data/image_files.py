"""Opening image files of strangers: only regular files, of known formats, of few enough pixels. Beside the road.

Every fault on the way to the pixels, whatever library it comes from, is a DataError of one line."""

import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO, NamedTuple

# importing a plugin registers its format; what is not imported (EPS runs Ghostscript) is never tried on a file
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    WebPImagePlugin,  # noqa: F401
)

from retina.data.metered import MeteredFile
from retina.data.packs import find_stored
from retina.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
HEIF = "HEIF"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_PIXELS = 100_000_000
"""Images of more pixels than this are refused before they are decoded, unless a caller allows more."""

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright (Exif 2.32, tag 0x0112)."""
SWAPPING = tuple(TURNS[orientation] for orientation in (5, 6, 7, 8))
"""Those that swap width and height."""
_MAX_EXIF = 1 << 20
_BITS = TiffImagePlugin.BITSPERSAMPLE
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N", "I")
"""Modes of 16-bit grey; "I" too: before Pillow 11.3 such a PNG opened as that."""


class Header(NamedTuple):
    """What stands before the pixels."""

    size: tuple[int, int]
    """(height, width) once upright."""
    turn: Image.Transpose | None
    """What makes it upright, by EXIF."""
    bits: int
    """Per channel."""

    @classmethod
    def of(cls, stored: tuple[int, int], turn: Image.Transpose | None, bits: int) -> "Header":
        """`stored`: (height, width) before it is turned."""
        return cls(stored[::-1] if turn in SWAPPING else stored, turn, bits)

    @property
    def turns_unseen(self) -> bool:
        """Whether it is turned, and its size does not tell."""
        return self.turn is not None and (self.turn not in SWAPPING or self.size[0] == self.size[1])


class _Limits:
    """Pillow's limits of the whole process, which formats ask while they load: ours while any thread reads,
    the host's before and afterwards."""

    def __init__(self) -> None:
        self.lock, self.readers, self.of_host = Lock(), 0, (False, Image.MAX_IMAGE_PIXELS)

    @contextmanager
    def lent(self, max_pixels: int) -> Iterator[None]:
        with self.lock:
            if self.readers == 0:
                self.of_host = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
            self.readers += 1
            ImageFile.LOAD_TRUNCATED_IMAGES = False  # half a picture must never be trained on
            if Image.MAX_IMAGE_PIXELS is not None:
                Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
        try:
            yield
        finally:
            with self.lock:
                self.readers = max(self.readers - 1, 0)  # a child that was forked while it read
                if self.readers == 0:
                    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = self.of_host

    def after_fork(self) -> None:
        """The threads that were reading do not exist in the child."""
        if self.readers > 0:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = self.of_host
        self.lock, self.readers = Lock(), 0


_LIMITS = _Limits()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LIMITS.after_fork)


@contextmanager
def opened(path: Path, max_pixels: int, *, whole: bool = True) -> Iterator[ImageFile.ImageFile]:
    """The image with nothing but its header read. Whatever is raised in the block leaves it as a DataError.

    whole: whether its pixels will be read too."""
    with reading(path, max_pixels, whole=whole) as file:
        image = _identify(path, file, max_pixels)
        _check_pixels(path, image.size, max_pixels)
        file.begin_pixels(math.prod(image.size), jpeg=isinstance(image, JpegImagePlugin.JpegImageFile))
        yield image


@contextmanager
def reading(path: Path, max_pixels: int, *, whole: bool = True) -> Iterator[MeteredFile]:
    """The file, if it is a regular one, or what a pack holds under its path. Whatever is raised in the block leaves it
    as a DataError."""
    try:
        with _LIMITS.lent(max_pixels), _open_regular(path, max_pixels, whole=whole) as file:
            yield file
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # formats that Pillow itself checks before we can
        problem = f"has too many pixels ({error})"
        raise fault(path, "too-many-pixels", problem, "make it smaller or remove it") from error
    except MemoryError as error:
        problem = "needs more memory than there is"
        raise fault(path, "out-of-memory", problem, "make it smaller, or lower num_workers") from error
    except Exception as error:  # on a damaged file, decoders raise whatever they stumble over
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}" or type(error).__name__
        problem = f"cannot be decoded ({reason})"
        raise fault(path, "bad-image", problem, "copy or download it again, or remove it") from error


def _open_regular(path: Path, max_pixels: int, *, whole: bool) -> MeteredFile:
    """The file opened, if it is one, or what a pack holds under its path. Opening a pipe would wait for a writer, and
    opening a device may do anything."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            problem = "is a folder, pipe or device, not a file"
            raise fault(path, "not-a-file", problem, "replace it by an image, or remove it")
        return MeteredFile(path, max_pixels)
    except FileNotFoundError as error:
        if stored := find_stored(path):
            return MeteredFile(path, max_pixels, stored.open(whole=whole))
        problem, fix = "no such image", "correct the file name or the image folder"
        if os.path.islink(path):
            problem, fix = f"is a link to {os.readlink(path)}, which is missing", "restore or remove it"
        raise fault(path, "no-such-image", problem, fix) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
        raise fault(path, "unreadable-image", problem, "correct its name or give read permission") from error


def _identify(path: Path, file: MeteredFile, max_pixels: int) -> ImageFile.ImageFile:
    """`Image.open` for `FORMATS`, without its own limit of pixels, which warns of images up to twice as large.

    Pillow is given no file name, or it would map some files into memory; a mapped file that another process shortens
    kills the reader.
    """
    start = file.read(16)
    if not start:
        raise fault(path, "bad-image", "is empty (0 bytes)", "copy or download it again, or remove it")
    if name := format_of(start):
        if name == HEIF:
            _register_heif(path)
        elif name == "GIF":  # Pillow fills a whole frame while it reads the header of some
            _check_pixels(path, struct.unpack("<HH", start[6:10]), max_pixels)
        file.seek(0)
        try:
            return Image.OPEN[name][0](file, "")
        except SyntaxError as error:
            if name != "TIFF" or "pixel mode" not in str(error):
                raise
            problem = "is a TIFF of other channels or values than those of grey and RGB"
            raise fault(path, "other-channels", problem, "give data.channels=N as it has, or convert it") from error
    problem = f"is not an image that can be read here ({', '.join(FORMATS)})"
    raise fault(path, "bad-image", problem, "replace or convert it, or remove it")


def format_of(start: bytes) -> str | None:
    """Which of `FORMATS` a file begins as, or `HEIF`; None if it is no image that can be read here."""
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return HEIF
    for name in FORMATS:
        accepts = Image.OPEN[name][1]
        if accepts is not None and accepts(start) is True and (name != "PPM" or start[2:3].isspace()):
            return name
    return None


def _register_heif(path: Path) -> None:
    """Photographs of iPhones need a package that is not installed with this one."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        fix = "pip install 'retina-detect[heif]', or convert it to JPEG"
        raise fault(path, "missing-package", "is a HEIC image, and pillow-heif is not installed", fix) from error
    register_heif_opener()


def _check_pixels(path: Path, size: tuple[int, ...], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        problem = f"has {width}x{height} pixels, more than max_pixels={max_pixels} allows"
        raise fault(path, "too-many-pixels", problem, "make it smaller, remove it, or raise that limit")


def read_header(path: Path, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Raises DataError."""
    with opened(path, max_pixels, whole=False) as image:
        return header_of(image)


def header_of(image: ImageFile.ImageFile) -> Header:
    """Of an image whose pixels are not loaded yet."""
    width, height = image.size
    bits = 16 if image.mode in GREY_16 else 8
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # newer versions of Pillow state its size as turned
        width, height = image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
        bits = max(image.tag_v2.get(_BITS) or (1,))
    elif isinstance(image, PngImagePlugin.PngImageFile) and image.tile and ";16" in str(image.tile[0][3]):
        bits = 16
    turn = turn_of(image)
    return Header.of((height, width), turn, bits)


def turn_of(image: ImageFile.ImageFile) -> Image.Transpose | None:
    """What makes the image upright, from what stands before its pixels (in a PNG, also behind them)."""
    try:
        if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info:
            image.info |= _late_exif(image.fp)  # type: ignore[arg-type] # it is open
        # not the PNG's own getexif, which decodes the pixels to see what comes behind them
        return TURNS.get(Image.Image.getexif(image).get(ORIENTATION, 1))
    except Exception:  # EXIF data may be anything, and are worth no image
        return None


def _late_exif(file: IO[bytes]) -> dict[str, bytes]:
    """The eXIf chunk of a PNG whose header has none, as `exif`. (Loading the pixels begins with a seek to them.)"""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            return {"exif": file.read(min(length, _MAX_EXIF))}
        file.seek(length + 4, os.SEEK_CUR)
    return {}


def fault(path: Path | str, code: str, problem: str, fix: str) -> DataError:
    return DataError(f"{path}: {' '.join(problem.split())} - {fix}", code=code)
