"""Which files of a folder are images: by suffix, and by content where the suffix says nothing. Beside the road."""

import os
from pathlib import Path
from typing import NoReturn

from retina.data.image_files import fault, format_of
from retina.data.packs import INDEX, is_shard, packed_paths

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_TEXTS = (".txt", ".xml", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".md", ".names", ".data", ".cfg", ".log")
_RAWS = (".dng", ".cr2", ".nef", ".arw", ".orf", ".rw2", ".pef", ".srw")
"""Of cameras: they begin as a TIFF does, and hold a small picture beside the values of the sensor."""


def list_images(folder: Path) -> list[Path]:
    """All image files under a folder and its sub-folders, sorted; hidden files left out.

    Those with a usual suffix, in any case, and those with another or none that begin as an image does. Links to folders
    are not followed, so loops of them end; links to files are listed, wherever they lead. So are the images of packs.
    Raises DataError if there is no such folder, or a folder in it may not be read, or a pack is damaged.
    """
    files = [path for path in _files(folder) if _is_image(path)]
    return sorted({*files, *packed_paths(folder)})


def other_files(folder: Path) -> list[Path]:
    """The files that `list_images` leaves out, except texts as labels are written in, and hidden ones."""
    others = (path for path in _files(folder) if path.suffix.lower() not in _TEXTS and not _is_image(path))
    return sorted(path for path in others if not is_shard(path) and path.parent.name != INDEX)


def has_image_suffix(name: str) -> bool:
    """Whether a file that is not hidden has one of the usual suffixes."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _files(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):  # Path.is_dir raises where permissions are missing
        raise fault(folder, "no-such-folder", "no such folder of images", "correct the path")

    def fail(error: OSError) -> NoReturn:
        problem = f"cannot be listed ({error.strerror})"
        raise fault(error.filename, "unreadable-folder", problem, "give permission or move it") from error

    paths = (Path(parent, name) for parent, _, names in os.walk(folder, onerror=fail) for name in names)
    return [path for path in paths if not path.name.startswith(".")]


def _is_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in _TEXTS or suffix in _RAWS:
        return suffix in IMAGE_SUFFIXES
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for a writer
            return False
        with path.open("rb") as file:
            return format_of(file.read(16)) is not None
    except OSError:
        return False
