"""A disk that fills up, at any byte of whatever a run writes."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from children import on_small_disk, remount_read_only
from faults import refused
from retina.cli.run_folder import open_run
from retina.engine.checkpoint import Progress, find_fault, newest_valid, save_checkpoint
from retina.engine.checkpointer import Checkpointer, TrainState
from retina.engine.config import TrainConfig
from retina.engine.logging import RunLogger
from retina.engine.optim import ExponentialMovingAverage
from retina.errors import CheckpointError, ConfigError
from retina.model.weights import DetectorCard, read_card, save_detector
from retina.tracking.trackers import TensorBoard

Record = Callable[[str, object], None]
MEGABYTES = 1
BLOCK = 4096


def saver(folder: Path) -> Callable[[int], Path]:
    """Saves a checkpoint of some 100 kB, of three files with tensors."""
    torch.manual_seed(0)
    model = nn.Linear(64, 128)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)  # not from autograd, which may refuse to work in a forked child
    optimizer.step()
    ema = ExponentialMovingAverage(model, 0.9)
    return lambda step: save_checkpoint(folder, Progress(step=step), model=model, optimizer=optimizer, ema=ema, keep=1)


def test_no_file_may_grow_beyond_any_of_20_sizes(tmp_path: Path, record_property: Record) -> None:
    record_property("tried", 20)
    save = saver(tmp_path)
    first = save(1)
    largest = max(file.stat().st_size for file in first.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in np.linspace(0, largest - 1, 20).astype(int).tolist():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save(2)
            with pytest.raises(OSError, match="File too large"):
                save(1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == [first], "no leftovers"
        assert newest_valid(tmp_path) == (first, [])
    assert newest_valid(tmp_path)[0] == first
    assert save(2) == newest_valid(tmp_path)[0]
    assert not first.exists()


def fill(folder: Path, *, free: int) -> None:
    """Leaves `free` blocks on the disk of `folder`."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    disk = os.statvfs(folder)
    filler.write_bytes(b"x" * BLOCK * max(0, disk.f_bavail * disk.f_frsize // BLOCK - free))


def test_the_disk_fills_up_at_any_of_20_places_of_a_checkpoint(tmp_path: Path, record_property: Record) -> None:
    record_property("tried", 20)

    def task() -> None:
        folder = tmp_path / "checkpoints"
        save = saver(folder)
        first = save(1)
        blocks = sum(-(-file.stat().st_size // BLOCK) for file in first.iterdir())
        assert blocks > 25
        for free in np.linspace(0, blocks - 1, 20).astype(int).tolist():
            for step in (1, 2):
                fill(tmp_path, free=free)
                with pytest.raises(OSError, match="No space left"):
                    save(step)
                assert list(folder.iterdir()) == [first], "no leftovers"
                assert find_fault(first) is None
        fill(tmp_path, free=blocks)
        second = save(2)
        assert newest_valid(folder) == (second, [])
        assert list(folder.iterdir()) == [second]

    assert on_small_disk(tmp_path, MEGABYTES, task) == 0


def test_the_disk_fills_up_at_any_of_20_places_of_the_best_weights(tmp_path: Path, record_property: Record) -> None:
    record_property("tried", 20)

    def task() -> None:
        file = tmp_path / "best.safetensors"
        card = DetectorCard(model={}, classes=["cat"], category_ids=[1], preprocessing={}, postprocess={})
        state = {"weight": torch.ones(150, 150)}
        save_detector(file, state, card)
        before, blocks = file.read_bytes(), -(-file.stat().st_size // BLOCK)
        for free in np.linspace(0, blocks - 1, 20).astype(int).tolist():
            fill(tmp_path, free=free)
            with pytest.raises(OSError, match="No space left"):
                save_detector(file, state, card)
            assert {path.name for path in tmp_path.iterdir()} == {file.name, "filler"}
            assert file.read_bytes() == before
        fill(tmp_path, free=blocks)
        save_detector(file, {"weight": torch.zeros(150, 150)}, card)
        assert read_card(file) == card
        assert file.read_bytes() != before

    assert on_small_disk(tmp_path, MEGABYTES, task) == 0


def test_records_find_no_room_for_a_while(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing stops, nothing is cut in half, one warning; and all of it is there once there is room again."""

    def task() -> None:
        logger = RunLogger(tmp_path, active=True, trackers=[TensorBoard()])
        picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        for step in range(1, 61):
            if step == 20:
                fill(tmp_path, free=2)
            if step == 40:
                assert len(steps_of(tmp_path)) < 39, "the disk was full"
                fill(tmp_path, free=100)
            logger.info(f"line {step}")
            logger.scalars(step, "train", {"loss": 1.0 / step, "long": {"x" * 300: step}})
            logger.picture(step, "picture", picture)
            assert steps_of(tmp_path) == list(range(1, len(steps_of(tmp_path)) + 1)), "whole lines only"
        logger.close()
        assert steps_of(tmp_path) == list(range(1, 61))
        assert (tmp_path / "log.txt").read_text().count("line") == 60
        assert board_steps(tmp_path) == list(range(1, 61))

    assert on_small_disk(tmp_path, MEGABYTES, task) == 0
    said = capfd.readouterr()
    assert said.out.count("warning") == 1
    assert "No space left on device - make room: training goes on" in said.out
    assert "Traceback" not in said.err


def test_what_found_no_room_to_the_end_is_said_to_be_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def task() -> None:
        logger = RunLogger(tmp_path, active=True, trackers=[TensorBoard()])
        logger.scalars(1, "train", {"loss": 1.0})
        fill(tmp_path, free=0)
        for step in range(2, 40):
            logger.scalars(step, "train", {"loss": 1.0, "x" * 200: 0.5})
        logger.close()
        assert steps_of(tmp_path) == list(range(1, len(steps_of(tmp_path)) + 1))
        assert 1 < len(steps_of(tmp_path)) < 39

    assert on_small_disk(tmp_path, MEGABYTES, task) == 0
    said = capfd.readouterr().out
    board, metrics = (line for line in said.splitlines() if "records are lost" in line)
    assert "TensorBoard" in board
    assert "metrics.jsonl" in metrics


def test_a_disk_that_became_read_only_is_named_and_ends_the_run(tmp_path: Path) -> None:
    def task() -> None:
        model = nn.Linear(2, 2)
        state = TrainState(model, torch.optim.SGD(model.parameters()), TrainConfig(max_unsaved_minutes=0.0))
        checkpointer = Checkpointer(tmp_path, state)
        remount_read_only(tmp_path)
        state.progress.step = 1
        with refused("nothing-saved", tmp_path, "Read-only file system", "mount", kind=CheckpointError):
            checkpointer.save()
        with refused("nothing-saved", "best.safetensors", "mount", kind=CheckpointError):
            checkpointer.save_best({})

    assert on_small_disk(tmp_path, MEGABYTES, task) == 0


def test_a_full_disk_is_found_before_anything_else(tmp_path: Path) -> None:
    def task() -> None:
        fill(tmp_path, free=0)
        with refused("not-written", "run", "No space left on device", "make room", kind=ConfigError):
            open_run(tmp_path / "run", {"name": "run"}, overwrite=False)

    assert on_small_disk(tmp_path, MEGABYTES, task) == 0


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    steps = [event.step for event in board.Scalars("train/loss")]
    assert steps == [event.step for event in board.Images("picture")]
    return steps
