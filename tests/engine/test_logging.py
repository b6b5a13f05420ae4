import json
from pathlib import Path

import numpy as np

from retina.engine.logging import RunLogger


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_lines_and_pictures(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, active=True)
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


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "nowhere", active=False)
    logger.info("x")
    logger.scalars(1, "train", {"loss": 1.0})
    logger.progress(1, 2, {}, 0.0)
    logger.resume(1)
    logger.close()
    assert not (tmp_path / "nowhere").exists()
