"""Values of a wrong type are told before they are used, by key."""

from typing import Any

import pytest

from retina.cli.build import build, call
from retina.errors import ConfigError
from retina.model.retinanet import retinanet

LOSS = "retina.losses.classification."


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"_target_": f"{LOSS}Focal", "gamma": "2"}, "loss.gamma: '2' is of the wrong type - give float"),
        (
            {"_target_": f"{LOSS}Focal", "alpha": ["a"]},
            "loss.alpha: ['a'] is of the wrong type - give float or Sequence[float] or null",
        ),
        ({"_target_": f"{LOSS}Varifocal", "alpha": [0.5]}, "loss.alpha: [0.5] is of the wrong type - give float"),
        ({"_target_": f"{LOSS}GHM", "num_bins": 2.5}, "loss.num_bins: 2.5 is of the wrong type - give int"),
        ({"_target_": f"{LOSS}OHEM", "one_to_three": 1}, "loss.one_to_three: 1 is of the wrong type - give bool"),
        ({"_target_": "retina.ops.assigners.ATSS", "topk": True}, "loss.topk: True is of the wrong type - give int"),
        (
            {"_target_": "retina.losses.boxes.smooth_l1", "_partial_": True, "beta": "x"},
            "loss.beta: 'x' is of the wrong type - give float",
        ),
        (
            {"_target_": "retina.losses.detection.DetectionLoss", "box_loss": "giou"},
            "loss.box_loss: 'giou' is of the wrong type - give Callable[[Tensor, Tensor, Tensor], Tensor]",
        ),
    ],
)
def test_a_value_of_a_wrong_type_is_named(section: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(section, "loss")
    assert str(error.value) == fault


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("fpn_channels", "many", "int"),
        ("mean", 3.0, "Sequence[float]"),
        ("anchor_sizes", [16, "x"], "Sequence[float] or null"),
    ],
)
def test_of_a_model_too(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        call(retinanet, "model", num_classes=3, **{name: value})
    assert str(error.value) == f"model.{name}: {value!r} is of the wrong type - give {wanted}"
