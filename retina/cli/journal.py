"""The output folder of tools/infer.py, which may be killed at any instant and then goes on where it was.

While it works, `<output>/.infer/` holds `claims.json` (the pictures that this inference writes: whatever else is in
their way is the user's), a `<rank>.jsonl` for each process with a line for every batch that is done, added after its
pictures, and the files that are being written. The whole is removed at the end.

A batch is done as a whole or not at all, since the numbers of an image change a little with the canvas that it shares
and with the images it shares it with. Batches are cut from the sorted list of all images, whatever the number of
processes.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from retina.cli.sources import Source
from retina.data.packs import version_of
from retina.errors import ConfigError, DataError
from retina.files import Appender, advice, descriptor_of, lock, make_folder, read_plain, remove, write_whole
from retina.printing import say
from retina.schema import check_type, parse_json

STATE, DETECTIONS, FAILED = ".infer", "detections.json", "failed.txt"
FAILED_TITLE = "# files that tools/infer.py could not finish, and why"


class Batch(NamedTuple):
    """Images that go through the model together."""

    key: str
    """Changes with the images, and with all that their detections and pictures depend on."""
    sources: list[Source]


class Done(NamedTuple):
    """What came of a batch: a record for each image, and a line for each file that something is wrong with."""

    key: str
    records: list[dict[str, Any]]
    faults: list[str]


RECORD: dict[str, Any] = {"file_name": str, "width": int, "height": int, "boxes": list[list[float]]}
RECORD |= {"scores": list[float], "classes": list[str]}
"""What the record of an image holds, beside the name of its picture where one was drawn."""


def cut_batches(sources: Sequence[Source], batch_size: int, settings: Mapping[str, Any]) -> list[Batch]:
    """Consecutive images, `batch_size` at a time. `settings`: what their detections and pictures depend on."""
    batches = []
    for first in range(0, len(sources), batch_size):
        batch = list(sources[first : first + batch_size])
        identity = [settings, [[source.name, source.picture, *_version(source.file)] for source in batch]]
        batches.append(Batch(hashlib.sha256(json.dumps(identity).encode()).hexdigest(), batch))
    return batches


def _version(file: Path) -> tuple[int, int]:
    try:
        return version_of(file)
    except (OSError, DataError):  # gone, or out of reach: reading it will tell
        return 0, 0


@contextmanager
def open_output(output: Path, pictures: Collection[str]) -> Iterator[None]:
    """Makes the folder and keeps other inferences out of it.

    Raises ConfigError for a folder that holds anything but an earlier inference, is in use by another, or has something
    in the way of a picture that this earlier inference did not write."""
    state = output / STATE
    try:
        make_folder(output)
        earlier = _earlier_pictures(output)
        if earlier is None and any(entry.name != STATE for entry in output.iterdir()):
            raise _taken(f"{output} holds other files")
        _check_way(output, pictures, earlier or set())
        make_folder(state, within=output)
        lock_file = descriptor_of(state / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as fault:
        raise _taken(f"{output} cannot be written ({fault.strerror}): {advice(fault)}", code="not-written") from None
    try:
        try:
            if not lock(lock_file):
                say(f"warning: {output} knows no locks: start no second inference into it", error=True)
        except BlockingIOError:
            raise _taken(f"{output} is being written by another inference: wait", code="in-use") from None
        for leftover in state.glob("*.tmp"):
            remove(leftover)
        put(output, f"{STATE}/claims.json", json.dumps(sorted({*pictures, *(earlier or ())}, key=str)).encode())
        yield
    finally:
        os.close(lock_file)


def _earlier_pictures(output: Path) -> set[str] | None:
    """Pictures of an earlier inference, finished or not; None where there was none."""
    records, claims = _read(output / DETECTIONS), _read(output / STATE / "claims.json")
    try:
        names = {record["picture"] for record in records if record["file_name"] and "picture" in record}
        check_type([*names], list[str], "picture")
    except (TypeError, KeyError, ConfigError):
        names = None
    try:
        check_type(claims, list[str], "claims")
    except ConfigError:  # none, or damaged: then what is there is the user's
        return names
    return {*claims, *(names or ())}


def _read(file: Path) -> Any:
    try:
        return parse_json(read_plain(file))
    except (OSError, ValueError, RecursionError):
        return None


def _check_way(output: Path, pictures: Collection[str], earlier: Collection[str]) -> None:
    failed, inside = output / FAILED, os.path.realpath(output)
    foreign = [output / picture for picture in pictures if picture not in earlier]
    if not (failed.is_file() and read_plain(failed).startswith(FAILED_TITLE.encode())):
        foreign.append(failed)
    for file in foreign:
        if os.path.lexists(file):
            raise _taken(f"{file} is there already and would be overwritten")
    for folder in {(output / picture).parent for picture in pictures}:
        if not Path(os.path.realpath(folder)).is_relative_to(inside):
            raise _taken(f"{folder} leads out of {output}", code="output-outside")
    if (output / STATE).is_symlink():
        raise _taken(f"{output / STATE} leads out of {output}", code="output-outside")
    reserved = {PurePosixPath(picture).parts[0].casefold() for picture in pictures} & {DETECTIONS, FAILED, STATE}
    for name in reserved:
        problem = f"has a folder {name}, a name that the output needs itself - rename it"
        raise ConfigError(problem, code="reserved-name", key="source")


def _taken(problem: str, code: str = "output-taken") -> ConfigError:
    return ConfigError(f"{problem} - choose another folder", code=code, key="output")


def read_done(output: Path) -> dict[str, Done]:
    """The batches that an interrupted inference finished and whose pictures are still there, by key."""
    done = {}
    for journal in sorted((output / STATE).glob("*.jsonl")):
        for line in read_plain(journal).splitlines():
            try:
                batch = Done(**parse_json(line))
                _check_batch(batch)
            except (ValueError, TypeError, RecursionError, ConfigError):  # cut off by a kill, empty, or not ours
                continue
            if all(os.path.isfile(output / record["picture"]) for record in batch.records if "picture" in record):
                done[batch.key] = batch
    return done


def _check_batch(batch: Done) -> None:
    """Raises ConfigError for values of other types than `detect` writes."""
    for value, hint in ((batch.key, str), (batch.records, list[dict]), (batch.faults, list[str])):
        check_type(value, hint, "journal")
    for record in batch.records:
        for name, hint in RECORD.items():
            check_type(record.get(name), hint, name)
        check_type(record.get("picture", ""), str, "picture")


@contextmanager
def open_journal(output: Path, rank: int) -> Iterator[Appender]:
    """To `note` batches in, behind those of an interrupted inference."""
    journal = Appender(output / STATE / f"{rank}.jsonl", within=output)
    with closing(journal):
        journal.write(b"\n")  # ends a line that a kill cut off
        yield journal


def note(journal: Appender, batch: Done) -> None:
    """The batch is on the disk when this returns."""
    journal.write(json.dumps(batch._asdict()).encode() + b"\n")
    journal.sync()


def put(output: Path, name: str, content: bytes) -> None:
    """Writes a file of the output in one step; it is on the disk when this returns."""
    target = output / name
    make_folder(target.parent, within=output)
    # in a place of its own, since behind a long name there may be no room for more letters
    write_whole(target, content, output / STATE / f"{hashlib.sha256(os.fsencode(name)).hexdigest()}.tmp")


def finish(output: Path, records: Sequence[Mapping[str, Any]], faults: Sequence[str]) -> None:
    """Writes `detections.json`, a list with a line for each image, and `failed.txt` where there are faults; removes
    what was needed to go on."""
    lines = ",\n".join(json.dumps(record) for record in records)
    put(output, DETECTIONS, f"[\n{lines}\n]\n".encode())
    if faults:
        put(output, FAILED, "\n".join([FAILED_TITLE, *faults, ""]).encode(errors="backslashreplace"))
    else:
        (output / FAILED).unlink(missing_ok=True)
    for file in (output / STATE).iterdir():
        if file.suffix in (".json", ".jsonl", ".tmp") or file.name == "lock":
            file.unlink()
    with suppress(OSError):  # holds something that is not ours
        (output / STATE).rmdir()
