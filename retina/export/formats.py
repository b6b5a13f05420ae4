"""Graphs as the bytes of a file, in the formats of the runtimes that run them."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina.errors import CheckpointError, ConfigError
from retina.export.graph import REMOVED, ExportedDetector, keep_best
from retina.export.onnx_runtime import HEADER
from retina.export.proof import Image, Table, pack, unpack
from retina.schema import parse_json

OPSET = 18
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_PACKAGES = {"onnx": _ONNX, "pt2": (), "openvino": (*_ONNX, "openvino")}


def check_packages(format: str) -> None:
    """Raises ConfigError where something is not installed that a format needs."""
    if missing := [name for name in _PACKAGES[format] if find_spec(name) is None]:
        extra = "export,openvino" if "openvino" in missing else "export"
        problem = f"{format} needs {', '.join(missing)} - pip install 'retina-detect[{extra}]'"
        raise ConfigError(problem, code="missing-package", key="format")


@torch.library.custom_op("retina_export::keep", mutates_args=())
def _keep(boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou: float, limit: int) -> Tensor:
    """`keep_best` as one operator, which ONNX has another name for."""
    return keep_best(boxes, scores, labels, num_classes, iou, limit)


@_keep.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou: float, limit: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _keep_in_onnx(boxes: Any, scores: Any, labels: Any, num_classes: int, iou: float, limit: int) -> Any:
    """NonMaxSuppression wants the scores of all classes [B K N]: a candidate has one only for its own."""
    from onnxscript import opset18 as op

    classes, second = op.Constant(value_ints=list(range(num_classes))), op.Constant(value_ints=[1])
    own = op.Equal(op.Unsqueeze(labels, second), op.Unsqueeze(classes, second))
    per_class = op.Where(own, op.Unsqueeze(scores, second), op.Constant(value_float=REMOVED))
    selected = op.NonMaxSuppression(
        boxes,
        per_class,
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[-0.5]),
    )
    places = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)  # image and candidate
    kept = op.Expand(op.Constant(value_ints=[1]), op.Slice(op.Shape(places), [0], [1]))
    nothing = op.Mul(labels, op.Constant(value_int=0))
    return op.Cast(op.ScatterND(nothing, places, kept), to=9)


def trace(model: ExportedDetector) -> torch.export.ExportedProgram:
    """The graph, for any number of images of any sizes."""
    images = torch.zeros(
        2, 70, 90, model.channels, dtype=torch.uint8
    )  # two of different sizes, so that nothing is taken for fixed
    sizes = torch.tensor([[70, 90], [60, 80]])
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad(), _quiet():
        return torch.export.export(
            model.eval(),
            (images, sizes),
            dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic}, {0: dynamic}),
            strict=False,
        )


def onnx_model(make: Callable[..., ExportedDetector], names: tuple[str, str]) -> Any:
    """The ONNX model of the graph that `make(keep=...)` describes, with outputs of these names."""
    program = trace(make(keep=torch.ops.retina_export.keep))
    with _quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images", "sizes"],
            output_names=list(names),
            custom_translation_table={torch.ops.retina_export.keep.default: _keep_in_onnx},
            verbose=False,
        )
    assert written is not None
    return written.model_proto


def onnx_bytes(model: Any, description: dict[str, Any]) -> bytes:
    """The ONNX model with its description, as the bytes of a file."""
    import onnx

    onnx.helper.set_model_props(model, {HEADER: json.dumps(description)})
    content: bytes = model.SerializeToString()
    return content


def program_bytes(program: torch.export.ExportedProgram, description: dict[str, Any]) -> bytes:
    """A program of torch.export with its description, as the bytes of a .pt2 file."""
    content, write = io.BytesIO(), torch.export.save
    with _quiet():
        write(program, content, extra_files={HEADER: json.dumps(description)})
    return content.getvalue()


class ProgramFile:
    """A program of torch.export that `retina export` wrote. Called with images, it returns the detections of each."""

    def __init__(self, program: torch.export.ExportedProgram, description: dict[str, Any]) -> None:
        self.module, self.description = program.module(), description
        self.runtime = f"torch {torch.__version__}"

    @classmethod
    def read(cls, file: Path) -> "ProgramFile":
        """Raises CheckpointError for a file that cannot be read, or that is not from here."""
        extra = {HEADER: ""}
        try:
            with _quiet():
                program = torch.export.load(file, extra_files=extra)
            description = parse_json(extra[HEADER])
        except Exception as fault:  # of the archive, of its JSON, of an operator that this torch does not know
            problem = f"torch {torch.__version__} cannot read it ({' '.join(str(fault).split())[:200]})"
            raise CheckpointError(f"{file}: {problem} - export it again", code="unreadable-file") from None
        return cls(program, description)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image]) -> list[Table]:
        inputs = {name: torch.from_numpy(value) for name, value in pack(images).items()}
        first, second = self.module(inputs["images"], inputs["sizes"])
        return unpack(first.numpy(), second.numpy(), self.description)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
