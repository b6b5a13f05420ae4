"""A proof is one only if there was something to find, and only if both found it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import retina
from faults import refused
from retina.errors import CheckpointError, DataError
from retina.export.proof import Image, Table, Tolerance
from retina.export.write import Graph, Pictures, describe, look, prove
from retina.inference import Detector


@pytest.fixture
def detector(trained_run: Path) -> Detector:
    return retina.load(trained_run, device="cpu", precision="fp32")


def proved(detector: Detector, change: Any, tiny_data: Path, **settings: Any) -> dict[str, Any]:
    """The proof of a file that says what the detector says, changed."""

    def run(images: Sequence[Image]) -> list[Table]:
        return [change(look(detector, image, **settings)) for image in images]

    description = describe(detector, format="onnx", raw=False, weights="", **settings)
    pictures = Pictures(tiny_data / "val", sorted(file.name for file in (tiny_data / "val").iterdir()))
    graph = Graph(run, "a runtime", lambda values: {})
    limits: Any = {"tolerance": Tolerance(0.25, 0.005), "num_images": 3, "num_scored": 0}
    return prove(detector, graph, pictures, description, progress=lambda items, what: items, **limits, **settings)


def test_the_same_is_proved(detector: Detector, tiny_data: Path) -> None:
    proof = proved(detector, lambda table: table, tiny_data)
    assert proof["matched"] > 20
    assert (proof["pixels"], proof["score"], proof["edges"]) == (0, 0, 0)
    assert len(proof["images"]) == 3


@pytest.mark.parametrize("change", [lambda table: table[1:], lambda table: table + np.array([0, 0, 1.0, 0, 0, 0])])
def test_where_they_part_is_told(detector: Detector, tiny_data: Path, change: Any) -> None:
    with refused("not-equal", "a runtime", ".jpg", kind=CheckpointError):
        proved(detector, change, tiny_data)


def test_nothing_found_is_no_proof(detector: Detector, tiny_data: Path) -> None:
    with refused("no-detections", "images", kind=DataError):
        proved(detector, lambda table: table, tiny_data, score_threshold=0.9999999)
