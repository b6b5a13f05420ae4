"""Image files as RGB arrays, by the one decoder that both tells of damage and rotates as EXIF says: Pillow."""

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from jaxtyping import UInt8

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

from retina.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
"""Images of more pixels than this are refused before they are decoded, unless a caller allows more."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright (Exif 2.32, tag 0x0112)."""
_SWAPPING = (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])
"""Those that swap width and height."""
_SHORT = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # "I" too: before Pillow 11.3 a 16-bit grey PNG opened as that
_MAX_EXIF = 1 << 20


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image file to uint8 RGB with its EXIF rotation applied; the array is writable.

    What kind of image it is, its content decides, not its name. Grey, palette, 1-bit and CMYK images are converted;
    transparency is dropped, not blended with a colour. 16 bits per channel keep their high byte (Pillow's own
    conversion of 16-bit grey would saturate at 255). Of an animation, the first frame. EXIF data that cannot be
    understood rotates nothing.

    Raises:
        DataError: the file is missing, not to be read, no regular file (a pipe is never waited for), no image of
            `FORMATS`, of more than `max_pixels`, cut off, damaged, too large for the memory, or of 32 bits per channel.
    """
    return read_reduced(path, lambda size: None, max_pixels=max_pixels)[0]


def read_reduced(
    path: Path, least_size: Callable[[tuple[int, int]], tuple[int, int] | None], *, max_pixels: int = MAX_PIXELS
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """`read_image` for one who will shrink the image anyway, and the (height, width) that `read_image` would have.

    `least_size` is given that and says which size it must still have at least; None decodes every pixel. A JPEG is
    decoded to an eighth, a quarter or half of its sides where that suffices, in half the time for photographs of 12
    megapixels: libjpeg then averages blocks of pixels, as shrinking by area does. Only a fraction that divides both
    sides is taken, so that boxes keep their place exactly.

    Raises as `read_image` does, and for the same files: all of a file is read still.
    """
    with _opened(path, max_pixels) as image:
        turn = _turn(image)
        factor = _reduce(image, turn, least_size)
        image.load()
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _ORIENTATION not in image.tag_v2:
            turn = None  # newer versions of Pillow have turned a TIFF, and only that, while they loaded it
        array = _as_rgb(path, image if turn is None else image.transpose(turn))
    height, width = array.shape[:2]
    return array, (height * factor, width * factor)


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of what `read_image` returns, from the file's header; the pixels are not decoded.

    Raises DataError as `read_image` does, as far as the header can tell.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # newer versions of Pillow state its size as turned
            width, height = image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
        turned = _turn(image) in _SWAPPING
    return (width, height) if turned else (height, width)


def list_images(folder: Path) -> list[Path]:
    """All image files under a folder and its sub-folders, by extension in any case, sorted; hidden files left out.

    Links to folders are not followed, so loops of them end; links to files are listed, wherever they lead.

    Raises:
        DataError: there is no such folder, or a folder in it may not be read.
    """
    if not os.path.isdir(folder):  # Path.is_dir raises where permissions are missing
        raise _fault(folder, "no-such-folder", "no such folder of images", "correct the path")

    def fail(error: OSError) -> NoReturn:
        raise _fault(
            error.filename, "unreadable-folder", f"cannot be listed ({error.strerror})", "give permission or move it"
        ) from error

    paths = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=fail) for name in names]
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """The image with nothing but its header read. Whatever is raised in the block leaves it as a DataError."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have set it; half a picture must never be trained on
    if Image.MAX_IMAGE_PIXELS is not None:  # some formats ask while they load, and would warn of what is allowed here
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        with _open_regular(path) as file:
            image = _identify(path, file, max_pixels)
            _check_pixels(path, image.size, max_pixels)
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # formats that Pillow itself checks before we can
        raise _fault(
            path, "too-many-pixels", f"has too many pixels ({error})", "make it smaller or remove it"
        ) from error
    except MemoryError as error:
        raise _fault(
            path, "out-of-memory", "needs more memory than there is", "make it smaller, or lower num_workers"
        ) from error
    except Exception as error:  # on a damaged file, decoders raise whatever they stumble over
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}" or type(error).__name__
        raise _fault(
            path, "bad-image", f"cannot be decoded ({reason})", "copy or download it again, or remove it"
        ) from error


