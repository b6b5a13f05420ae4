import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from faults import refused
from interop.states import CHANNELS, detectron2, number_of
from retina.errors import ConfigError
from retina.interop.convert import Imported, convert_detector
from retina.interop.read import read_foreign
from retina.model.retinanet import retinanet
from retina.ops.boxes import decode

SCALES, RATIOS = [2 ** (i / 3) for i in range(3)], [0.5, 1.0, 2.0]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return detectron2(num_classes=3)


def imported(state: dict[str, Tensor], folder: Path, **options: object) -> Imported:
    file = folder / "model_final.pth"
    torch.save({"model": state, "iteration": 89999}, file)
    return convert_detector(read_foreign(file), file, classes=["a", "b", "c"], **options)


def cells(size: float) -> Tensor:
    """The anchors of a cell as detectron2 lists them: every ratio of the first size, then of the next."""
    boxes = []
    for scale in SCALES:
        for ratio in RATIOS:
            width = math.sqrt((size * scale) ** 2 / ratio)
            height = ratio * width
            boxes.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(boxes)


def test_every_tensor_finds_its_place(state: dict[str, Tensor], tmp_path: Path) -> None:
    found = imported(state, tmp_path).state
    expected = {
        "backbone.stem.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
        "backbone.stem.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
        "backbone.layer1.0.downsample.0.weight": "backbone.bottom_up.res2.0.shortcut.weight",
        "backbone.layer1.0.downsample.1.bias": "backbone.bottom_up.res2.0.shortcut.norm.bias",
        "backbone.layer3.5.conv2.weight": "backbone.bottom_up.res4.5.conv2.weight",
        "backbone.layer4.2.bn3.running_mean": "backbone.bottom_up.res5.2.conv3.norm.running_mean",
        "fpn.lateral.0.weight": "backbone.fpn_lateral3.weight",
        "fpn.output.2.bias": "backbone.fpn_output5.bias",
        "fpn.extra.0.weight": "backbone.top_block.p6.weight",
        "fpn.extra.1.weight": "backbone.top_block.p7.weight",
        "head.classification.convs.2.weight": "head.cls_subnet.2.weight",
        "head.box.convs.0.bias": "head.bbox_subnet.0.bias",
        "head.classification.predict.weight": "head.cls_score.weight",
        "head.box.predict.bias": "head.bbox_pred.bias",
    }
    for ours, theirs in expected.items():
        assert found[ours].unique().tolist() == [number_of(theirs)], ours
    assert len(found) == len(state)
    assert {value.unique().item() for value in found.values()} <= {number_of(key) for key in state}


def test_each_anchor_keeps_what_was_predicted_for_it(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Boxes and class logits of one cell, with detectron2's order of anchors and with ours."""
    generator = torch.Generator().manual_seed(0)
    state = dict(state)
    for layer, rows in (("cls_score", 27), ("bbox_pred", 36)):
        state[f"head.{layer}.weight"] = torch.randn(rows, CHANNELS, 3, 3, generator=generator)
        state[f"head.{layer}.bias"] = torch.randn(rows, generator=generator)
    converted = imported(state, tmp_path)
    x = torch.randn(1, CHANNELS, 3, 3, generator=generator)

    def predict(weights: dict[str, Tensor], layer: str, width: int) -> Tensor:
        return F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"]).view(9, width)

    theirs = decode(predict(state, "head.bbox_pred", 4), cells(32)), predict(state, "head.cls_score", 3)
    with torch.device("meta"):
        model = retinanet(**converted.card.model)
    deltas = predict(converted.state, "head.box.predict", 4)
    ours = decode(deltas, model.anchors.cell(32.0).float()), predict(converted.state, "head.classification.predict", 3)
    order = [scale * 3 + ratio for ratio in range(3) for scale in range(3)]
    torch.testing.assert_close(ours[0], theirs[0][order])
    torch.testing.assert_close(ours[1], theirs[1][order])


def test_the_first_convolution_sees_the_same_image(state: dict[str, Tensor], tmp_path: Path) -> None:
    state = dict(state)
    state["backbone.bottom_up.stem.conv1.weight"] = torch.randn(64, 3, 7, 7)
    converted = imported(state, tmp_path)
    assert converted.card.model["std"] == [1.0, 1.0, 1.0]
    rgb = torch.randint(0, 256, (1, 3, 9, 9)).float()
    theirs = rgb.flip(1) - torch.tensor([103.53, 116.28, 123.675]).view(1, 3, 1, 1)
    mean, std = (torch.tensor(converted.card.model[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    ours = F.conv2d((rgb - mean) / std, converted.state["backbone.stem.conv1.weight"])
    expected = F.conv2d(theirs, state["backbone.bottom_up.stem.conv1.weight"])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-2)


def test_conventions_go_into_the_settings(state: dict[str, Tensor], tmp_path: Path) -> None:
    converted = imported(state, tmp_path)
    told = {"stride_in_1x1": True, "norm": "frozen", "p6_from": "c5", "head_convs": 2, "backbone": "resnet50"}
    told |= {"anchors_rounded": False, "anchor_offset": 0.0, "norm_eps": 1e-5, "p7_relu": True, "head_norm": None}
    assert {key: converted.card.model[key] for key in told} == told
    assert converted.card.postprocess["max_detections"] == 100
    assert any("holds no pixel_mean" in note for note in converted.notes)


@pytest.mark.parametrize(("mean", "std", "bgr", "stride"), [
    ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0], True, True),
    ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395], True, False),
    ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], False, False),
])  # fmt: skip
def test_the_colours_it_was_trained_on_are_read_from_the_file(
    state: dict[str, Tensor], tmp_path: Path, mean: list[float], std: list[float], bgr: bool, stride: bool
) -> None:
    more = {"pixel_mean": torch.tensor(mean).view(3, 1, 1), "pixel_std": torch.tensor(std).view(3, 1, 1)}
    converted = imported(state | more, tmp_path)
    assert converted.card.model["mean"] == [123.675, 116.28, 103.53]
    assert converted.card.model["std"] == ([58.395, 57.12, 57.375] if std[0] > 1 else [1.0, 1.0, 1.0])
    assert converted.card.model["stride_in_1x1"] is stride
    assert any(("BGR" if bgr else "says RGB") in note for note in converted.notes)
    assert any(note.startswith("left out, went into the settings of the model: pixel_mean") for note in converted.notes)


