"""Files of OpenVINO: a graph (.xml) and its numbers (.bin), made from an ONNX graph. Knows no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from retina.errors import CheckpointError, ConfigError
from retina.export.description import parse_description
from retina.export.onnx_runtime import HEADER
from retina.export.proof import Image, Table, pack, unpack

PARTS = (".bin", ".xml")
"""Suffixes of the files, the one that is opened last."""


class OpenvinoFile:
    """A graph that `retina export` wrote, or an ONNX graph as bytes. Called with images, it returns the detections.

    Raises ConfigError where openvino is not installed, CheckpointError for a file that it cannot load, or that is not
    from here."""

    def __init__(self, content: bytes | Path, description: dict[str, Any] | None = None) -> None:
        try:
            import openvino
        except ImportError:
            problem = "openvino is not installed - pip install 'retina-detect[openvino]'"
            raise ConfigError(problem, code="missing-package", key="format") from None
        self.runtime = f"openvino {openvino.__version__.split('-')[0]}"
        core = openvino.Core()
        where = "the graph" if isinstance(content, bytes) else content
        try:
            self.model = core.read_model(content)
            # without the hint, newer CPUs compute in bfloat16
            self.compiled = core.compile_model(self.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except Exception as fault:  # it raises RuntimeError and its own
            problem = f"{self.runtime} cannot load it ({' '.join(str(fault).split())[:200]})"
            raise CheckpointError(f"{where}: {problem} - export it again", code="unreadable-file") from None
        self.description = description if description is not None else self._read(where)

    def _read(self, where: Any) -> dict[str, Any]:
        try:
            header = str(self.model.get_rt_info(HEADER).astype(str))
        except (RuntimeError, AttributeError):
            header = None
        return parse_description(header, where)

    def __call__(self, images: Sequence[Image]) -> list[Table]:
        first, second = self.compiled(pack(images)).values()
        return unpack(first, second, self.description)

    def sealed(self, description: dict[str, Any]) -> dict[str, bytes]:
        """The bytes of the files, by suffix."""
        import openvino

        self.model.set_rt_info(json.dumps(description), [HEADER])
        with TemporaryDirectory() as folder:
            file = Path(folder) / "model.xml"
            openvino.save_model(self.model, str(file), compress_to_fp16=description["precision"] == "fp16")
            return {suffix: file.with_suffix(suffix).read_bytes() for suffix in PARTS}
