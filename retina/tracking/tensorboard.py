"""Numbers and pictures for TensorBoard.

PyTorch's own writer hands records to a thread, which dies with a traceback when the disk is full and loses its queue
when the process is killed. Here every record is in the file when the call returns."""

import os
import re
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import custom_scalars, hparams, scalar

from retina.files import Appender

_TOGETHER = {"loss": {"training and validation": ["Multiline", ["train/loss", "val/loss"]]}}
"""Charts under "Custom scalars" that hold several curves."""


class Board:
    """One more event file in `folder`. It hides what older files of the folder say of steps after `step`.

    TensorBoard reads files in the order of the times in their names, so with a clock that was set back the new one
    would come first and be hidden: such a session counts on from the latest of those times.

    Every method raises OSError when there is no room. Records that find no room follow as soon as there is some."""

    def __init__(self, folder: Path, step: int) -> None:
        self._ahead = max(0.0, _latest(folder) + 1e-3 - time.time())
        name = f"events.out.tfevents.{time.time() + self._ahead:.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = Appender(folder / name, within=folder.parent)
        self._head = [
            Event(step=step + 1, file_version="brain.Event:2"),
            Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)),
            Event(step=step + 1, summary=custom_scalars(_TOGETHER)),
        ]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        parts = [part for tag, value in values.items() for part in scalar(tag, value).value]
        self._write(Event(step=step, summary=Summary(value=parts)))

    def pictures(self, step: int, pictures: Mapping[str, NDArray[Any]]) -> None:
        """Each is uint8 [H W 3]. Stored as JPEG, because a photograph as PNG takes many times as long, half of that
        for TensorBoard's checksum of so many more bytes."""
        for tag, pixels in pictures.items():
            content = BytesIO()
            Image.fromarray(pixels).save(content, "JPEG", quality=90)
            height, width = pixels.shape[:2]
            picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content.getvalue())
            self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=picture)])))

    def settings(self, step: int, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """For the table of runs: what was set, and which of the numbers written are the result."""
        for summary in hparams(dict(settings), dict(metrics)):
            self._write(Event(step=step, summary=summary))

    def end(self) -> None:
        self.file.close()

    def _write(self, event: Event) -> None:
        records = BytesIO()
        for record in (*self._head, event):
            record.wall_time = time.time() + self._ahead
            RecordWriter(records).write(record.SerializeToString())
        self._head = []
        self.file.write(records.getvalue())


def _latest(folder: Path) -> float:
    """The latest time, in seconds, in the name of an event file or of its last change; 0 without any."""
    times = [0.0]
    for file in folder.glob("events.out.tfevents.*"):
        stamp = re.match(r"events\.out\.tfevents\.(\d{1,12}(\.\d+)?)\.", file.name)
        times += [float(stamp[1]), file.lstat().st_mtime] if stamp else []
    return max(times)
