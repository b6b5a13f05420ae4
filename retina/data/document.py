"""An annotation file as JSON: whether it is there, is JSON, and is built like COCO's. Beside the road."""

import codecs
import json
from pathlib import Path
from typing import Any

from retina.data.checks import UNKNOWN, some
from retina.data.ids import settle_ids
from retina.errors import DataError
from retina.schema import unique_keys

_FOREIGN = {
    b"\x1f\x8b": ("is compressed with gzip", "unpack it with gunzip and give the JSON file"),
    b"PK\x03\x04": ("is a zip archive", "unpack it and give the JSON file inside"),
    b"BZh": ("is compressed with bzip2", "unpack it with bunzip2 and give the JSON file"),
    b"\xfd7zXZ": ("is compressed with xz", "unpack it with unxz and give the JSON file"),
    b"version https://git-lfs": ("is a pointer of Git LFS", "fetch it with: git lfs pull"),
    b"<": ("is XML or HTML", "give a COCO JSON file; tools/convert.py reads Pascal VOC and YOLO"),
}
"""First bytes of what is given instead of JSON, what that is, and what to do."""
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_bytes(file: Path) -> bytes:
    """The content of an annotation file. Raises DataError if it is not there or cannot be read."""
    try:
        if file.is_file():
            return file.read_bytes()
        state = "is a folder" if file.is_dir() else "is no regular file" if file.exists() else "no such annotation file"
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}) - check its permissions and the disk", code="unreadable-file"
        ) from error
    raise DataError(f"{file}: {state}{listing(file.parent)} - give the path of a COCO JSON file", code="no-such-file")


def parse_document(file: Path, data: bytes, warnings: list[str], *, ids_only: bool = False) -> dict[str, Any]:
    """Parse the content of the file and check what holds the records, not the records.

    A byte order mark is read over, with a warning, since other readers refuse it. Ids get one type. With `ids_only`,
    images get a name and size of no meaning. Raises DataError."""
    if not data.strip():
        raise _no_coco(file, f"is empty ({len(data)} bytes)", "export it again, or finish its download")
    for magic, (what, fix) in _FOREIGN.items():
        if data.startswith(magic):
            raise _no_coco(file, f"{what}, not JSON", fix)
    if data.startswith(_MARKS):
        warnings.append(f"{file}: starts with a byte order mark (BOM) - save it as UTF-8 without BOM: others refuse it")
    try:
        document = json.loads(data, object_pairs_hook=unique_keys)  # a tenth slower
    except (ValueError, RecursionError) as error:
        raise _no_coco(file, _json_problem(data, error), "export it again, or finish its download") from error
    if isinstance(document, list):
        problem = "is a list, as files of detection results are, not an object"
        raise _no_coco(file, problem, "give the annotation file, with `images`, `annotations` and `categories`")
    if not isinstance(document, dict):
        raise _no_coco(file, f"holds a {type(document).__name__}, not an object", "give a COCO annotation file")
    for section in ("images", "annotations", "categories"):
        if not isinstance(document.get(section), list):
            state = "is not a list" if section in document else f"is missing (there is {some(list(document))})"
            raise _no_coco(file, f"`{section}` {state}", "give a COCO annotation file, or export it again")
        if not document[section] and section != "annotations":
            raise _no_coco(file, f"`{section}` is empty", "give a file with at least one record there")
    warnings += settle_ids(file, document)
    for record in document["images"] if ids_only else []:
        if isinstance(record, dict):
            record |= {"file_name": f"image {record.get('id')}", "width": UNKNOWN, "height": UNKNOWN}
    return document


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


def _json_problem(data: bytes, error: Exception) -> str:
    text = data.rstrip(b" \t\r\n\0")
    at_end = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip(" \t\r\n\0"))
    if text[:1] in (b"{", b"[") and (at_end or text[-1:] not in (b"}", b"]")):
        return f"is cut off after {len(text)} bytes: the JSON does not end"
    return f"is not JSON ({error})"
