"""A data set as it lies on disk: its image files against what the annotations say, and its splits against each other.

Image files are looked at by their headers, in threads; `undecodable` looks at every pixel. Nothing is written.
"""

import difflib
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from retina.data.alike import thumbnails, twins
from retina.data.channels import read_header_of
from retina.data.checks import DataReport, some
from retina.data.coco import Annotations
from retina.data.image_files import SWAPPING, Header
from retina.data.image_lists import has_image_suffix
from retina.data.images import read_image
from retina.data.oddities import content_oddities
from retina.data.packs import list_folders, open_stored, version_of
from retina.data.paths import Folder, is_listed, parted
from retina.errors import DataError

_THREADS = 8
"""Enough to hide the latency of a network disk; reading headers is Python, which runs in one thread at a time."""
_CHUNK = 64
_QUICK = 5000
"""Images of all splits up to which they are compared by looks before training too: decoding them takes seconds."""
_HINTED = 20
"""Missing files for which a name that looks alike is searched for: it takes milliseconds each."""
_CANDIDATES = 2000


class Files(NamedTuple):
    """What the image files of a split turned out to be."""

    bad: dict[int, str]
    """The images that cannot be used (missing, unreadable, not of the size stated), and why, in one line each."""
    lengths: Int64[np.ndarray, "N"]
    """Bytes of each file, -1 of a bad one."""
    turned: list[int]
    """Those that EXIF turns without a change of their size."""
    deep: list[int]
    """Those of 16 bits per channel."""


def examine(
    splits: Mapping[str, Annotations], report: DataReport, *, max_pixels: int, thorough: bool = False
) -> dict[str, Files]:
    """The image files of every split, whether there are objects at all, and "train" against "val" if both are given.

    thorough: compare images by their looks also where there are thousands.

    Everything found goes to `report`; what the files turned out to be is returned by split."""
    files = {}
    for split, annotations in splits.items():
        files[split] = check_files(annotations, max_pixels=max_pixels)
        report.faults += [*files[split].bad.values(), *check_objects(annotations)]
        if turned := files[split].turned:
            names = some([annotations.file_name(row) for row in turned])
            problem = f"{len(turned)} are turned by EXIF without a change of size ({names}), so nobody can tell whether"
            fix = "look at some with their boxes; where they lie elsewhere, remove the rotation from the file"
            line = f"{annotations.file}: images: {problem} boxes are those of the image as displayed - {fix}"
            report.warnings.append(line)
    report.warnings += content_oddities(splits)
    if "train" in splits and "val" in splits and splits["train"] is not splits["val"]:
        before = len(report.faults), len(report.warnings)
        compare_splits(splits["train"], splits["val"], report, files)
        equal = (len(report.faults), len(report.warnings)) != before  # they look alike too, and are to be mended first
        if not equal and (thorough or sum(map(len, splits.values())) <= _QUICK):
            report.warnings += _alike_images(splits["train"], splits["val"], max_pixels)
    return files


def check_files(annotations: Annotations, *, max_pixels: int) -> Files:
    """Every image is there under exactly its name, has the header of an image, and is of the size stated.

    Each folder is listed once, so that a missing file costs no look-up and a wrong case is found on any file system."""
    names = [annotations.file_name(row) for row in range(len(annotations))]
    folders = list_folders(annotations.image_root, [*names, ""])
    present = [row for row, name in enumerate(names) if is_listed(name, folders)]
    bad = _missing(annotations, sorted(set(range(len(names))) - set(present)), names, folders)
    files = Files(bad, np.full(len(names), -1, dtype=np.int64), [], [])

    def read(first: int) -> list[tuple[int, int, Header | str]]:
        rows = present[first : first + _CHUNK]
        return [(row, *_check_header(annotations, row, names[row], max_pixels)) for row in rows]

    with ThreadPoolExecutor(_THREADS) as pool:
        for row, files.lengths[row], header in chain.from_iterable(pool.map(read, range(0, len(present), _CHUNK))):
            if isinstance(header, str):
                bad[row] = header
                continue
            files.turned.extend([row] if header.turns_unseen else [])
            files.deep.extend([row] if header.bits == 16 else [])
    return files._replace(bad=dict(sorted(bad.items())))


def undecodable(annotations: Annotations, rows: Iterable[int], *, max_pixels: int) -> Iterator[str | None]:
    """For each of the images in turn, why it cannot be decoded, or None: every pixel is read, by as many threads as
    there are processors."""

    def fault(row: int) -> str | None:
        try:
            read_image(annotations.path(row), max_pixels=max_pixels, pixels=annotations.pixels)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(fault, rows)


