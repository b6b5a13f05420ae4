"""The folder of a run: whose it is, whether it may be continued, and what of its settings changed."""

import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from retina.engine.config import REPLACED
from retina.errors import ConfigError
from retina.files import Place, advice, descriptor_of, lock, make_folder, read_plain, remove, temporary_of, write_whole
from retina.schema import parse_json
from retina.tracking.trackers import flatten

OWN = (
    *("log.txt", "metrics.jsonl", "best.safetensors", "data_report.json", "checkpoints"),
    *("tensorboard", "trackers", "curves.png", "environment.json", "eval"),
)
"""What a run writes beside `config.yaml`, and all that `overwrite` removes."""

ADDED_TO = ("log.txt", "metrics.jsonl", "checkpoints", "tensorboard", "trackers")
"""Those that a session finds and goes on with; the others are replaced, whatever is there."""

LOCK, SETTINGS = ".lock", "config.yaml"

MARK = b"# a run of retina\n"
"""First line of `config.yaml`. Other programs have files of that name, so only this line makes a folder ours."""

EARLIER = {"name", "runs", "overwrite", "init_from", "data", "model", "optimizer", "postprocess", "train"}
"""Settings that every run of the versions without a mark has, together with `train.lr_batch_size`."""

WORDS = ("overwrite", "traceback", "allow_data_change")
"""Settings that are about one command, not about the run."""

HARMLESS = (
    *("name", "runs", "trackers", "plugins", "auto"),  # what auto chose, and sections that name parts, are compared
    # instead of the places of the data, the fingerprint of the annotations is compared
    *("data.root", "data.train.annotations", "data.train.images", "data.val.annotations", "data.val.images"),
    *("data.num_workers", "data.eval_batch_size", "data.max_bad_fraction", "data.timeout"),
    *("train.log_every", "train.keep_checkpoints", "train.pictures", "train.device"),
    *("train.patience", "train.save_every", "train.max_bad_steps", "train.max_unsaved_minutes"),
    *("train.timeout_minutes",),
    *("eval.max_dets", "eval.areas"),
)
"""Settings that change nothing about the weights a run arrives at, or only whether it does; they may differ when it is
resumed."""


def folder_of(settings: Mapping[str, Any]) -> Path:
    """The run's folder, `runs/name`. Raises ConfigError for a name that leads out of `runs`, or nowhere."""
    runs, name = str(settings["runs"]), str(settings["name"])
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).name:
        problem = f"{name!r} is no name of a folder in {runs} - give another, or runs=FOLDER"
        raise ConfigError(problem, code="bad-name", key="name")
    return Path(runs, name)


class Opened(NamedTuple):
    resumes: bool
    """Whether a run of the same settings is already there."""
    notes: list[str]
    """Lines for the log, such as each harmless setting that is another now."""


class Difference(NamedTuple):
    key: str
    there: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.there} there, {self.now} now"


def open_run(
    folder: Path,
    config: Mapping[str, Any],
    *,
    overwrite: bool,
    patience: float = 5.0,
    defaults: Callable[[], Mapping[str, Any]] = dict,
) -> Opened:
    """Makes the folder, locks it until this process ends, and writes `config.yaml`.

    A run that failed before its first checkpoint holds nothing to lose, and other settings may take its place.
    `overwrite` sets aside what an earlier run wrote, never anything else; `settle` says what comes of it. `patience` is
    the seconds that a process of the same run has to end, because one that was asked to stop saves first. `defaults`
    are what the settings mean that an earlier version did not know.

    Raises ConfigError when the folder cannot be written, another process trains there (naming it), or it holds
    something that is no run at all or another run: the line names the first setting that differs, and the notes
    (PEP 678) are a table of all."""
    settings = folder / SETTINGS
    leftovers = {LOCK, temporary_of(settings).name}  # of a start that was cut off
    another = "choose another name=..."
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is a file - {another}", code="no-run")
        if folder.is_dir() and any(p.name not in leftovers for p in folder.iterdir()) and not is_run(folder):
            raise ConfigError(f"{folder}: holds files but no run of this program - {another}", code="no-run")
        make_folder(folder)
        notes = [] if _lock(folder, patience) else ["warning: this file system has no locks: start no second run here"]
        settle(folder)
        changed = True
        if overwrite:
            (_set_aside if holds_work(folder) else _remove)(folder)
        elif holds_work(folder):
            differences = compare(read_settings(settings), config, defaults)
            refuse_another(folder, differences)
            notes += [f"going on with another setting: {one}" for one in differences]
            changed = bool(differences)
        _refuse_links(folder)
        for name in (*OWN, SETTINGS):
            temporary_of(folder / name).unlink(missing_ok=True)
        if changed:
            write_settings(folder, config)
        return Opened(has_checkpoint(folder), notes)
    except (OSError, ValueError) as fault:
        reason = f"{Path(fault.filename or folder).name}: {fault.strerror}" if isinstance(fault, OSError) else fault
        fix = f"{advice(fault)}, or choose" if isinstance(fault, OSError) else "choose"
        problem = f"{folder}: cannot be written ({reason}) - {fix} runs=FOLDER"
        raise ConfigError(problem, code="not-written") from None


