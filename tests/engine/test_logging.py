import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from children import in_child
from retina.engine.logging import RunLogger
from retina.engine.trackers import TensorBoard


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
