"""An annotation file as JSON: whether it is there, is JSON, and is built like COCO's. Beside the road."""

import codecs
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from retina.data.checks import UNKNOWN, some
from retina.data.ids import settle_ids
from retina.data.json_stream import CutOffError, JsonStream
from retina.data.packed_records import PackedRecords
from retina.errors import DataError

_FOREIGN = {
    b"\x1f\x8b": ("is compressed with gzip", "unpack it with gunzip and give the JSON file"),
    b"PK\x03\x04": ("is a zip archive", "unpack it and give the JSON file inside"),
    b"BZh": ("is compressed with bzip2", "unpack it with bunzip2 and give the JSON file"),
    b"\xfd7zXZ": ("is compressed with xz", "unpack it with unxz and give the JSON file"),
    b"version https://git-lfs": ("is a pointer of Git LFS", "fetch it with: git lfs pull"),
    b"<": ("is XML or HTML", "give a COCO JSON file; tools/convert.py reads Pascal VOC and YOLO"),
}
"""First bytes of what is given instead of JSON, what that is, and what to do."""
_START = 1 << 16
"""Bytes at the begin, and at the end, by which other files and those that are cut off are told."""
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_annotations(file: Path) -> io.BufferedReader:
    """An annotation file. Raises DataError if it is not there or cannot be read."""
    try:
        if file.is_file():
            return file.open("rb")
        state = "is a folder" if file.is_dir() else "is no regular file" if file.exists() else "no such annotation file"
    except OSError as error:
        raise _unreadable(file, error) from error
    raise DataError(f"{file}: {state}{listing(file.parent)} - give the path of a COCO JSON file", code="no-such-file")


class Document(NamedTuple):
    """What an annotation file holds."""

    images: list[Any]
    categories: list[Any]
    annotations: PackedRecords
    digest: str
    """`digest_of` its bytes."""
    size: int
    """Bytes."""


def parse_document(file: Path, warnings: list[str], *, ids_only: bool = False) -> Document:
    """Parse a file and check what holds the records, not the records.

    Read is only a part at a time, since a file may be larger than memory. A byte order mark is read over, with a
    warning, since other readers refuse it. Ids get one type. With `ids_only`, images get a name and size of no meaning.
    Raises DataError."""
    with open_annotations(file) as stream:
        try:
            return _parse(file, stream, warnings, ids_only=ids_only)
        except OSError as error:
            raise _unreadable(file, error) from error


def _parse(file: Path, stream: io.BufferedReader, warnings: list[str], *, ids_only: bool) -> Document:
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(_START)
    if not start.strip() and size <= _START:
        raise _no_coco(file, f"is empty ({size} bytes)", "export it again, or finish its download")
    for magic, (what, fix) in _FOREIGN.items():
        if start.startswith(magic):
            raise _no_coco(file, f"{what}, not JSON", fix)
    if start.startswith(_MARKS):
        warnings.append(f"{file}: starts with a byte order mark (BOM) - save it as UTF-8 without BOM: others refuse it")
    stream.seek(0)
    images: list[Any] = []
    annotations = PackedRecords()

    def take(section: str, records: list[Any]) -> None:
        if section == "annotations":
            annotations.append(records)
        else:
            images.extend(map(_without_ballast, records))

    reader = JsonStream(stream)
    try:
        content = reader.read(("images", "annotations"), take)
    except (ValueError, RecursionError) as error:
        problem = _json_problem(stream, size, start, error)
        raise _no_coco(file, problem, "export it again, or finish its download") from error
    if isinstance(content, list):
        problem = "is a list, as files of detection results are, not an object"
        raise _no_coco(file, problem, "give the annotation file, with `images`, `annotations` and `categories`")
    if not isinstance(content, dict):
        raise _no_coco(file, f"holds a {type(content).__name__}, not an object", "give a COCO annotation file")
    for section in ("images", "annotations", "categories"):
        if not isinstance(content.get(section), list):
            state = "is not a list" if section in content else f"is missing (there is {some(list(content))})"
            raise _no_coco(file, f"`{section}` {state}", "give a COCO annotation file, or export it again")
        if section != "annotations" and not (images if section == "images" else content[section]):
            raise _no_coco(file, f"`{section}` is empty", "give a file with at least one record there")
    sections = {"images": images, "categories": content["categories"], "annotations": annotations}
    warnings += settle_ids(file, sections)
    for record in images if ids_only else []:
        if isinstance(record, dict):
            record |= {"file_name": f"image {record.get('id')}", "width": UNKNOWN, "height": UNKNOWN}
    return Document(images, content["categories"], annotations, reader.digest(), size)


def _without_ballast(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    return {key: record[key] for key in ("id", "file_name", "width", "height") if key in record}


def listing(folder: Path) -> str:
    """What a reader who looked in vain may want to see: the content of the nearest folder that exists."""
    try:
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    except OSError as error:
        return f" ({folder}: {error.strerror})"
    return f", but {folder} holds {some(names)}"


def _no_coco(file: Path, problem: str, fix: str) -> DataError:
    return DataError(f"{file}: {problem} - {fix}", code="not-coco")


def _unreadable(file: Path, error: OSError) -> DataError:
    problem = f"cannot be read ({error.strerror}) - check its permissions and the disk"
    return DataError(f"{file}: {problem}", code="unreadable-file")


def _json_problem(stream: io.BufferedReader, size: int, start: bytes, error: Exception) -> str:
    stream.seek(max(0, size - _START))
    end = stream.read(_START)
    text = end.rstrip(b" \t\r\n\0")
    if start[:1] in (b"{", b"[") and (isinstance(error, CutOffError) or text[-1:] not in (b"}", b"]")):
        return f"is cut off after {size - len(end) + len(text)} bytes: the JSON does not end"
    return f"is not JSON ({error})"