def _refuse_links(folder: Path) -> None:
    """Raises OSError for a link, a pipe or a device in place of what a run adds to."""
    for name in ADDED_TO:
        if (path := folder / name).is_dir():
            make_folder(path, within=folder)
        elif os.path.lexists(path):
            os.close(descriptor_of(path, os.O_RDONLY))


def write_settings(folder: Path, config: Mapping[str, Any]) -> None:
    write_whole(folder / SETTINGS, MARK + yaml.safe_dump(dict(config), sort_keys=False).encode())


def holds_work(folder: Path) -> bool:
    """Whether a run has got as far as a checkpoint or weights."""
    return has_checkpoint(folder) or (folder / "best.safetensors").exists()


def has_checkpoint(folder: Path) -> bool:
    names = [path.name for path in (folder / "checkpoints").glob("*step_*")]
    return any(name.startswith("step_") or name.endswith(".aside") for name in names)


def is_run(folder: Path) -> bool:
    """Whether `config.yaml` says that this program trains here."""
    file = folder / SETTINGS
    if not file.is_file():
        return False
    if file.read_bytes().startswith(MARK):
        return True
    try:
        values = read_settings(file)
    except ConfigError:
        return False
    train = values.get("train")
    return values.keys() >= EARLIER and isinstance(train, dict) and "lr_batch_size" in train


def settle_at_end(place: Place) -> None:
    """`settle`, unless the folder was moved meanwhile: what stands there now is not ours. Raises OSError."""
    with suppress(FileNotFoundError):
        place.check()
        settle(place.folder)


def settle(folder: Path) -> None:
    """Ends what `overwrite` began: the run that was set aside goes once the new one has a checkpoint, and comes back if
    that has none. A kill at any instant may leave the rest to the next call. Raises OSError."""
    aside, moving = folder / REPLACED, folder / f"{REPLACED}.tmp"
    if aside.is_dir() and not aside.is_symlink():
        if has_checkpoint(folder):
            shutil.rmtree(aside)
            return
        _remove(folder)
        aside.rename(moving)  # from now on nothing in the folder is the new run's
    if moving.is_dir() and not moving.is_symlink():
        for path in moving.iterdir():
            path.replace(folder / path.name)
        moving.rmdir()


def _set_aside(folder: Path) -> None:
    """`config.yaml` stays until the new one takes its place: without it, nobody would know this to be a run."""
    moving = folder / f"{REPLACED}.tmp"
    make_folder(moving, within=folder)
    write_whole(moving / SETTINGS, (folder / SETTINGS).read_bytes())
    for name in OWN:
        if os.path.lexists(folder / name):
            (folder / name).rename(moving / name)
    moving.rename(folder / REPLACED)


def where_now(folder: Path, name: str) -> str:
    """The path `name`, in the run that was set aside if it was of that one."""
    try:
        moved = folder / REPLACED / Path(name).resolve().relative_to(folder.resolve())
    except (OSError, ValueError):
        return name
    return str(moved) if moved.exists() else name


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, which we never write: a few lines of them stand for more items than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("has aliases")
        return super().compose_node(parent, index)


