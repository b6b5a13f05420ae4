from pathlib import Path

import torch
from torch import Tensor

from interop.states import number_of, numbered, yhenon
from retina.interop.convert import Imported, convert_detector
from retina.interop.read import read_foreign
from retina.model.retinanet import retinanet


def imported(state: dict[str, Tensor], folder: Path) -> Imported:
    file = folder / "csv_retinanet_9.pt"
    torch.save(state, file)
    return convert_detector(read_foreign(file), file)


def test_every_tensor_finds_its_place(tmp_path: Path) -> None:
    state = yhenon()
    found = imported({f"module.{key}": value for key, value in state.items()}, tmp_path)
    expected = {
        "backbone.stem.conv1.weight": "conv1.weight",
        "backbone.layer4.1.bn2.running_var": "layer4.1.bn2.running_var",
        "fpn.lateral.0.weight": "fpn.P3_1.weight",
        "fpn.output.2.bias": "fpn.P5_2.bias",
        "fpn.extra.0.weight": "fpn.P6.weight",
        "fpn.extra.1.weight": "fpn.P7_2.weight",
        "head.classification.convs.0.weight": "classificationModel.conv1.weight",
        "head.box.convs.6.weight": "regressionModel.conv4.weight",
        "head.classification.predict.bias": "classificationModel.output.bias",
    }
    for ours, theirs in expected.items():
        assert found.state[ours].unique().tolist() == [number_of(theirs)], ours
    assert len(found.state) == sum(not key.endswith("num_batches_tracked") for key in state)
    assert found.card.model["norm"] == "frozen"
    assert found.card.category_ids[:2] == [1, 2]
    assert (found.card.preprocessing["short_side"], found.card.preprocessing["long_side"]) == (608, 1024)
    assert found.card.postprocess["max_detections"] == 1000


def test_deltas_are_scaled_in_the_layer_that_predicts_them(tmp_path: Path) -> None:
    state = yhenon(2)
    state["regressionModel.output.bias"] = numbered(state["regressionModel.output.bias"])
    state["regressionModel.output.weight"] = numbered(state["regressionModel.output.weight"])
    found = imported(state, tmp_path)
    std = torch.tensor([0.1, 0.1, 0.2, 0.2])
    bias = found.state["head.box.predict.bias"].view(9, 4)
    torch.testing.assert_close(bias, state["regressionModel.output.bias"].view(9, 4) * std)
    weight = found.state["head.box.predict.weight"].view(9, 4, -1)
    torch.testing.assert_close(weight, state["regressionModel.output.weight"].view(9, 4, -1) * std.view(4, 1))


def test_anchors_stand_in_the_middle_of_cells(tmp_path: Path) -> None:
    """Against its own formula: widths of all scales at the first ratio, then at the next, around (x + 1/2) x stride."""
    found = imported(yhenon(2), tmp_path)
    with torch.device("meta"):
        model = retinanet(**found.card.model)
    (level,) = model.anchors([(2, 3)] + [(1, 1)] * 4, model.strides, "cpu")[:1]
    expected = []
    for y in (4.0, 12.0):
        for x in (4.0, 12.0, 20.0):
            for ratio in (0.5, 1, 2):
                for scale in (1, 2 ** (1 / 3), 2 ** (2 / 3)):
                    width = ((32 * scale) ** 2 / ratio) ** 0.5
                    height = width * ratio
                    expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(level, torch.tensor(expected))