def test_anchors_in_the_file_are_checked(state: dict[str, Tensor], tmp_path: Path) -> None:
    anchors = {f"anchor_generator.cell_anchors.{i}": cells(32 * 2**i) for i in range(5)}
    imported(state | anchors, tmp_path)
    anchors["anchor_generator.cell_anchors.4"] = cells(500)
    with refused("anchors", "conventions.anchor_sizes", kind=ConfigError):
        imported(state | anchors, tmp_path)
    sizes = {"anchor_sizes": [32, 64, 128, 256, 500]}
    assert imported(state | anchors, tmp_path, conventions=sizes).card.model["anchor_sizes"] == sizes["anchor_sizes"]


def test_biases_before_groupnorm_stay_unless_they_are_zero(state: dict[str, Tensor], tmp_path: Path) -> None:
    state = dict(state)
    for tower in ("cls", "bbox"):
        second = {part: state.pop(f"head.{tower}_subnet.2.{part}") for part in ("weight", "bias")}
        for i in (0, 3):
            state |= {f"head.{tower}_subnet.{i}.{part}": value for part, value in second.items()}
            state[f"head.{tower}_subnet.{i}.bias"] = torch.zeros(CHANNELS)
            state |= {f"head.{tower}_subnet.{i + 1}.{part}": torch.rand(CHANNELS) for part in ("weight", "bias")}
    found = imported(state, tmp_path)
    assert (found.card.model["head_norm"], found.card.model["head_convs"]) == ("group", 2)
    assert torch.equal(found.state["head.box.convs.4.bias"], state["head.bbox_subnet.4.bias"])
    assert any(note.startswith("left out, a bias of 0 before a norm: head.cls_subnet.0.bias") for note in found.notes)
    state["head.bbox_subnet.3.bias"] = torch.full((CHANNELS,), 0.1)
    found = imported(state, tmp_path)
    assert (found.card.model["head_norm"], found.card.model["head_convs"]) == ("group_bias", 2)
    model = retinanet(**found.card.model)
    model.load_state_dict(found.state)
    assert (model.head.box.convs[3].bias == 0.1).all()
    assert (model.head.classification.convs[0].bias == 0).all()


def test_basic_blocks_have_no_1x1_to_stride_in(tmp_path: Path) -> None:
    state = detectron2(num_classes=3, backbone="resnet18")
    assert imported(state, tmp_path).card.model["stride_in_1x1"] is False
    with pytest.raises(ConfigError, match="no bottlenecks"):
        imported(state, tmp_path, conventions={"stride_in_1x1": True})


def test_the_model_zoo_s_pickle_is_read_as_the_same(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "model_final_bfca0b.pkl"
    arrays = {key: value.half().numpy() for key, value in state.items()}
    file.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=2))
    from_pickle = convert_detector(read_foreign(file), file, classes=["a", "b", "c"])
    from_torch = imported(state, tmp_path)
    assert from_pickle.card.model == from_torch.card.model
    for key, value in from_torch.state.items():
        assert torch.equal(from_pickle.state[key], value)
        assert from_pickle.state[key].dtype == torch.float32