def read_settings(file: Path) -> dict[str, Any]:
    """A run's `config.yaml`. Raises ConfigError when it is no YAML mapping."""
    try:
        values = yaml.load(read_plain(file).decode(), Loader=_PlainLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        fix = "choose another name=..., or overwrite=true to discard that run"
        raise ConfigError(f"{file}: is damaged - {fix}", code="damaged-settings")
    return values


_NOTHING: tuple[Any, ...] = (None, {})
"""What a version may write where another writes the other."""


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Callable[[], Mapping[str, Any]] = dict
) -> list[Difference]:
    """Every setting that differs, harmless or not, in the order of the files. What `before` lacks has its default."""
    old, new = flatten(before), flatten(now)
    absent = "(absent)"
    if new.keys() - old.keys():
        old |= {key: value for key, value in flatten(defaults()).items() if key in new and key not in old}
    pairs = [Difference(key, old.get(key, absent), new.get(key, absent)) for key in {**old, **new} if key not in WORDS]
    return [pair for pair in pairs if pair.there != pair.now and not (pair.there in _NOTHING and pair.now in _NOTHING)]


def refuse_another(folder: Path, differences: Sequence[Difference]) -> None:
    """Raises ConfigError for differences that make another run; its notes are a table of them."""
    grave = [one for one in differences if one.key not in HARMLESS and not _trains_longer(one)]
    if not grave:
        return
    more = f" (and {len(grave) - 1} more)" if len(grave) > 1 else ""
    fix = "choose another name=..., repeat its settings to resume it, or give overwrite=true to discard it"
    fault = ConfigError(f"{folder}: holds another run: {grave[0]}{more} - {fix}", code="another-run")
    rows = [["field", "checkpoint", "now"], *([str(cell) for cell in one] for one in grave)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        fault.add_note("  ".join(map(str.ljust, row, widths)).rstrip())
    raise fault


def _trains_longer(difference: Difference) -> bool:
    """Whether `train.length` is larger now, in the same unit: then the run goes on, at the rate of the longer one."""
    there, now = (re.fullmatch(r"(\d+(?:\.\d*)?)(ep)?", str(value)) for value in (difference.there, difference.now))
    if difference.key != "train.length" or not (there and now):
        return False
    return there[2] == now[2] and float(there[1]) < float(now[1])


def _remove(folder: Path) -> None:
    for name in OWN:
        remove(folder / name)


def _lock(folder: Path, patience: float) -> bool:
    """Locks the folder for this process, which must not close the file; False where there are no locks.

    Raises ConfigError naming the process that has it, OSError."""
    descriptor = descriptor_of(folder / LOCK, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + patience
    while True:
        try:
            locked = lock(descriptor)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                host, _, pid = os.pread(descriptor, 300, 0).decode(errors="replace").strip().rpartition(" ")
                os.close(descriptor)
                problem = f"{folder}: process {pid or '?'} on {host or '?'} is training here"
                fix = "wait until it ends, stop it, or choose another name=..."
                raise ConfigError(f"{problem} - {fix}", code="in-use") from None
            time.sleep(0.05)
    if os.fstat(descriptor).st_nlink > 1:  # its other name may be another's
        return locked
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
    return locked


def open_evaluation(output: Path, within: Path | None = None) -> None:
    """Makes the folder of an evaluation; `within` as of `make_folder`. Raises ConfigError for one that holds anything
    but an earlier evaluation."""
    try:
        make_folder(output, within)
        names = (".metrics.json.tmp", ".analysis.json.tmp", ".report.html.tmp")
        for pattern in (*names, ".detections.json.*tmp", ".data_report.json.*tmp"):  # what a kill left
            for leftover in output.glob(pattern):
                remove(leftover)
        others = [entry for entry in output.iterdir() if entry.name != "data_report.json"]
        strangers = others and not _is_evaluation(output / "metrics.json")
    except OSError as fault:
        problem = f"{output} cannot be written ({fault.strerror}) - choose another folder"
        raise ConfigError(problem, code="not-written", key="output") from None
    if strangers:
        raise ConfigError(f"{output} holds other files - choose another folder", code="output-taken", key="output")


def _is_evaluation(metrics: Path) -> bool:
    try:
        return "per_class" in parse_json(read_plain(metrics))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
