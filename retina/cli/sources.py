"""Which images tools/infer.py looks at, and what it calls their pictures."""

import glob
import itertools
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from retina.data.channels import RGB, read_header_of
from retina.data.image_lists import list_images, other_files
from retina.errors import ConfigError, DataError

STDIN = "-"
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
FORMATS |= {".tif": "TIFF", ".tiff": "TIFF"}
"""What pictures are written as. Not as GIF, which has too few colours."""


class Source(NamedTuple):
    """An image to look at."""

    file: Path
    name: str
    """Relative to the folder of all images, with `/`."""
    picture: str
    """Where its annotated picture goes, relative to the output; never the same for two of them."""


def find_images(source: str, output: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the images of a folder with its sub-folders, a glob, a single path, or
    a list of paths: a text file, or what comes from standard input.

    What lies under an `output` inside that folder does not count, nor do folders that are symbolic links, and files and
    folders whose name begins with a dot. Raises DataError when there is nothing, ConfigError for an `output` that the
    source itself lies in."""
    path = Path(source)
    if source == STDIN or (path.suffix.lower() == ".txt" and path.is_file()):
        files = listed_files(source)
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path
    elif path.is_dir():
        root, files = path, list_images(path)
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        files = expand(source)
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path
    inside = _real(output)
    if files and _real(root).is_relative_to(inside):
        problem = f"{output} holds the source {source} - choose another folder"
        raise ConfigError(problem, code="output-in-data", key="output")
    folders = {folder: _real(folder) for folder in {file.parent for file in files}}
    targets = [_real(file) if file.is_symlink() else folders[file.parent] for file in files]
    files = [file for file, target in zip(files, targets, strict=True) if not target.is_relative_to(inside)]
    if not files:
        problem = f"{source}: no images there - give a folder, an image or a glob such as 'photos/*.jpg'"
        raise DataError(problem, code="no-images")
    return root, files


def listed_files(source: str) -> list[Path]:
    """The paths in the lines of a text file, or of standard input, each once. Reading them tells which are no images.

    Raises DataError for a list that is no text, ConfigError for standard input where several processes would share it.
    """
    try:
        if source != STDIN:
            lines = Path(source).read_text("utf-8", errors="surrogateescape").splitlines()
        elif int(os.environ.get("WORLD_SIZE") or 1) > 1:
            problem = "is standard input, which several processes cannot share - give a list in a file"
            raise ConfigError(problem, code="contradiction", key="source")
        else:
            lines = [line.rstrip("\r\n") for line in sys.stdin]
    except (OSError, ValueError) as fault:
        raise DataError(
            f"{source}: no list of paths ({fault}) - give one path in each line", code="no-images"
        ) from None
    named = dict.fromkeys(line for line in lines if line.strip() and "\0" not in line)
    return [_real(Path(name).parent) / Path(name).name for name in named]


def left_out(source: str, output: Path) -> list[str]:
    """Names of the files in a folder that are neither images nor texts, nor below `output`."""
    others = other_files(Path(source)) if os.path.isdir(source) else []
    return [file.name for file in others if not _real(file).is_relative_to(_real(output))]


def groups_of(
    sources: Sequence[Source],
    max_pixels: int,
    channels: int = RGB,
    noted: Callable[[Path], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[list[Source], int]]:
    """Consecutive images, as many as have `max_pixels` pixels together, and their pixels: so the memory that they take
    is bounded by the pixels, not by the number of images. Each header is read within `noted`."""
    group: list[Source] = []
    held = 0
    for source in sources:
        try:
            with noted(source.file):
                pixels = math.prod(read_header_of(source.file, channels, max_pixels=max_pixels).size)
        except DataError:  # reading it will tell
            pixels = 0
        if group and held + pixels > max_pixels:
            yield group, held
            group, held = [], 0
        group.append(source)
        held += pixels
    yield group, held


def expand(pattern: str) -> list[Path]:
    """The files that a glob finds, each once."""
    parts = Path(pattern).parts
    fixed = 0  # parts before the first with a wildcard; a folder may be called `[2024] trip`
    while fixed < len(parts) and (not glob.has_magic(parts[fixed]) or Path(*parts[: fixed + 1]).exists()):
        fixed += 1
    base = Path(*parts[:fixed])
    if fixed == len(parts):
        return []
    try:
        # unlike glob.glob, `**` here does not walk through symbolic links, which may go round in circles
        files = [path for path in base.glob(os.sep.join(parts[fixed:])) if path.is_file()]
    except ValueError as fault:
        raise ConfigError(f"{pattern}: {fault} - correct the pattern", code="bad-pattern", key="source") from None
    shown = [path for path in files if not any(part[0] == "." != part for part in path.relative_to(base).parts)]
    folders = {folder: _real(folder) for folder in {path.parent for path in shown}}  # without any `..`
    return sorted({folders[path.parent] / path.name for path in shown})


def name_sources(root: Path, files: Iterable[Path]) -> list[Source]:
    """The images in the order of their names, which are relative to `root`.

    A picture has the name of its image, with `.jpg` after it if its own suffix is not in FORMATS. If another picture or
    a folder has that name already, in whatever capitals, `~2`, `~3`, ... comes before the suffix."""
    named = sorted((file.relative_to(root).as_posix(), file) for file in files)
    taken = {_folded(str(parent)) for name, _ in named for parent in PurePosixPath(name).parents}
    sources = []
    for name, file in named:
        picture = next(path for path in _candidates(PurePosixPath(name)) if _folded(path) not in taken)
        taken.add(_folded(picture))
        sources.append(Source(file, name, picture))
    return sources


def _candidates(name: PurePosixPath) -> Iterator[str]:
    stem, suffix = (name.stem, name.suffix) if name.suffix.lower() in FORMATS else (name.name, ".jpg")
    for number in itertools.count(1):
        tail = suffix if number == 1 else f"~{number}{suffix}"
        short = stem
        while len(os.fsencode(short + tail)) > 255:  # the longest name that file systems take
            short = short[:-1]
        yield (name.parent / (short + tail)).as_posix()


def _folded(name: str) -> str:
    """Equal for names that file systems which ignore case, or the spelling of accents, hold for equal."""
    return unicodedata.normalize("NFKC", name).casefold()


def _real(path: Path) -> Path:
    """Without links and `..`; unlike `Path.resolve`, takes a link that goes round in circles as it is."""
    return Path(os.path.realpath(path))
