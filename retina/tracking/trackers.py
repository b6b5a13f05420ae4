"""Trackers show the numbers and pictures of a run to people. `Tracker` says what one must do; yours may be another.

Each adapter imports its package in `start`, on rank 0 only. None sends anything anywhere unless its arguments say so;
environment variables do not count."""

import contextlib
import importlib.util
import io
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from retina.errors import ConfigError
from retina.files import make_folder, open_plain, write_whole

Pictures = Mapping[str, UInt8[np.ndarray, "_ _ 3"]]


@runtime_checkable
class Tracker(Protocol):
    """Rank 0 calls `start` once, then `scalars` and `pictures` with steps that never go back, then `end`.

    What they raise stops nothing: the run warns once and goes on. It does without a tracker that could not start."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """`folder` is the run's. `settings` are the whole command's, plain and nested. `step` is 0 in a new run; in a
        resumed one it is the last step that stays: what an earlier process recorded of later steps comes again."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Names have a group in front: `train/loss`, `val/AP`. NaN and infinity may occur."""

    def pictures(self, step: int, pictures: Pictures) -> None: ...

    def end(self) -> None: ...


RESULTS = ("val/AP", "val/AP50", "val/AP75", "val/loss")
"""The numbers that runs are compared by."""


class TensorBoard:
    """Event files in `tensorboard/` of the run."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from retina.tracking.tensorboard import Board

        self._board = Board(folder / "tensorboard", step)
        leaves = flatten(settings).items()
        self._settings = {key: value for key, value in leaves if isinstance(value, (bool, int, float, str))}
        self._step, self._result = step, dict[str, float]()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._board.scalars(step, values)
        self._step = step
        self._result |= {key: value for key, value in values.items() if key in RESULTS}

    def pictures(self, step: int, pictures: Pictures) -> None:
        self._board.pictures(step, pictures)

    def end(self) -> None:
        if self._result:
            self._board.settings(self._step, self._settings, self._result)
        self._board.end()


class _Logged:
    """What W&B and Trackio have in common: a run that takes numbers and images by name."""

    _run: Any
    _image: Callable[..., Any]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Pictures) -> None:
        self._run.log({name: self._image(pixels) for name, pixels in pictures.items()}, step=step)

    def end(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # the screen is ours
            self._run.finish()


class WandB(_Logged):
    """Weights & Biases. `trackers/wandb/` of the run holds the records until `wandb sync` sends them.

    mode: "online" sends them at once, from the account that `wandb login` has set."""

    def __init__(self, *, project: str = "retina", mode: str = "offline") -> None:
        _require("wandb")
        self.project, self.mode = project, mode

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # offline too, it would tell its makers about crashes
        import wandb

        place = folder / "trackers"
        make_folder(place / "wandb", within=folder)
        self._image = wandb.Image
        self._run = wandb.init(
            project=self.project,
            name=folder.name,
            id=_kept_id(place / "wandb_id", step, lambda: secrets.token_hex(4)),
            resume="allow",
            mode=self.mode,
            dir=str(place),
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )


class MLflow:
    """MLflow. Runs side by side share `mlflow.db` and the pictures in `mlflow/` of their parent folder.

    uri: a tracking server, which is then sent everything."""

    def __init__(self, *, experiment: str = "retina", uri: str | None = None) -> None:
        _require("mlflow")
        self.experiment, self.uri = experiment, uri

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # otherwise it counts its users
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):  # they report how they make tables
            logging.getLogger(name).setLevel(logging.WARNING)
        store = folder.parent.resolve()
        if not self.uri:
            make_folder(store / "mlflow", within=store)
            open_plain(store / "mlflow.db", "ab").close()  # SQLite would follow a link, and wait for a pipe
        self._metric = Metric
        self._client = client = MlflowClient(self.uri or f"sqlite:///{store / 'mlflow.db'}")
        experiment = client.get_experiment_by_name(self.experiment)
        place = None if self.uri else (store / "mlflow").as_uri()
        number = experiment.experiment_id if experiment else client.create_experiment(self.experiment, place)
        new_run = lambda: client.create_run(number, run_name=folder.name).info.run_id  # noqa: E731
        self._run = _kept_id(folder / "trackers" / "mlflow_id", step, new_run)
        client.update_run(self._run, status="RUNNING")
        if step == 0:
            parameters = [Param(name, str(value)) for name, value in flatten(settings).items()]
            client.log_batch(self._run, params=parameters[:100])  # it takes no more at once

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(re.sub(r"[^\w. /:-]", "_", n), value, now, step) for n, value in values.items()]
        for begin in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[begin : begin + 1000])

    def pictures(self, step: int, pictures: Pictures) -> None:
        for name, pixels in pictures.items():
            self._client.log_image(self._run, pixels, key=name, step=step)

    def end(self) -> None:
        self._client.set_terminated(self._run)


class Trackio(_Logged):
    """Trackio. Records are where `trackio show` looks for them on this machine.

    space_id: a Space of Hugging Face, which is then sent everything."""

    def __init__(self, *, project: str = "retina", space_id: str | None = None) -> None:
        _require("trackio")
        self.project, self.space_id = project, space_id

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):  # they would send records unasked
            os.environ.pop(name, None)
        import trackio

        self._image = trackio.Image
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                self.project,
                name=folder.name,
                space_id=self.space_id,
                config=dict(settings),
                resume="allow" if step else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        problem = f"{package} is not installed - pip install 'retina-detect[trackers]'"
        raise ConfigError(problem, code="missing-package", key="trackers")


def _kept_id(file: Path, step: int, make: Callable[[], str]) -> str:
    """The id under which the tracker knows the run: a resumed run goes on under the id of its first process."""
    if step and file.is_file():
        with open_plain(file, "rb") as handle:
            return handle.read().decode()
    make_folder(file.parent, within=file.parents[1])
    write_whole(file, (number := make()).encode())
    return number


def flatten(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`. Empty sections stay."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(value, separator, f"{prefix}{key}{separator}") if inner else {f"{prefix}{key}": value}
    return flat
