import fcntl
import json
import math
import os
import re
import signal
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from children import in_child
from retina.engine.logging import RunLogger
from retina.tracking.trackers import TensorBoard


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_lines_and_pictures(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, active=True, trackers=[TensorBoard()])
    logger.info("hello [red]")
    logger.scalars(1, "train", {"loss": 0.5})
    logger.evaluation(
        2,
        {"AP": 0.25, "AP50": None, "AP75": 0.0, "AR100": 0.5, "per_class": {"cat": {"AP": 0.25}}},
        {},
        1.0,
        better=True,
    )
    logger.picture(2, "val/detections", np.zeros((4, 4, 3), np.uint8))
    logger.close()
    assert [(r["step"], r["kind"]) for r in read(tmp_path)] == [(1, "train"), (2, "val")]
    assert read(tmp_path)[1]["AP50"] is None
    log = (tmp_path / "log.txt").read_text()
    assert "hello [red]" in log
    assert "AP 0.250  AP50 -" in log
    assert any((tmp_path / "tensorboard").iterdir())


def test_resume_drops_what_came_after_and_what_was_cut_off(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, active=True)
    for step in (1, 2, 3):
        logger.scalars(step, "train", {"loss": float(step)})
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "step": 1, "kind": "train", "loss": 7.0}\n{"step": 2, "kind": "train", "loss": NaN}\n')
        file.write('{"step": 2, "ki')
    again = RunLogger(tmp_path, active=True)
    again.resume(2)
    again.scalars(3, "train", {"loss": 9.0})
    again.close()
    assert [(r["step"], r["loss"]) for r in read(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_an_evaluation_that_is_done_again_is_not_recorded_twice(tmp_path: Path) -> None:
    def write(logger: RunLogger) -> None:
        logger.scalars(2, "train", {"loss": 1.0})
        logger.scalars(2, "val", {"AP": 0.5})
        logger.close()

    write(RunLogger(tmp_path, active=True))
    for pending, kinds in ((False, ["train", "val"]), (True, ["train"])):
        logger = RunLogger(tmp_path, active=True)
        logger.resume(2, pending_evaluation=pending)
        logger.close()
        assert [record["kind"] for record in read(tmp_path)] == kinds


def test_bytes_that_are_no_records_are_dropped(tmp_path: Path) -> None:
    good = b'{"step": 1, "kind": "train", "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\x00\n" + good + b"null\n[1]\n" + good[:-1])
    logger = RunLogger(tmp_path, active=True)
    logger.resume(5)
    logger.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    logger = RunLogger(tmp_path, active=True)
    logger.resume(5)
    logger.close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before, "nothing to drop, nothing written"


def test_names_of_others_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(tmp_path, active=True)
    logger.info("class \x1b[31mred\nERROR \u202e")
    logger.scalars(1, "val", {"per_class": {"\x1b]0;\udcff": {"AP": 0.5}}})
    logger.close()
    shown = "class \\x1b[31mred\\nERROR \\u202e"
    assert capsys.readouterr().out == shown + "\n"
    assert (tmp_path / "log.txt").read_text().endswith(f" {shown}\n")
    assert read(tmp_path)[0]["per_class"] == {"\x1b]0;\udcff": {"AP": 0.5}}


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, active=True)
    logger.scalars(1, "val", {"AP": math.nan, "per_class": {"cat": {"AP": math.inf}}})
    logger.close()
    assert read(tmp_path)[0] == {"step": 1, "kind": "val", "AP": None, "per_class": {"cat": {"AP": None}}}


def test_a_screen_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    """Such as `train.py | head`, or a full disk behind `> out.txt`."""

    def task(target: int) -> None:
        os.dup2(target, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        logger = RunLogger(tmp_path, active=True)
        for step in range(3):
            logger.info(f"line {step}")
        logger.close()

    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    for target in (writing, full):
        (tmp_path / "log.txt").unlink(missing_ok=True)
        assert in_child(lambda target=target: task(target)) == 0
        assert [line[-6:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["line 0", "line 1", "line 2"]
        os.close(target)


def test_what_is_recorded_is_in_the_file_at_once(tmp_path: Path) -> None:
    def task() -> None:
        logger = RunLogger(tmp_path, active=True, trackers=[TensorBoard()])
        logger.info("line")
        logger.scalars(1, "train", {"loss": 0.5})
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(task) == -signal.SIGKILL
    assert (tmp_path / "log.txt").read_text().endswith("line\n")
    assert read(tmp_path) == [{"step": 1, "kind": "train", "loss": 0.5}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [0.5]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "nowhere", active=False)
    logger.info("x")
    logger.scalars(1, "train", {"loss": 1.0})
    logger.progress(1, 2, {})
    logger.curves()
    assert logger.evaluating([], 3) == []
    logger.resume(1)
    logger.close()
    assert not (tmp_path / "nowhere").exists()


def test_named_values_of_a_step_get_a_group_of_their_own(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, active=True, trackers=[TensorBoard()])
    for step, share in ((20, 0.25), (40, math.nan)):
        logger.scalars(step, "train", {"loss": 0.5, "diagnosis": {"p_t_positives": share, "positives_p3": 7.0}})
    logger.close()
    assert [record["diagnosis"]["p_t_positives"] for record in read(tmp_path)] == [0.25, None]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/diagnosis/p_t_positives", "train/diagnosis/positives_p3"} <= set(
        board.Tags()["scalars"]
    )
    assert [(event.step, event.value) for event in board.Scalars("train/diagnosis/positives_p3")] == [(20, 7), (40, 7)]


def drawn_on_a_terminal(act: Callable[[], object], columns: int) -> list[str]:
    """Every line that `act` draws on a terminal of that width, without colours and movements of the cursor."""
    screen, side = os.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    content = bytearray()

    def drain() -> None:
        try:
            while part := os.read(screen, 4096):
                content.extend(part)
        except OSError:
            pass  # the other side is closed

    def task() -> None:
        from retina.tracking import terminal

        os.dup2(side, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        os.environ["TERM"] = "xterm-256color"
        terminal.Terminal.INTERVAL = 0.0
        act()

    reader = threading.Thread(target=drain)
    reader.start()
    code = in_child(task)
    os.close(side)
    reader.join()
    os.close(screen)
    assert code == 0
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", content.decode()))


MEANS = {"epoch": 0.5, "loss": 0.713, "loss_classification": 0.4, "loss_box": 0.313}
MEANS |= {"images_per_second": 3312.4, "data_wait": 0.02, "lr": 0.01}


class SimpleLoader:
    def __init__(self, batches: list[SimpleNamespace]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[SimpleNamespace]:
        return iter(self.batches)


def test_a_terminal_of_80_columns_shows_step_total_bar_and_time_left(tmp_path: Path) -> None:
    def act() -> None:
        logger = RunLogger(tmp_path, active=True)
        logger.info("begun")
        for step in (0, 1, 89998, 89999):
            logger.progress(step, 90000)
        logger.progress(89999, 90000, MEANS)
        batches = [SimpleNamespace(images=torch.zeros(60, 1)) for _ in range(3)]
        watched = logger.evaluating(SimpleLoader(batches), 150)
        for _ in range(2):
            assert list(watched) == batches
        logger.progress(90000, 90000)
        logger.close()

    lines = drawn_on_a_terminal(act, 80)
    assert max(map(len, lines)) <= 80, "no line wraps"
    assert "begun" in lines
    assert any(re.match(r"step +0/90000 \S+ ETA -:--", line) for line in lines), "before the first step is over"
    assert any(re.match(r"step +1/90000 \S+ ETA \d+:\d\d", line) for line in lines), "after the first step"
    assert any(re.match(r"step +89999/90000 \S+ ETA \d+:\d\d loss 0.713  3312.4 images/s", line) for line in lines)
    assert sum(bool(re.match(r"evaluating +120/150 +\S+ ETA \d+:\d\d", line)) for line in lines) >= 2
    assert not any(line.startswith("evaluating") for line in lines[-3:]), "the bar goes with the evaluation"
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"step 89999/90000  epoch 0.50  loss 0.713 \(class 0.400, box 0.313\) .* ETA \d+:\d\d", log)


def test_without_a_terminal_progress_is_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(tmp_path, active=True)
    for step in range(3):
        logger.progress(step, 4)
    logger.progress(2, 4, MEANS)
    assert logger.evaluating([], 3) == []
    logger.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 2/4  epoch 0.50  loss 0.713")
    assert line in (tmp_path / "log.txt").read_text()


def test_curves_are_a_picture_of_all_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **named: drawn.append(named["label"]) or plot(*args, **named))
    logger = RunLogger(tmp_path, active=True)
    logger.curves()
    assert not (tmp_path / "curves.png").exists(), "there is nothing to draw"
    for step in (10, 20):
        logger.scalars(step, "train", MEANS)
    logger.scalars(20, "val", {"AP": 0.5, "AP50": math.nan, "AP75": 0.25})
    logger.curves()
    logger.close()
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 800
    assert drawn == ["training", "classification", "boxes", "rate", "AP", "AP75"]


def test_curves_that_cannot_be_drawn_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(tmp_path, active=True)
    (tmp_path / "metrics.jsonl").write_text("{")
    logger.curves()
    logger.close()
    assert capsys.readouterr().out.startswith("warning: curves.png: ")
