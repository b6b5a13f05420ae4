"""Image files as RGB arrays, by the one decoder that both tells of damage and rotates as EXIF says: Pillow."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from retina.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000
"""Images of more pixels than this are refused before they are decoded, unless a caller allows more."""

_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)
"""Values of the EXIF orientation that swap width and height (Exif 2.32, tag 0x0112)."""
_SHORT = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # "I" too: before Pillow 11.3 a 16-bit grey PNG opened as that


def read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image file to uint8 RGB with its EXIF rotation applied; the array is writable.

    Grey, palette, 1-bit and CMYK images are converted; transparency is dropped, not blended with a colour. 16-bit grey
    keeps the high byte, as Pillow does for 16-bit colour (its own conversion of grey would saturate at 255). Of
    an animation, the first frame.

    Raises:
        DataError: the file is missing, cut off, damaged or no image, or has 32 bits per channel.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have set it; half a picture must never be trained on
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in _SHORT:
                grey = np.asarray(image)
                if grey.size and (grey.min() < 0 or grey.max() > 65535):
                    raise _fault(path, "has 32 bits per channel", "convert it to 8 or 16 bits")
                return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if image.mode == "F":
                raise _fault(path, "has 32 bits per channel", "convert it to 8 or 16 bits")
            return np.array(image.convert("RGB"))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise _fault(path, "no such image", "correct the file name or the image folder") from error
    except UnidentifiedImageError as error:
        raise _fault(path, "is not an image that Pillow can read", "replace it, or remove it from the data") from error
    except Exception as error:  # on a damaged file, decoders raise whatever they stumble over
        raise _fault(path, f"cannot be decoded ({error})", "copy or download it again, or remove it") from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header, after EXIF rotation; the pixels are not decoded.

    Raises DataError when the file is missing or its header is not that of an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error and others
        raise DataError(f"{path}: cannot be read as an image ({error}) - replace the file or remove it") from error
    return (width, height) if turned else (height, width)


def list_images(folder: Path) -> list[Path]:
    """All image files under a folder and its sub-folders, by extension in any case, sorted; hidden files left out.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise _fault(folder, "no such folder of images", "correct the path")
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def _fault(path: Path, problem: str, fix: str) -> DataError:
    return DataError(f"{path}: {' '.join(problem.split())} - {fix}")
