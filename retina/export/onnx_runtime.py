"""ONNX files, run by onnxruntime. Knows no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retina.errors import CheckpointError, ConfigError
from retina.export.description import parse_description
from retina.export.proof import Image, Table, pack, unpack

HEADER = "retina"
"""The name of the description in a file's metadata."""


class OnnxFile:
    """A file that `retina export` wrote, or its bytes. Called with images, it returns the detections of each.

    description: what the file says about itself.

    Raises ConfigError where onnxruntime is not installed, CheckpointError for a file that it cannot load, or that is
    not from here."""

    def __init__(self, content: bytes | Path, description: dict[str, Any] | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            problem = "onnxruntime is not installed - pip install onnxruntime"
            raise ConfigError(problem, code="missing-package", key="format") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        source = content if isinstance(content, bytes) else str(content)
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as fault:  # its classes are not public
            where = "the graph" if isinstance(content, bytes) else content
            problem = f"onnxruntime {onnxruntime.__version__} cannot load it ({' '.join(str(fault).split())[:200]})"
            raise CheckpointError(f"{where}: {problem} - export it again", code="unreadable-file") from None
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.description = description if description is not None else self._read(content)

    def _read(self, content: bytes | Path) -> dict[str, Any]:
        where = "the graph" if isinstance(content, bytes) else content
        header = self.session.get_modelmeta().custom_metadata_map.get(HEADER)
        return parse_description(header, where)

    def __call__(self, images: Sequence[Image]) -> list[Table]:
        first, second = self.session.run(None, pack(images))
        return unpack(first, second, self.description)
