from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from faults import refused
from interop.states import mmdetection, numbered, write_detector, yhenon
from retina.errors import CheckpointError, ConfigError
from retina.inference import Detector
from retina.interop.convert import Imported, convert_backbone, convert_detector
from retina.interop.read import read_foreign


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return yhenon(3)


def imported(state: dict[str, Tensor], folder: Path, **options: object) -> Imported:
    file = folder / "theirs.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return convert_detector(read_foreign(file), file, **options)


def test_an_import_is_a_detector(state: dict[str, Tensor], tmp_path: Path) -> None:
    flat = {key: value if value.ndim < 4 else torch.zeros(value.shape) for key, value in state.items()}
    found = imported(flat, tmp_path, conventions={"short_side": 64, "long_side": 64})
    assert found.card.classes == ["class 0", "class 1", "class 2"]
    assert any("numbered" in note for note in found.notes)
    detector = Detector.load(write_detector(found, tmp_path / "ours.safetensors"))
    (detections,) = detector.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert len(detections.scores) > 0


def test_classes_are_those_given(state: dict[str, Tensor], tmp_path: Path) -> None:
    found = imported(state, tmp_path, classes=["ant", "bee", "cat"])
    assert (found.card.classes, found.card.category_ids) == (["ant", "bee", "cat"], [1, 2, 3])
    for classes in (["ant", "bee"], ["ant"] * 3, ["ant", "bee", "cat", "dog"]):
        with refused("classes", "classes", kind=ConfigError):
            imported(state, tmp_path, classes=classes)


def test_eighty_classes_are_coco_s(tmp_path: Path) -> None:
    found = imported(yhenon(80), tmp_path)
    assert found.card.classes[11] == "stop sign"
    assert found.card.category_ids[11] == 13


def test_missing_tensors_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    for key in ("fpn.P4_2.bias", "layer2.1.bn1.running_mean", "regressionModel.output.bias", "layer1.0.conv2.weight"):
        with refused("missing-tensor", "theirs.safetensors", kind=CheckpointError):
            imported({name: value for name, value in state.items() if name != key}, tmp_path)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("fpn.P4_1.weight", (8, 255, 1, 1)),
        ("fpn.P3_1.weight", (8,)),
        ("layer1.0.conv2.weight", (64, 63, 3, 3)),
        ("layer1.0.conv2.weight", ()),
        ("conv1.weight", (64, 4, 7, 7)),
        ("regressionModel.output.weight", (35, 8, 3, 3)),
        ("regressionModel.output.bias", (0,)),
        ("classificationModel.output.bias", (28,)),
        ("classificationModel.output.weight", (0, 8, 3, 3)),
        ("classificationModel.conv2.weight", (8, 8, 1, 1)),
    ],
)
def test_other_shapes_are_one_line(state: dict[str, Tensor], tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=r"^[^\n]*theirs\.safetensors: [^\n]* - [^\n]*$"):
        imported(state | {key: torch.zeros(shape)}, tmp_path)


def test_unknown_tensors_are_refused_or_listed(state: dict[str, Tensor], tmp_path: Path) -> None:
    more = state | {"mask_head.weight": torch.zeros(1), "classificationModel.conv5.weight": torch.zeros(8, 8, 3, 3)}
    with refused("unknown-tensor", "mask_head.weight", "classificationModel.conv5.weight", kind=CheckpointError):
        imported(more, tmp_path)
    more |= {f"mask_head.{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(CheckpointError) as caught:
        imported(more, tmp_path)
    assert "mask_head.19" not in str(caught.value)
    assert "mask_head.19" in caught.value.__notes__[0]
    with refused("missing-tensor", "backbone.stem.bn1.bias", 22, kind=CheckpointError):
        imported({key: value for key, value in more.items() if key != "bn1.bias"}, tmp_path)
    found = imported(state | {"mask_head.weight": torch.zeros(1)}, tmp_path, ignore_unknown=True)
    assert "left out, unknown here: mask_head.weight" in found.notes


def test_conventions_can_be_given(state: dict[str, Tensor], tmp_path: Path) -> None:
    state = state | {"conv1.weight": numbered(torch.empty(64, 3, 7, 7))}
    usual = imported(state, tmp_path)
    given = {"bgr": True, "std": [1, 1, 1], "norm_eps": 0, "anchor_offset": None, "delta_std": [1, 1, 1, 1]}
    found = imported(state, tmp_path, conventions=given)
    assert torch.equal(found.state["backbone.stem.conv1.weight"], usual.state["backbone.stem.conv1.weight"].flip(1))
    assert (found.card.model["std"], found.card.model["norm_eps"], found.card.model["anchor_offset"]) == (
        [1.0, 1.0, 1.0],
        0.0,
        0.5,
    )
    layer = "head.box.predict.weight"
    torch.testing.assert_close(found.state[layer].view(9, 4, -1)[:, 0] * 0.1, usual.state[layer].view(9, 4, -1)[:, 0])


def test_other_anchors_must_be_given(state: dict[str, Tensor], tmp_path: Path) -> None:
    with refused("anchors", "conventions.anchor_scales", kind=ConfigError):
        imported(state, tmp_path, conventions={"anchor_scales": [1.0]})


def test_p6_of_p5_and_other_levels_are_seen_in_the_shapes(tmp_path: Path) -> None:
    state = mmdetection(2)
    state["neck.fpn_convs.3.conv.weight"] = torch.zeros(8, 8, 3, 3)
    assert imported(state, tmp_path).card.model["p6_from"] == "p5"
    short = {key: value for key, value in state.items() if not key.startswith(("neck.fpn_convs.3", "neck.fpn_convs.4"))}
    assert imported(short, tmp_path).card.model["levels"] == [3, 4, 5]


def test_a_backbone_must_be_whole(tmp_path: Path) -> None:
    backbone = {
        key: value.contiguous() for key, value in yhenon(1).items() if key.startswith(("conv1", "bn1", "layer"))
    }
    file = tmp_path / "r18.safetensors"
    save_file(backbone, file)
    assert convert_backbone(read_foreign(file), file)[1] == {"backbone": "resnet18"}
    save_file(backbone | {"layer1.0.se.weight": torch.zeros(1)}, file)
    with refused("unknown-tensor", "layer1.0.se.weight", kind=CheckpointError):
        convert_backbone(read_foreign(file), file)
    backbone.pop("layer3.1.bn2.weight")
    save_file(backbone, file)
    with refused("missing-tensor", "backbone.layer3.1.bn2.weight", kind=CheckpointError):
        convert_backbone(read_foreign(file), file)
