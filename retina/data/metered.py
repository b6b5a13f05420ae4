"""An image file that stops being read when it costs more than an image of `max_pixels` may. Beside the road.

Few bytes can ask for much work: a progressive JPEG of many scans, each over all pixels; a header whose comments are
read byte by byte, or whose fields share the same bytes."""

import io
import os
import time
from pathlib import Path
from typing import Any

from retina.errors import DataError

_HEADER_READS, _HEADER_COPIES, _HEADER_ROOM = 1 << 18, 4, 1 << 20
"""Reads before the pixels; how many times the file's size they may add up to, and how many bytes they always may."""
_SCANS, _USUAL_SCANS = 32, 10
"""Scans that every JPEG may have; what encoders write. So many over `max_pixels` pixels are as much as there may be."""
_SECONDS_PER_MILLION, _LEAST_SECONDS = 1.0, 10.0
"""Processor time for each million of `max_pixels`: a hundred times what decoding takes."""


class MeteredFile(io.BufferedReader):
    """Raises DataError from `read`, which decoders call again and again."""

    def __init__(self, path: Path, max_pixels: int, content: Any = None) -> None:
        """content: what lies under that path, if it is no file."""
        super().__init__(io.FileIO(path) if content is None else content)
        self._path, self._max_pixels = path, max_pixels
        self._reads = self._bytes = self._scans = 0
        self._room = _HEADER_COPIES * self.seek(0, os.SEEK_END) + _HEADER_ROOM
        self.seek(0)
        self._header, self._most_scans = True, 0
        self._until = time.thread_time() + max(_LEAST_SECONDS, _SECONDS_PER_MILLION * max_pixels / 1e6)

    def begin_pixels(self, pixels: int, *, jpeg: bool) -> None:
        """The header has been read."""
        self._header = False
        self._most_scans = max(_SCANS, _USUAL_SCANS * self._max_pixels // pixels) if jpeg else 0
        self._scans_from = self.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        at = self.tell() if self._most_scans else 0
        data = super().read(size)
        if self._header:
            self._reads += 1
            self._bytes += len(data)
            if self._reads > _HEADER_READS or self._bytes > self._room:
                raise self._fault("long-header", "has a header without end", "write it anew without its comments")
        elif self._most_scans:
            self._scans += data.count(b"\xff\xda", max(0, self._scans_from - at))  # what metadata hold does not count
            if self._scans > self._most_scans:
                problem = f"has more than {self._most_scans} scans, the work of more than"
                raise self._fault("too-many-scans", problem, "write it anew, or raise that limit", limit=True)
        if time.thread_time() > self._until:
            problem = "takes more time to decode than there is for"
            raise self._fault("too-slow", problem, "write it anew, or raise that limit", limit=True)
        return data

    def _fault(self, code: str, problem: str, fix: str, *, limit: bool = False) -> DataError:
        problem += f" max_pixels={self._max_pixels} pixels" if limit else ""
        return DataError(f"{self._path}: {problem} - {fix}", code=code)
