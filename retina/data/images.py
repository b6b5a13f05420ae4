"""Image files as RGB arrays, by the one decoder that both tells of damage and rotates as EXIF says: Pillow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, JpegImagePlugin, TiffImagePlugin

from retina.data.channels import LIKE_RGB
from retina.data.image_files import GREY_16, MAX_PIXELS, ORIENTATION, SWAPPING, fault, header_of, opened, read_header
from retina.data.pixels import AS_STORED, FULL, PixelFormat, as_grey, read_channels, stretched


def read_image(
    path: Path, *, max_pixels: int = MAX_PIXELS, pixels: PixelFormat = AS_STORED
) -> UInt8[np.ndarray, "H W C"]:
    """Decode an image file to uint8 RGB, or what `pixels` says, upright as EXIF has it; the array is writable.

    The content decides what kind of image it is, not the name. Grey, palette, 1-bit and CMYK images are converted;
    transparency is dropped, not blended with a colour. 16 bits per channel keep their high byte (Pillow's own
    conversion of 16-bit grey would saturate at 255), or what `pixels` says. Of an animation, the first frame.

    Raises DataError for a file that is missing, may not be read, is no regular file (a pipe is never waited for), no
    image of `FORMATS`, has more than `max_pixels`, is cut off, damaged, too large for the memory, or has 32 bits per
    channel.
    """
    return read_reduced(path, lambda size: None, max_pixels=max_pixels, pixels=pixels)[0]


def read_reduced(
    path: Path,
    least_size: Callable[[tuple[int, int]], tuple[int, int] | None],
    *,
    max_pixels: int = MAX_PIXELS,
    pixels: PixelFormat = AS_STORED,
) -> tuple[UInt8[np.ndarray, "h w C"], tuple[int, int]]:
    """`read_image` for one who will shrink the image anyway, and the (height, width) that `read_image` would have.

    `least_size` is given that size and says which one the image must still have at least; None decodes every pixel. A
    JPEG is decoded to an eighth, a quarter or half of its sides where that suffices, in half the time for photographs
    of 12 megapixels: libjpeg then averages blocks of pixels. Only a fraction that divides both sides is taken, so that
    boxes keep their place exactly. Raises as `read_image` does, for the same files: all of a file is read still.
    """
    if pixels.channels not in LIKE_RGB:
        array = read_channels(path, max_pixels, pixels)
        return array, array.shape[:2]
    with opened(path, max_pixels) as image:
        header = header_of(image)
        turn = header.turn
        if header.bits > 16:
            # values that fit into 16 bits would pass for those of a 16-bit image
            raise fault(path, "bad-image", "has 32 bits per channel", "convert it to 8 or 16 bits")
        factor = _reduce(image, turn, least_size)
        image.load()
        if isinstance(image, TiffImagePlugin.TiffImageFile) and ORIENTATION not in image.tag_v2:
            turn = None  # newer versions of Pillow have turned a TIFF, and only that, while they loaded it
        upright: Image.Image = image if turn is None else image.transpose(turn)
        if header.bits == 16 and pixels.value_range != FULL:
            upright = stretched(path, upright, header, pixels.value_range)
        array = _as_rgb(path, upright)
    height, width = array.shape[:2]
    array = array if pixels.channels == 3 else as_grey(array)
    return array, (height * factor, width * factor)


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of what `read_image` returns, and its errors, as far as the file's header can tell."""
    return read_header(path, max_pixels=max_pixels).size


def _reduce(
    image: ImageFile.ImageFile,
    turn: Image.Transpose | None,
    least_size: Callable[[tuple[int, int]], tuple[int, int] | None],
) -> int:
    """Tells a JPEG's decoder by how much to reduce it; returns that factor, 1 where it is not to."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    width, height = image.size
    size = (width, height) if turn in SWAPPING else (height, width)
    least = least_size(size) or size
    for factor in (8, 4, 2):
        if all(side % factor == 0 and side >= factor * enough for side, enough in zip(size, least, strict=True)):
            image.draft(None, (width // factor, height // factor))
            break
    return width // image.width


def _as_rgb(path: Path, upright: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    # with a transparent colour in a palette, convert() would warn and look for a colour to stand for it
    upright.info.pop("transparency", None)
    if upright.mode in GREY_16:
        grey = np.asarray(upright)
        if grey.min() >= 0 and grey.max() <= 65535:
            return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if upright.mode in ("F", *GREY_16):
        raise fault(path, "bad-image", "has 32 bits per channel", "convert it to 8 or 16 bits")
    return np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
