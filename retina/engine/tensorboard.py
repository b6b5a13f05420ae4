"""Numbers and pictures for TensorBoard.

PyTorch's own writer hands records to a thread, which dies with a traceback when the disk is full and loses what it held
when the process is killed. Here every record is in the file when the call returns."""

import os
import socket
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import scalar

from retina.files import Appender


class Board:
    """One more event file in `folder`. Opened after a resume at `step`, it hides what older files say of later steps.

    Every method raises OSError when there is no room; what could not be written follows as soon as there is."""

    def __init__(self, folder: Path, step: int) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = Appender(folder / name)
        self._head = [
            Event(step=step + 1, file_version="brain.Event:2"),
            Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)),
        ]

    def scalar(self, step: int, tag: str, value: float) -> None:
        self._write(Event(step=step, summary=scalar(tag, value)))

    def picture(self, step: int, tag: str, pixels: NDArray[Any]) -> None:
        """`pixels` is uint8 [H W 3]. Stored as JPEG: a photograph as PNG takes many times as long, half of it for
        TensorBoard's checksum of so many more bytes."""
        content = BytesIO()
        Image.fromarray(pixels).save(content, "JPEG", quality=90)
        picture = Summary.Image(
            height=pixels.shape[0], width=pixels.shape[1], colorspace=3, encoded_image_string=content.getvalue()
        )
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=picture)])))

    def close(self) -> None:
        self.file.close()

    def _write(self, event: Event) -> None:
        records = BytesIO()
        for one in (*self._head, event):
            one.wall_time = time.time()
            RecordWriter(records).write(one.SerializeToString())
        self._head = []
        self.file.write(records.getvalue())