def check_objects(annotations: Annotations) -> list[str]:
    """A fault if there is nothing to detect at all."""
    edges = np.repeat(annotations.sizes[:, [1, 0]], np.diff(annotations.offsets), axis=0)
    sides = np.minimum(annotations.boxes[:, 2:], edges) - np.maximum(annotations.boxes[:, :2], 0)
    if (~annotations.crowd & (sides > 0).all(axis=1)).any():  # training leaves out the others
        return []
    state = "are empty"
    if len(annotations.labels):
        state = "are boxes without area only" if annotations.num_objects else "are crowd regions only"
    problem = f"{state}: nothing to learn and nothing to score"
    return [f"{annotations.file}: annotations: {problem} - annotate some images, or give another file"]


def unnamed_images(splits: Mapping[str, Annotations]) -> Iterator[str]:
    """A line for each image folder with images, by their suffix, that no record of these splits names.

    Only folders that records name files in are looked at: others may hold anything."""
    unnamed: dict[str, set[str]] = {}
    named = set[str]()
    for split in splits.values():
        names = [parted(split.file_name(row)) for row in range(len(split))]
        places = {parent: os.path.realpath(split.image_root / parent) for parent, _ in names}
        named |= {os.path.join(places[parent], last) for parent, last in names}
        for parent, folder in list_folders(
            split.image_root, [f"{parent}/" if parent else "" for parent in places]
        ).items():
            place = places[parent]
            unnamed[place] = {os.path.join(place, name) for name in folder.names if has_image_suffix(name)}
    for place, files in unnamed.items():
        if files := files - named:
            shown = some(sorted(os.path.basename(file) for file in files))
            problem = (
                f"{len(files)} images are named by no record of {' and '.join(splits)} ({shown}), and are not used"
            )
            yield f"{place}: {problem} - add records for them: one without annotations is an image without objects"


def compare_splits(train: Annotations, val: Annotations, report: DataReport, files: Mapping[str, Files]) -> None:
    """Warns of what makes training and evaluation differ: other category ids, classes without objects, the same images.

    `files` are those of "train" and "val"; images are the same if all their bytes are."""
    if os.path.realpath(train.file) == os.path.realpath(val.file):
        report.warnings.append(
            f"{val.file}: is both train and val - scores will say nothing about images never trained on"
        )
        return
    report.warnings += _category_warnings(train, val)
    for row, twin in _same_images(train, val, files).items():
        image = f"image {train.image_ids[twin]} ({train.file_name(twin)}) of {train.file}"
        fix = "remove it from one of the two: the detector is scored on what it has seen"
        report.warnings.append(f"{_record(val, row)}: has the same bytes as {image} - {fix}")


def _category_warnings(train: Annotations, val: Annotations) -> Iterator[str]:
    ids = zip(train.classes, train.category_ids, val.category_ids, strict=True)
    if moved := [f"{name} is {id1} and {id2}" for name, id1, id2 in ids if id2 not in (id1, None)]:
        problem = f"other ids or another order than in {train.file} ({some(moved)})"
        fix = "nothing to do here, where classes are matched by name; other tools may mix them up"
        yield f"{val.file}: categories: {problem} - {fix}"
    for split, other, lack in ((train, val, "they are never learned"), (val, train, "they have no score")):
        counts = zip(split.classes, split.class_counts(), other.class_counts(), strict=True)
        absent = [name for name, here, there in counts if here == 0 and there > 0]
        if absent and split.num_objects:
            problem = f"no object of {some(absent)}, of which {other.file} has some: {lack}"
            yield f"{split.file}: categories: {problem} - divide the images anew, or leave it so"


def _same_images(train: Annotations, val: Annotations, files: Mapping[str, Files]) -> dict[int, int]:
    """Rows of `val` and of `train` with equal bytes. Only files of equal length and shape are read."""
    keys = []
    for name, split in (("train", train), ("val", val)):
        keys.append([*zip(files[name].lengths.tolist(), *split.sizes.T.tolist(), strict=True)])
    common = {key for key in set(keys[0]) & set(keys[1]) if key[0] >= 0}

    def digests(split: Annotations, keys: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, bytes | None]]:
        rows = [row for row, key in enumerate(keys) if key in common]
        with ThreadPoolExecutor(_THREADS) as pool:
            yield from zip(rows, pool.map(lambda row: _digest(split.path(row)), rows), strict=True)

    train_rows = {digest: row for row, digest in digests(train, keys[0]) if digest}
    return {row: train_rows[digest] for row, digest in digests(val, keys[1]) if digest in train_rows}


