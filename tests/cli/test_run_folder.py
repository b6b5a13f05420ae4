import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from children import die_at_file_call, in_child, on_small_disk, remount_read_only
from faults import refused
from retina.cli.run_folder import MARK, Opened, compare, open_run, read_settings, settle, where_now
from retina.errors import ConfigError

CONFIG = {"name": "x", "overwrite": False, "optimizer": {"lr": 0.1}, "data": {"num_workers": 2}, "levels": [3, 4]}


def test_a_new_folder_and_the_same_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    assert open_run(folder, CONFIG, overwrite=False) == Opened(False, [])
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert open_run(folder, CONFIG, overwrite=False) == Opened(True, [])


def test_what_does_no_harm_may_change_and_is_listed(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG, overwrite=False)
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    words = {"overwrite": False, "traceback": True, "allow_data_change": True}  # about this command only
    changed = CONFIG | {"data": {"num_workers": 0}, "train": {"log_every": 5}} | words
    lines = ["data.num_workers: 2 there, 0 now", "train.log_every: (absent) there, 5 now"]
    notes = [f"going on with another setting: {line}" for line in lines]
    assert open_run(tmp_path, changed, overwrite=False) == Opened(True, notes)
    assert open_run(tmp_path, changed, overwrite=False) == Opened(True, []), "the folder says what is so now"


@pytest.mark.parametrize("key", ["init_from", "levels", "optimizer"])
def test_what_makes_another_run_may_not_change(tmp_path: Path, key: str) -> None:
    open_run(tmp_path, CONFIG, overwrite=False)
    (tmp_path / "best.safetensors").touch()
    with refused("another-run", tmp_path, key, kind=ConfigError):
        open_run(tmp_path, CONFIG | {key: "other"}, overwrite=False)


@pytest.mark.parametrize(
    ("there", "now", "goes_on"),
    [("12ep", "24ep", True), (100, 101, True), ("2.5ep", "10ep", True), ("12ep", "6ep", False), ("12ep", 9000, False)],
)
def test_a_run_may_be_made_longer(tmp_path: Path, there: Any, now: Any, goes_on: bool) -> None:
    open_run(tmp_path, CONFIG | {"train": {"length": there}}, overwrite=False)
    (tmp_path / "best.safetensors").touch()
    longer = CONFIG | {"train": {"length": now}}
    if goes_on:
        (note,) = open_run(tmp_path, longer, overwrite=False).notes
        assert f"train.length: {there} there, {now} now" in note
    else:
        with refused("another-run", "train.length", kind=ConfigError):
            open_run(tmp_path, longer, overwrite=False)
    with refused("another-run", "levels", kind=ConfigError):
        open_run(tmp_path, longer | {"levels": "other"}, overwrite=False)


def test_a_length_of_a_million_digits_takes_no_time(tmp_path: Path) -> None:
    """With a pattern that can be met in many ways, it would take hours."""
    open_run(tmp_path, {"name": "x", "train.length": f"{'1' * 1_000_000}x"}, overwrite=False)
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with refused("another-run", "train.length"):
        open_run(tmp_path, {"name": "x", "train.length": "12"}, overwrite=False)


