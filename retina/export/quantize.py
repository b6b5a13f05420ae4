"""An ONNX graph whose convolutions compute with 8 bits, with ranges measured on images."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from retina.export.proof import Image, pack


def quantized(model: Any, images: Iterable[Image]) -> Any:
    """The model with quantized convolutions, calibrated on the images one by one. Everything else stays as it is.

    onnxruntime does it (`quantize_static`, QDQ format, MinMax). Raises what that raises."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.inputs: Iterator[dict[str, np.ndarray]] = (pack([image]) for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.inputs, None)

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantize_static(
            model,
            str(file),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(str(file))
