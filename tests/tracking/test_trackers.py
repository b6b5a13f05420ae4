"""Trackers, tried with the packages themselves, each in a child process because they keep threads and settings."""

import importlib.util
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from children import in_child
from faults import refused
from retina.cli.build import build_trackers
from retina.engine.logging import RunLogger

PICTURE = np.full((4, 6, 3), 200, np.uint8)


def tried(tmp_path: Path, name: str, read: Callable[[Path], None]) -> None:
    """A run of three steps, a resumed one that goes on after step 2, and `read` of what the tracker then knows."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (the extra `trackers`)")

    def task() -> None:
        called: list[object] = []

        def listen(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
                called.append(arguments)

        sys.addaudithook(listen)
        os.environ |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_SPACE_ID": "somebody/space"}
        os.environ |= {"WANDB_MODE": "online", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
        folder = tmp_path / "runs" / "mine"
        folder.mkdir(parents=True)
        for begin in (0, 2):
            logger = RunLogger(folder, active=True, trackers=build_trackers([name]), settings={"train": {"seed": 7}})
            logger.resume(begin)
            for step in range(begin + 1, begin + 3):
                logger.scalars(step, "train", {"loss": 1.0 / step, "parts": {"fire hydrant\n": 0.5}})
            logger.picture(begin + 2, "val/detections", PICTURE)
            logger.close()
        assert "warning" not in (folder / "log.txt").read_text()
        read(folder)
        assert called == [], "nothing is sent"

    assert in_child(task) == 0


def test_wandb_keeps_a_run_offline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def read(folder: Path) -> None:
        import wandb

        wandb.teardown()  # as the end of the process does: its service has then written all
        losses, pictures, ids = {}, 0, set()
        for file in sorted(folder.glob("trackers/wandb/offline-run-*/*.wandb")):
            for record in wandb_records(file.read_bytes()):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                if "train/loss" in items:
                    losses[int(items["_step"])] = float(items["train/loss"])
                pictures += '"images/' in str(items.values()) or "media/images" in str(items.values())
                ids |= {record.run.run_id} - {""}
        assert losses == {step: 1 / step for step in (1, 2, 3, 4)}
        assert pictures == 2
        assert len(ids) == 1, "the resumed run is the same"

    tried(tmp_path, "wandb", read)
    assert "wandb" not in capfd.readouterr().out


def wandb_records(content: bytes) -> Iterator[Any]:
    """Of a file of W&B that is smaller than a block of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    position = 7
    while position < len(content):
        (length,) = struct.unpack_from("<H", content, position + 4)
        yield Record.FromString(content[position + 7 : position + 7 + length])
        position += 7 + length


@pytest.mark.slow  # MLflow takes 8 s to make its tables
def test_mlflow_keeps_a_run_in_a_local_store(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("retina").experiment_id])
        assert (run.info.run_name, run.info.status, run.data.params) == ("mine", "FINISHED", {"train.seed": "7"})
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in (1, 2, 3, 4)]
        assert len(list((folder.parent / "mlflow").rglob("*.png"))) == 2

    tried(tmp_path, "mlflow", read)


def test_trackio_keeps_a_run_on_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def read(folder: Path) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        assert SQLiteStorage.get_runs("retina") == ["mine"]
        logs = SQLiteStorage.get_logs("retina", "mine")
        losses = {log["step"]: log["train/loss"] for log in logs if "train/loss" in log}
        assert losses == {step: 1 / step for step in (1, 2, 3, 4)}
        assert sum("val/detections" in log for log in logs) == 2

    tried(tmp_path, "trackio", read)
    assert "rackio" not in capfd.readouterr().out


class Broken:
    def __init__(self, *methods: str) -> None:
        self.methods, self.seen = methods, list[str]()

    def __getattr__(self, name: str) -> Any:
        if name not in ("start", "scalars", "pictures", "end"):
            raise AttributeError(name)

        def method(*_: Any) -> None:
            self.seen.append(name)
            if name in self.methods:
                raise ConnectionError("no network\nhere")

        return method


def test_a_tracker_that_fails_stops_nothing_and_is_warned_of_once(tmp_path: Path, capsys: Any) -> None:
    class Flaky(Broken):
        pass

    lost, flaky = Broken("start"), Flaky("scalars", "pictures")
    logger = RunLogger(tmp_path, active=True, trackers=[lost, flaky])
    for step in (1, 2, 3):
        logger.scalars(step, "train", {"loss": 1.0})
        logger.picture(step, "val/detections", PICTURE)
    logger.close()
    assert lost.seen == ["start"]
    assert flaky.seen == ["start", *["scalars", "pictures"] * 3, "end"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    warnings = re.findall(r"warning: .*", capsys.readouterr().out)
    assert [line.split(":")[1] for line in warnings] == [" Broken", " Flaky"]
    assert all("no network\\nhere" in line for line in warnings)
    assert (tmp_path / "log.txt").read_text().count("warning: Flaky") == 1


def test_other_ranks_have_no_trackers(tmp_path: Path) -> None:
    tracker = Broken()
    logger = RunLogger(tmp_path, active=False, trackers=[tracker])
    logger.scalars(1, "train", {"loss": 1.0})
    logger.close()
    assert tracker.seen == []


def test_trackers_are_names_or_sections() -> None:
    section = {"_target_": "retina.tracking.trackers.TensorBoard"}
    assert [type(t).__name__ for t in build_trackers(["tensorboard", section])] == ["TensorBoard", "TensorBoard"]
    assert build_trackers([]) == []
    with refused("unknown-value", "trackers", "tensorbord", "tensorboard"):
        build_trackers(["tensorbord"])
    with refused("wrong-type", "trackers", "tensorboard"):
        build_trackers("tensorboard")


def test_a_package_that_is_absent_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow", "trackio"):
        with refused("missing-package", "trackers", name, "pip install 'retina-detect[trackers]'"):
            build_trackers([name])