def test_another_run_is_never_overwritten_unasked(tmp_path: Path) -> None:
    open_run(tmp_path / "x", CONFIG, overwrite=False)
    weights = tmp_path / "x" / "checkpoints" / "step_00000001" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_text("precious")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    changed = CONFIG | {"optimizer": {"lr": 0.2}, "levels": [3]}
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.1 there, 0\.2 now \(and 1 more\)") as caught:
        open_run(tmp_path / "x", changed | {"data": {"num_workers": 0}}, overwrite=False)
    assert "\n" not in str(caught.value)
    assert caught.value.code == "another-run"
    assert caught.value.__notes__ == [
        "field         checkpoint  now",
        "optimizer.lr  0.1         0.2",
        "levels        [3, 4]      [3]",
    ]
    assert weights.read_text() == "precious"
    assert open_run(tmp_path / "x", changed, overwrite=True) == Opened(False, [])
    assert not weights.exists()
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_a_run_to_be_overwritten_is_there_until_the_new_one_has_a_checkpoint(tmp_path: Path) -> None:
    def begin() -> None:
        assert open_run(folder, CONFIG | {"levels": [3]}, overwrite=True) == Opened(False, [])
        assert not (folder / "best.safetensors").exists()
        (folder / "log.txt").write_text("new")

    folder = tmp_path / "x"
    open_run(folder, CONFIG, overwrite=False)
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    for name in ("best.safetensors", "log.txt"):
        (folder / name).write_text("old")
    begin()
    assert Path(where_now(folder, str(folder / "best.safetensors"))).read_text() == "old", "as init_from may name it"
    assert where_now(folder, str(tmp_path / "y")) == str(tmp_path / "y")
    (folder / "best.safetensors").write_text("new")  # of an evaluation before the first checkpoint
    settle(folder)
    assert (folder / "best.safetensors").read_text() == (folder / "log.txt").read_text() == "old"
    assert open_run(folder, CONFIG, overwrite=False) == Opened(True, [])
    begin()
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    settle(folder)
    assert {path.name for path in folder.iterdir()} == {".lock", "config.yaml", "log.txt", "checkpoints"}
    assert (folder / "log.txt").read_text() == "new"


@pytest.mark.parametrize(
    "settings",
    [
        "task: detect\nmodel: yolo11n.pt\n",
        "name: x\ntrain: {lr: 0.1}\ndata: {}\nmodel: {}\noptimizer: {}\n",
        "trainer: {max_epochs: 3}\n",
        "a: [",
        "",
    ],
)
def test_a_folder_of_another_program_is_never_touched(tmp_path: Path, settings: str) -> None:
    contents = {"config.yaml": settings, "metrics.jsonl": "{}", "checkpoints/last.ckpt": "x", "best.safetensors": "x"}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for overwrite in (False, True):
        with refused("no-run", tmp_path, kind=ConfigError):
            open_run(tmp_path, CONFIG, overwrite=overwrite)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in files} == contents


def test_a_renamed_run_and_settings_that_came_later_go_on(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG | {"remap": None}, overwrite=False)
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    now = CONFIG | {"name": "y", "remap": {}, "loss": {"gamma": 2}}
    with refused("another-run", "loss.gamma", kind=ConfigError):
        open_run(tmp_path, now, overwrite=False, defaults=lambda: {"loss": {"gamma": 1}})
    opened = open_run(tmp_path, now, overwrite=False, defaults=lambda: {"loss": {"gamma": 2}})
    assert opened == Opened(True, ["going on with another setting: name: x there, y now"])


