"""The output folder of tools/infer.py, which may be killed at any instant and then goes on where it was.

While it works, `<output>/.infer/` holds `claims.json` (the files that this inference writes: whatever else is in their
way is the user's, as are labels that somebody has changed), a `<rank>.jsonl` for each process with a line for every
batch that is done, added after its pictures, and the files that are being written. The whole is removed at the end.

A batch is done as a whole or not at all, since the numbers of an image change a little with the canvas that it shares
and with the images it shares it with. Batches are cut from the sorted list of all images, whatever the number of
processes.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from retina.cli.sources import Source
from retina.data.packs import version_of
from retina.errors import ConfigError, DataError
from retina.files import Appender, advice, descriptor_of, lock, make_folder, read_plain, remove, write_whole
from retina.printing import say
from retina.schema import check_type, parse_json

STATE, ABOUT, FAILED = ".infer", "inference.json", "failed.txt"
OURS = ("detections.json", "detections.csv", "counts.csv", ABOUT)
"""Files that hold all images, and that nobody but an inference has reason to change."""
OF_ALL = (*OURS, "coco.json", "classes.txt")
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


RECORD: dict[str, Any] = {"file_name": str, "width": int, "height": int}
RECORD |= {"boxes": list[list[float]], "scores": list[float], "labels": list[int]}
"""What the record of an image holds, beside the names of its `picture` and `crops` where there are any."""
Claims = dict[str, list[str]]
"""Files and folders of an inference, relative to the output, and the SHA-256 that each may have: none is any."""


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
def open_output(output: Path, names: Collection[str]) -> Iterator[None]:
    """Makes the folder and keeps other inferences out of it. `names`: of what is written for single images.

    Raises ConfigError for a folder that holds anything but an earlier inference, is in use by another, or has something
    in the way of these names that this earlier inference did not write, or labels that were changed since."""
    state = output / STATE
    try:
        make_folder(output)
        earlier = _earlier_claims(output)
        if earlier is None and any(entry.name != STATE for entry in output.iterdir()):
            raise _taken(f"{output} holds other files")
        claims: Claims = {name: [] for name in names} | (earlier or {})
        _check_way(output, names, earlier or {})
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
        _claim(output, claims)
        yield
    finally:
        os.close(lock_file)


def _claim(output: Path, claims: Claims) -> None:
    put(output, f"{STATE}/claims.json", json.dumps(claims, sort_keys=True).encode())


def _earlier_claims(output: Path) -> Claims | None:
    """Of an earlier inference, finished or not; None where there was none."""
    about = _read(output / ABOUT)
    known = [about.get("files") if isinstance(about, dict) else None, _read(output / STATE / "claims.json")]
    claims: Claims | None = None
    for one in known:
        if isinstance(one, dict):
            claims = claims or {}
            for name, digests in one.items():
                with suppress(ConfigError):  # damaged: then what is there is the user's
                    check_type(digests, list[str], name)
                    claims[name] = sorted({*claims.get(name, []), *digests})
    return claims


def _read(file: Path) -> Any:
    try:
        return parse_json(read_plain(file))
    except (OSError, ValueError, RecursionError):
        return None


def _check_way(output: Path, names: Collection[str], earlier: Claims) -> None:
    failed, inside = output / FAILED, os.path.realpath(output)
    foreign = [output / name for name in names if name not in earlier]
    if not (failed.is_file() and read_plain(failed).startswith(FAILED_TITLE.encode())):
        foreign.append(failed)
    for file in foreign:
        if os.path.lexists(file):
            raise _taken(f"{file} is there already and would be overwritten")
    for folder in {(output / name).parent for name in names}:
        if not Path(os.path.realpath(folder)).is_relative_to(inside):
            raise _taken(f"{folder} leads out of {output}", code="output-outside")
    if (output / STATE).is_symlink():
        raise _taken(f"{output / STATE} leads out of {output}", code="output-outside")
    for name, digests in earlier.items():
        file = output / name
        if digests and file.is_file() and hashlib.sha256(read_plain(file)).hexdigest() not in digests:
            raise _taken(f"{file} was changed after it was written")
    reserved = {PurePosixPath(name).parts[0].casefold() for name in names} & {*OF_ALL, FAILED, STATE}
    for name in reserved:
        problem = f"has a folder {name}, a name that the output needs itself - rename it"
        raise ConfigError(problem, code="reserved-name", key="source")


def _taken(problem: str, code: str = "output-taken") -> ConfigError:
    return ConfigError(f"{problem} - choose another folder", code=code, key="output")


def already_done(batches: Sequence[Batch], output: Path, num_classes: int) -> dict[str, Done]:
    """Those of the batches that are done already, and tell of their own images."""
    done = read_done(output, num_classes)
    names = {batch.key: {source.name for source in batch.sources} for batch in batches}
    recorded = {key: {record["file_name"] for record in one.records} for key, one in done.items()}
    return {key: one for key, one in done.items() if recorded[key] <= names.get(key, set())}


def read_done(output: Path, num_classes: int) -> dict[str, Done]:
    """The batches that an interrupted inference finished and whose pictures and crops are still there, by key."""
    done = {}
    for journal in sorted((output / STATE).glob("*.jsonl")):
        for line in read_plain(journal).splitlines():
            try:
                batch = Done(**parse_json(line))
                _check_batch(batch, num_classes)
            except (ValueError, TypeError, RecursionError, ConfigError):  # cut off by a kill, empty, or not ours
                continue
            names = [name for record in batch.records for name in (*record.get("crops", ()), record.get("picture"))]
            if all(os.path.isfile(output / name) for name in names if name is not None):
                done[batch.key] = batch
    return done


def _check_batch(batch: Done, num_classes: int) -> None:
    """Raises ConfigError for values of other types than `detect` writes, ValueError for records that contradict
    themselves."""
    for value, hint in ((batch.key, str), (batch.records, list[dict]), (batch.faults, list[str])):
        check_type(value, hint, "journal")
    for record in batch.records:
        for name, hint in RECORD.items():
            check_type(record.get(name), hint, name)
        check_type(record.get("picture", ""), str, "picture")
        check_type(record.get("crops", []), list[str], "crops")
        sound = all(len(box) == 4 for box in record["boxes"]) and min(record["width"], record["height"]) > 0
        sound &= len(record["boxes"]) == len(record["scores"]) == len(record["labels"])
        if not (sound and all(0 <= label < num_classes for label in record["labels"])):
            raise ValueError("no such record is written")


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


def put(output: Path, name: str, content: bytes) -> str:
    """Writes a file of the output in one step; it is on the disk when this returns the name."""
    target = output / name
    make_folder(target.parent, within=output)
    # in a place of its own, since behind a long name there may be no room for more letters
    write_whole(target, content, output / STATE / f"{hashlib.sha256(os.fsencode(name)).hexdigest()}.tmp")
    return name


def finish(
    output: Path,
    files: Iterable[tuple[str, bytes]],
    about: Mapping[str, Any],
    faults: Sequence[str],
) -> None:
    """Writes the files that hold all images, `inference.json`, and where there are faults `failed.txt`; removes what
    was needed to go on. A later inference overwrites no labels (all but OURS) that somebody has changed since."""
    written = list(files)
    claims = _earlier_claims(output) or {}
    fresh = {name: [hashlib.sha256(content).hexdigest()] for name, content in written if name not in OURS}
    # also those that stand until they are replaced, since a kill may come at any time
    _claim(output, claims | {name: [*claims.get(name, []), *digest] for name, digest in fresh.items()})
    for name, content in written:
        put(output, name, content)
    there = {name: digests for name, digests in (claims | fresh).items() if os.path.lexists(output / name)}
    put(output, ABOUT, json.dumps({**about, "files": dict(sorted(there.items()))}, indent=1).encode() + b"\n")
    if faults:
        put(output, FAILED, "\n".join([FAILED_TITLE, *faults, ""]).encode(errors="backslashreplace"))
    else:
        (output / FAILED).unlink(missing_ok=True)
    for file in (output / STATE).iterdir():
        if file.suffix in (".json", ".jsonl", ".tmp") or file.name == "lock":
            file.unlink()
    with suppress(OSError):  # holds something that is not ours
        (output / STATE).rmdir()
