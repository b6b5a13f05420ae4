"""Headers of weights files with one or two values changed: each is a fault of one line, or a detector that works."""

import json
import random
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from altered import change, paths
from children import in_child
from faults import refused
from retina.errors import RetinaError
from retina.inference import Detector
from retina.model.retinanet import retinanet
from retina.model.weights import DetectorCard, read_card
from tiny import PREPROCESSING

Weights = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors and header."""


EXPECTED: dict[str, Any] = {
    "precision": [0.9, 0.8, 0.95],
    "recall": [0.7, 0.6, 0.8],
    "false_alarms": [0.1, 0.0, 0.2],
    "count_error": None,
}
OPERATING_POINT = {
    "goal": "recall",
    "target": 0.7,
    "num_images": 20,
    "classes": [
        {"threshold": 0.25 * (label + 1), "pooled": label == 2, "reached": True, "num_objects": 30, **EXPECTED}
        for label in range(3)
    ],
    "overall": EXPECTED,
}


class Stub(nn.Module):
    """A backbone that takes no time to make."""

    channels, strides = (4, 4), (4, 8)

    def __init__(self, last_level: int, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fine = self.conv(images)
        return fine, nn.functional.max_pool2d(fine, 2)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights("resnet18")


def make_weights(backbone: str | dict[str, Any]) -> Weights:
    """Of the smallest detector there is."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"fpn_channels": 8, "head_convs": 1, "anchor_scales": [1.0], "anchor_ratios": [1.0]}
    plugins = [__name__]
    model = retinanet(
        num_classes=3, backbone=backbone, plugins=plugins, levels=[2, 3], anchor_sizes=[16.0, 32.0], **sizes
    )
    card = DetectorCard(
        model=model.arguments,
        classes=["a", "b", "c"],
        category_ids=[1, 2, 3],
        preprocessing=PREPROCESSING,
        postprocess={"score_threshold": 0.0, "candidates_per_level": 50, "nms_iou": 0.5, "max_detections": 20},
        metrics={"AP": 0.5, "APs": None},
        environment={"torch": "2.10", "device": "cpu"},
        operating_point=OPERATING_POINT,
    )
    return model.state_dict(), asdict(card)


def write(file: Path, tensors: dict[str, torch.Tensor], header: Any) -> Path:
    """Without the hash, which any change would break."""
    save_file(tensors, file, metadata={"retina": header if isinstance(header, str) else json.dumps(header)})
    return file


@pytest.mark.parametrize(
    ("backbone", "num_changes"), [({"_target_": f"{__name__}.Stub", "width": 4}, 1900), ("resnet18", 100)]
)
def test_changed_headers_are_one_line_or_work(
    tmp_path: Path, backbone: str | dict[str, Any], num_changes: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("tried", num_changes)
    tensors, values = make_weights(backbone)
    load = partial(Detector.load, device="cpu", plugins=[__name__])
    built = load(write(tmp_path / "sound", tensors, values))
    text, places, generator, outcomes = json.dumps(values), list(paths(values)), random.Random(0), Counter[str]()
    assert len(places) > 50
    image, faults = np.zeros((32, 48, 3), np.uint8), list[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(num_changes):
        changed = json.loads(text)
        change(changed, places[number % len(places)], generator)
        if number % 2:
            change(changed, generator.choice(places), generator)
        try:
            card = read_card(write(tmp_path / "small", {"x": torch.zeros(1)}, changed))
            if card.model == built.card.model:
                detector = Detector(built.model, card, device=built.device, file=built.file)
            else:
                detector = load(write(tmp_path / "w", tensors, changed))
            assert len(detector.classes) == 3
            detector.predict(image)
            outcomes["works"] += 1
        except RetinaError as fault:
            faults.append(str(fault))
            outcomes[fault.code] += 1
        except Exception as error:
            raise AssertionError(f"{changed}") from error
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert [line for line in faults if "\n" in line or len(line) > 2000] == []
    codes = {"bad-header", "other-model", "other-version", "needs-plugin", "not-finite"}
    assert outcomes.keys() <= codes | {"works", "unreadable-file", "damaged-file"}
    assert outcomes["bad-header"] > num_changes / 2, outcomes
    assert outcomes["works"] > num_changes / 100, outcomes
    assert grown < 500_000  # kB


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("preprocessing", "pad_multiple", 0),
        ("preprocessing", "divisor", 0),
        ("preprocessing", "short_side", "x"),
        ("preprocessing", "pad_value", [1, 2]),
        ("preprocessing", "pad_value", [0, 0, 256]),
        ("preprocessing", "batch_size", 10**9),
        ("preprocessing", "precision", "fp64"),
        ("postprocess", "max_detections", 0),
        ("postprocess", "max_detections", 2.5),
        ("postprocess", "nms_iou", "0.5"),
        ("postprocess", "nms", 0.5),
        ("model", "backbone", 5),
        ("model", "num_classes", 10),
        ("model", "norm_epsilon", 1.0),
        ("model", "mean", ["a", "b", "c"]),
        (None, "classes", ["one"]),
        (None, "category_ids", [1, 1, 2]),
        (None, "step", 2**63),
        (None, "step", -1),
        (None, "metrics", {"AP": "high"}),
        ("operating_point", "goal", "luck"),
        ("operating_point", "target", -1),
        ("operating_point", "classes", []),
        ("operating_point", "classes", [{}] * 3),
        ("operating_point", "overall", {"precision": [0.5]}),
        ("operating_point", "code", "print()"),
    ],
)
def test_values_that_no_detector_has_are_refused_when_the_header_is_read(
    tmp_path: Path, weights: Weights, section: str | None, key: str, value: Any
) -> None:
    changed = json.loads(json.dumps(weights[1]))
    (changed if section is None else changed[section])[key] = value
    write(tmp_path / "w", {"x": torch.zeros(1)}, changed)
    with refused("bad-header", tmp_path / "w", "pad_multiple" if key == "divisor" else key):
        read_card(tmp_path / "w")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threshold", 1.0),
        ("threshold", True),
        ("pooled", 1),
        ("num_objects", -1),
        ("recall", [0.5, 0.5]),
        ("recall", 1),
    ],
)
def test_operating_points_of_classes_are_checked_too(tmp_path: Path, weights: Weights, key: str, value: Any) -> None:
    changed = json.loads(json.dumps(weights[1]))
    changed["operating_point"]["classes"][1][key] = value
    write(tmp_path / "w", {"x": torch.zeros(1)}, changed)
    with refused("bad-header", tmp_path / "w", f"classes.1.{key}"):
        read_card(tmp_path / "w")