def test_a_kill_may_leave_temporary_files_that_the_next_start_removes(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG, overwrite=False)
    for name in (".config.yaml.tmp", ".best.safetensors.tmp", ".metrics.jsonl.tmp"):
        (tmp_path / name).touch()
    open_run(tmp_path, CONFIG, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.yaml"}


def test_a_run_that_never_got_going_may_be_corrected(tmp_path: Path) -> None:
    open_run(tmp_path / "x", CONFIG, overwrite=False)
    open_run(tmp_path / "x", CONFIG | {"levels": [5]}, overwrite=False)
    assert read_settings(tmp_path / "x" / "config.yaml")["levels"] == [5]


def test_what_is_no_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    for overwrite in (False, True):
        with refused("no-run", tmp_path, kind=ConfigError):
            open_run(tmp_path, CONFIG, overwrite=overwrite)
    with refused("no-run", "photo.jpg", kind=ConfigError):
        open_run(tmp_path / "photo.jpg", CONFIG, overwrite=True)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_damaged_settings_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(MARK + b"a: [")
    (tmp_path / "best.safetensors").touch()
    with refused("damaged-settings", "config.yaml", kind=ConfigError):
        open_run(tmp_path, CONFIG, overwrite=False)


def test_compare_names_keys_that_came_and_went() -> None:
    lines = [str(one) for one in compare({"a": {"b": 1}}, {"a": {"c": 1}})]
    assert lines == ["a.b: 1 there, (absent) now", "a.c: (absent) there, 1 now"]


def test_a_second_process_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    code = "import sys; from test_run_folder import hold; hold(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        for overwrite in (False, True):
            with refused("in-use", f"process {first.pid} on {socket.gethostname()}", kind=ConfigError):
                open_run(tmp_path / "x", CONFIG, overwrite=overwrite, patience=0.0)
        os.kill(first.pid, signal.SIGKILL)  # however it ends
        open_run(tmp_path / "x", CONFIG, overwrite=False, patience=100.0)  # its child lives on
    status = in_child(lambda: open_run(tmp_path / "x", CONFIG, overwrite=False, patience=0.0))
    assert status == 1, "now the lock is ours, and no child's"


def hold(folder: str) -> None:
    """What the first process does: it has children, as loaders do, that outlive it, here until the test is over."""
    open_run(Path(folder), CONFIG, overwrite=False)
    if os.fork() == 0:
        os.close(1)
        sys.stdin.read()
        os._exit(0)
    print("open", flush=True)
    sys.stdin.read()


def test_who_else_trains_there_is_told_in_plain_text(tmp_path: Path) -> None:
    def first() -> None:
        open_run(tmp_path, CONFIG, overwrite=False)
        assert in_child(lambda: (tmp_path / ".lock").write_bytes(b"\x1b[2Jhost\n\xff 1")) == 0  # closing it unlocks
        assert in_child(second) == 0

    def second() -> None:
        with pytest.raises(ConfigError) as caught:
            open_run(tmp_path, CONFIG, overwrite=False, patience=0.0)
        assert str(caught.value).isprintable()

    assert in_child(first) == 0


def test_a_start_cut_off_anywhere_can_be_repeated(tmp_path: Path) -> None:
    """Also one that was to discard an earlier run."""
    before = tmp_path / "before"
    open_run(before, CONFIG, overwrite=False)
    for name in ("log.txt", "data_report.json", "best.safetensors", "checkpoints/step_00000001/state.json", "mine"):
        (before / name).parent.mkdir(parents=True, exist_ok=True)
        (before / name).write_text("x")
    other = CONFIG | {"levels": [3]}
    for start in (None, before):
        for fatal in range(1, 1000):
            folder = tmp_path / "now"
            shutil.rmtree(folder, ignore_errors=True)
            if start:
                shutil.copytree(start, folder)

            def opening(folder: Path = folder, fatal: int = fatal) -> None:
                die_at_file_call(fatal)
                open_run(folder, other, overwrite=True)

            status = in_child(opening)
            assert open_run(folder, other, overwrite=True) == Opened(False, []), fatal
            aside = {".replaced"} if start else set()
            assert {path.name for path in folder.iterdir()} - {"mine"} == {".lock", "config.yaml"} | aside
            assert read_settings(folder / "config.yaml") == other
            settle(folder)
            assert {path.name for path in folder.iterdir()} >= {path.name for path in (start or folder).iterdir()}
            assert read_settings(folder / "config.yaml") == (CONFIG if start else other)
            assert (folder / "mine").exists() == (start is not None)
            if status == 0:
                break
            assert status == -signal.SIGKILL
        assert 5 < fatal < 100


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with refused("not-written", folder if "\0" not in str(folder) else "a", kind=ConfigError):
            open_run(folder, CONFIG, overwrite=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_disk_is_found_at_once(tmp_path: Path) -> None:
    def task() -> None:
        assert in_child(lambda: open_run(tmp_path / "old", CONFIG, overwrite=False)) == 0
        (tmp_path / "old" / "best.safetensors").touch()
        remount_read_only(tmp_path)
        for name in ("old", "new"):
            with refused("not-written", name, "Read-only file system", kind=ConfigError):
                open_run(tmp_path / name, CONFIG, overwrite=False)

    assert on_small_disk(tmp_path, 1, task) == 0


def test_links_in_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder, precious = tmp_path / "x", tmp_path / "precious"
    open_run(folder, CONFIG, overwrite=False)
    precious.mkdir()
    (precious / "photo.jpg").write_text("mine")
    (folder / "best.safetensors").touch()
    (folder / "checkpoints").symlink_to(precious)
    (folder / "log.txt").symlink_to(precious / "photo.jpg")
    open_run(folder, CONFIG, overwrite=True)
    assert (precious / "photo.jpg").read_text() == "mine"
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(precious / "photo.jpg")
    with refused("not-written", folder, kind=ConfigError):
        open_run(folder, CONFIG, overwrite=True)
    assert (precious / "photo.jpg").read_text() == "mine"