def _open_regular(path: Path) -> BinaryIO:
    """The file opened, if it is one. Opening a pipe would wait for a writer, and opening a device may do anything."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _fault(
                path, "not-a-file", "is a folder, pipe or device, not a file", "replace it by an image, or remove it"
            )
        return open(path, "rb")
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise _fault(
                path, "no-such-image", f"is a link to {os.readlink(path)}, which is missing", "restore or remove it"
            ) from error
        raise _fault(path, "no-such-image", "no such image", "correct the file name or the image folder") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise _fault(
            path, "unreadable-image", f"cannot be opened ({reason})", "correct its name or give read permission"
        ) from error


def _identify(path: Path, file: BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    """`Image.open` for `FORMATS`, without its own limit of pixels, which warns of images up to twice as large.

    Pillow is given no file name, or it would map some files into memory; a mapped file that another process shortens
    kills the reader.
    """
    start = file.read(16)
    if not start:
        raise _fault(path, "bad-image", "is empty (0 bytes)", "copy or download it again, or remove it")
    for name in FORMATS:
        make, accepts = Image.OPEN[name]
        if accepts is not None and accepts(start) is True:
            if name == "GIF":  # Pillow fills a whole frame while it reads the header of some
                _check_pixels(path, struct.unpack("<HH", start[6:10]), max_pixels)
            file.seek(0)
            return make(file, "")
    kinds = ", ".join(FORMATS)
    raise _fault(
        path, "bad-image", f"is not an image that can be read here ({kinds})", "replace or convert it, or remove it"
    )


def _check_pixels(path: Path, size: tuple[int, ...], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        problem = f"has {width}x{height} pixels, more than max_pixels={max_pixels} allows"
        raise _fault(path, "too-many-pixels", problem, "make it smaller, remove it, or raise that limit")


def _turn(image: ImageFile.ImageFile) -> Image.Transpose | None:
    """What makes the image upright, from what stands before its pixels (in a PNG, also behind them)."""
    try:
        if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info:
            late = _late_exif(image.fp)  # type: ignore[arg-type] # it is open
            if late is not None:
                image.info["exif"] = late
        # not the PNG's own getexif, which decodes the pixels to see what comes behind them
        return _TURNS.get(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # EXIF data may be anything, and are worth no image
        return None


def _reduce(
    image: ImageFile.ImageFile,
    turn: Image.Transpose | None,
    least_size: Callable[[tuple[int, int]], tuple[int, int] | None],
) -> int:
    """Tells a JPEG's decoder by how much to reduce it; returns that factor, 1 where it is not to."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    width, height = image.size
    size = (width, height) if turn in _SWAPPING else (height, width)
    least = least_size(size) or size
    for factor in (8, 4, 2):
        if all(side % factor == 0 and side >= factor * enough for side, enough in zip(size, least, strict=True)):
            image.draft(None, (width // factor, height // factor))
            break
    return width // image.width


def _as_rgb(path: Path, upright: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    # with a transparent colour in a palette, convert() would warn and look for a colour to stand for it
    upright.info.pop("transparency", None)
    if upright.mode in _SHORT:
        grey = np.asarray(upright)
        if grey.min() >= 0 and grey.max() <= 65535:
            return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if upright.mode in ("F", *_SHORT):
        raise _fault(path, "bad-image", "has 32 bits per channel", "convert it to 8 or 16 bits")
    return np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _late_exif(file: BinaryIO) -> bytes | None:
    """The eXIf chunk of a PNG whose header has none. (Loading the pixels begins with a seek to them.)"""
    file.seek(8)
    exif = None
    while exif is None and len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            exif = file.read(min(length, _MAX_EXIF))
        else:
            file.seek(length + 4, os.SEEK_CUR)
    return exif


def _fault(path: Path | str, code: str, problem: str, fix: str) -> DataError:
    return DataError(f"{path}: {' '.join(problem.split())} - {fix}", code=code)