def test_files_of_earlier_versions_have_no_operating_point(tmp_path: Path, weights: Weights) -> None:
    values = {key: value for key, value in weights[1].items() if key != "operating_point"}
    assert read_card(write(tmp_path / "w", {"x": torch.zeros(1)}, values)).operating_point == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head_convs", 10**12),
        ("fpn_channels", 2**40),
        ("head_channels", 2**40),
        ("box_bins", 2**40),
        ("anchor_scales", [1.0] * 5000),
        ("levels", [3, 4, 5, 6]),
    ],
)
def test_sizes_are_compared_with_the_tensors_before_anything_is_built(
    tmp_path: Path, weights: Weights, key: str, value: Any
) -> None:
    tensors, values = weights
    changed = values | {"model": values["model"] | {key: value}}
    write(tmp_path / "w", tensors, changed)
    named = {"box_bins": "box_bins", "anchor_scales": "anchors"}.get(key, key)
    with refused("other-model", tmp_path / "w", named):
        Detector.load(tmp_path / "w", device="cpu")


class Deep(Stub):
    """A backbone of as many layers as it is told."""

    def __init__(self, last_level: int, depth: int = 0, table: int = 0) -> None:
        super().__init__(last_level)
        self.layers = nn.ModuleList(nn.Identity() for _ in range(depth))
        self.register_buffer("table", torch.zeros(table), persistent=False)


@pytest.mark.parametrize(
    ("backbone", "code", "named"),
    [
        ("timm:convnextv2_huge", "other-model", "backbone."),
        ({"_target_": f"{__name__}.Stub", "width": 2**40}, "other-model", "backbone.conv.weight"),
        ({"_target_": f"{__name__}.Stub", "width": -1}, "bad-header", ""),
        ({"_target_": f"{__name__}.Deep", "depth": 10**12}, "bad-header", "layers"),
        ({"_target_": f"{__name__}.Deep", "table": 2**40}, "bad-header", "buffers"),
    ],
)
def test_parts_of_other_packages_are_sized_up_without_memory(
    tmp_path: Path, backbone: Any, code: str, named: str
) -> None:
    if isinstance(backbone, str):
        pytest.importorskip("timm")
    tensors, values = make_weights({"_target_": f"{__name__}.Deep"})
    write(tmp_path / "w", tensors, values | {"model": values["model"] | {"backbone": backbone}})

    def task() -> None:
        torch.zeros(1)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), size + (1 << 30)))
        with refused(code, tmp_path / "w", named):
            Detector.load(tmp_path / "w", device="cpu", plugins=[__name__])

    assert in_child(task) == 0


@pytest.mark.parametrize("text", ['"step": NaN', '"step": Infinity', '"step": 1, "step": 1'])
def test_json_has_no_nan_and_each_key_once(tmp_path: Path, weights: Weights, text: str) -> None:
    header = json.dumps(weights[1]).replace('"step": 0', text)
    assert text in header
    write(tmp_path / "w", {"x": torch.zeros(1)}, header)
    with refused("unreadable-file", tmp_path / "w"):
        read_card(tmp_path / "w")
