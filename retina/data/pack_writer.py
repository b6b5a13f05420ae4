"""Writes packs (retina/data/packs.py), shard by shard; what a kill leaves behind is taken up again. Beside the road.

A shard is an uncompressed tar archive that takes its name once it is on the disk and reads as the files do. A record of
it is kept beside it until the index, which is made of the records, is whole."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retina.data.columns import Columns, write_columns
from retina.data.packs import COLUMNS, INDEX, Pack, open_stored, shard_name, version_of
from retina.errors import DataError
from retina.files import read_plain, remove, write_whole
from retina.schema import check_type, parse_json

_BLOCK = tarfile.BLOCKSIZE
_MEMBER: dict[str, Any] = {"name": str, "offset": int, "size": int, "digest": str}


class Shard(NamedTuple):
    """Images that go into one archive."""

    number: int
    names: list[str]
    key: str
    """Changes with the names, sizes and times of the files."""


def plan(root: Path, names: Sequence[str], shard_bytes: int) -> list[Shard]:
    """The images in their order, as many in an archive as have `shard_bytes` bytes. Raises OSError for one that is not
    there."""
    shards: list[Shard] = []
    versions: list[tuple[str, int, int]] = []
    for number, name in enumerate(names, start=1):
        versions.append((name, *version_of(root / name)))
        if number == len(names) or sum(size for _, size, _ in versions) >= shard_bytes:
            key = hashlib.sha256(json.dumps(versions).encode()).hexdigest()
            shards.append(Shard(len(shards), [name for name, *_ in versions], key))
            versions = []
    return shards


def write_shard(folder: Path, root: Path, shard: Shard) -> bool:
    """Writes an archive and its record, unless both are there, whole, from the same files; whether it had to.

    Raises OSError; DataError for an archive that does not read as it was written."""
    record = record_of(folder, shard)
    members = _read_record(record, shard)
    archive = folder / shard_name(shard.number)
    if members is not None and _is_whole(archive, members):
        return False
    members = []
    write_whole(archive, _tar(root, shard.names, members))
    if not _is_whole(archive, members):
        problem = "does not read as it was written - look at the disk, and give the same command again"
        raise DataError(f"{archive}: {problem}", code="damaged-pack")
    write_whole(record, json.dumps({"key": shard.key, "members": members}).encode())
    return True


def _tar(root: Path, names: Sequence[str], members: list[dict[str, Any]]) -> Iterator[bytes]:
    """The parts of an archive. Owner and times are left out, so that the same images make the same bytes."""
    at = 0
    for name in names:
        with open_stored(root / name) as file:
            data = file.read()
        info = tarfile.TarInfo(name)
        info.size = len(data)
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        digest = hashlib.sha256(data).hexdigest()
        members.append({"name": name, "offset": at + len(header), "size": len(data), "digest": digest})
        padding = b"\0" * (-len(data) % _BLOCK)
        at += len(header) + len(data) + len(padding)
        yield header
        yield data
        yield padding
    yield b"\0" * 2 * _BLOCK


def record_of(folder: Path, shard: Shard) -> Path:
    return folder / f".{shard.number:05}.json"


def _read_record(file: Path, shard: Shard) -> list[dict[str, Any]] | None:
    """The images of an archive that was finished, or None."""
    try:
        record = parse_json(read_plain(file))
        for member in record["members"]:
            for key, kind in _MEMBER.items():
                check_type(member[key], kind, key)
    except Exception:  # there is none, or a kill or somebody else made it
        return None
    names = [member["name"] for member in record["members"]]
    return record["members"] if (record.get("key"), names) == (shard.key, shard.names) else None


def _is_whole(archive: Path, members: Sequence[dict[str, Any]]) -> bool:
    """Whether each image in an archive has its digest."""
    try:
        with archive.open("rb") as stream:
            for member in members:
                stream.seek(member["offset"])
                if hashlib.sha256(stream.read(member["size"])).hexdigest() != member["digest"]:
                    return False
    except (OSError, ValueError, OverflowError):
        return False
    return True


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes the index from the records, and removes them. Raises OSError, DataError for a missing one."""
    rows = []
    for shard in shards:
        members = _read_record(record_of(folder, shard), shard)
        if members is None:
            problem = "changed while the pack was written - give the same command again"
            raise DataError(f"{record_of(folder, shard)}: {problem}", code="damaged-pack")
        rows += [
            (one["name"].encode("utf-8", "surrogateescape"), shard.number, one["offset"], one["size"], one["digest"])
            for one in members
        ]
    names, *columns, digests = zip(*sorted(rows), strict=True)
    values = {
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_offsets": np.cumsum([0, *map(len, names)]),
        **dict(zip(("shards", "offsets", "sizes"), columns, strict=True)),
        "digests": np.frombuffer(bytes.fromhex("".join(digests)), dtype=np.uint8).reshape(-1, 32),
    }
    arrays = {name: np.asarray(values[name], dtype=kind) for name, kind in COLUMNS.items()}
    write_columns(folder / INDEX, Columns(arrays, {}))
    (folder / INDEX).chmod(folder.stat().st_mode & 0o777)  # readable to those who may read the archives
    for shard in shards:
        remove(record_of(folder, shard))


def damaged(pack: Pack) -> list[str]:
    """One line for each image that is not what was packed."""

    def fault(row: int) -> str | None:
        try:
            with pack.stored(row).open(whole=False) as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except DataError as error:
            return str(error)
        except OSError as error:
            return str(pack.fault(f"cannot be read ({error.strerror})", row))
        return None if digest == pack.digest(row) else str(pack.altered(row))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return [line for line in threads.map(fault, range(len(pack))) if line]