def _alike_images(train: Annotations, val: Annotations, max_pixels: int) -> Iterator[str]:
    """Of `val`, those that look like one of `train`, its equal bytes included, in one line."""
    looks = [
        thumbnails([split.path(row) for row in range(len(split))], max_pixels=max_pixels) for split in (train, val)
    ]
    if pairs := twins(*looks):
        names = some([f"{val.file_name(row)} and {train.file_name(twin)}" for row, twin in pairs.items()])
        problem = f"{len(pairs)} look like one of {train.file} ({names}): equal, re-encoded, or frames of one video"
        fix = "keep such pairs in one split: the detector is scored on what it has seen"
        yield f"{val.file}: images: {problem} - {fix}"


def _digest(file: Path) -> bytes | None:
    try:
        with open_stored(file) as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except (OSError, DataError):  # gone meanwhile: whoever reads it next says so
        return None


def _check_header(annotations: Annotations, row: int, name: str, max_pixels: int) -> tuple[int, Header | str]:
    """Bytes of the file and its header, or -1 and what is wrong with it."""
    path = annotations.image_root / name
    try:
        header = read_header_of(path, annotations.pixels.channels, max_pixels=max_pixels)
        length = version_of(path)[0]
    except DataError as error:
        return -1, str(error)
    except OSError as error:
        return -1, f"{path}: cannot be read ({error.strerror}) - check its permissions and the disk"
    stated, (height, width) = tuple(annotations.sizes[row].tolist()), header.size
    if header.size == stated:
        return length, header
    problem = f"stated as {stated[1]}x{stated[0]}, but the file is {width}x{height}"
    fix = "correct the image's width, height and boxes"
    if (width, height) == stated:
        problem, fix = f"{problem}: width and height are swapped", "swap them"
        if header.turn in SWAPPING:
            problem += ", the file is rotated by EXIF"
            fix = "state the size as displayed and turn the boxes, or remove the rotation from the file"
    return -1, f"{_record(annotations, row)}: {problem} - {fix}"


def _missing(
    annotations: Annotations, rows: Sequence[int], names: Sequence[str], folders: Mapping[str, Folder]
) -> dict[int, str]:
    """One line for each image that is not there, with the file that is likely meant."""
    if not rows:
        return {}
    root = annotations.image_root
    claimed = set(names)
    places: dict[str, list[str]] = {}
    for parent, folder in {**folders, **list_folders(root, [f"{name}/" for name in _subfolders(root)])}.items():
        for name in folder.names:
            places.setdefault(name, []).append(f"{parent}/{name}" if parent else name)
    spellings = {parent: {_folded(name): name for name in folder.names} for parent, folder in folders.items()}
    faults = {}
    for count, row in enumerate(rows):
        name = names[row]
        parent, last = parted(name)
        folder = folders[parent]
        if hint := spellings[parent].get(_folded(last)):
            fix = f"it is written {hint!r} there; write file_name so"
        elif others := [place for place in places.get(last, []) if place != name]:
            fix = f"did you mean {others[0]!r}? Correct file_name"
        elif count < _HINTED and (hint := _alike(name, parent, folder.names, claimed)):
            fix = f"did you mean {hint!r}? Correct file_name"
        else:
            fix = "add the file, or correct the image folder or file_name"
        where = f"{root / parent}" + (f" ({folder.fault})" if folder.fault else "")
        faults[row] = f"{_record(annotations, row)}: no such image in {where} - {fix}"
    return faults


def _subfolders(root: Path) -> list[str]:
    try:
        return [entry.name for entry in root.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _folded(name: str) -> str:
    """The same for names that differ in case, or in how their accents are encoded, only."""
    return name.casefold() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _alike(name: str, parent: str, present: Iterable[str], claimed: set[str]) -> str | None:
    """A file of the same folder that looks like it and that no record names. Another number is another image."""

    def numbers(text: str) -> list[str]:
        return [digits.lstrip("0") for digits in re.findall("[0-9]+", text)]

    prefix = f"{parent}/" if parent else ""
    last = name.removeprefix(prefix)
    free = [other for other in present if prefix + other not in claimed and numbers(other) == numbers(last)]
    stem = last.rpartition(".")[0]
    close = [other for other in free if stem and other.rpartition(".")[0] == stem]
    close = close or difflib.get_close_matches(last, sorted(free)[:_CANDIDATES], n=1, cutoff=0.75)
    return prefix + close[0] if close else None


def _record(annotations: Annotations, row: int) -> str:
    return f"{annotations.file}: image {annotations.image_ids[row]} ({annotations.file_name(row)})"
