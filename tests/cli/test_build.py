"""Values of a wrong type are told before they are used, by key."""

from typing import Any

import pytest

from faults import refused
from retina.cli.build import build, call
from retina.cli.compose import compose
from retina.cli.recipe import make_recipe
from retina.errors import ConfigError
from retina.model.retinanet import retinanet

LOSS = "retina.losses.classification."


@pytest.mark.parametrize(
    ("section", "key", "kind"),
    [
        ({"_target_": f"{LOSS}Focal", "gamma": "2"}, "gamma", "float"),
        ({"_target_": f"{LOSS}Focal", "alpha": ["a"]}, "alpha", "float or Sequence[float] or null"),
        ({"_target_": f"{LOSS}Varifocal", "alpha": [0.5]}, "alpha", "float"),
        ({"_target_": f"{LOSS}GHM", "num_bins": 2.5}, "num_bins", "int"),
        ({"_target_": f"{LOSS}OHEM", "one_to_three": 1}, "one_to_three", "bool"),
        ({"_target_": "retina.ops.assigners.ATSS", "topk": True}, "topk", "int"),
        ({"_target_": "retina.losses.boxes.smooth_l1", "_partial_": True, "beta": "x"}, "beta", "float"),
        (
            {"_target_": "retina.losses.detection.DetectionLoss", "box_loss": "giou"},
            "box_loss",
            "Callable[[Tensor, Tensor, Tensor], Tensor]",
        ),
    ],
)
def test_a_value_of_a_wrong_type_is_named(section: dict[str, Any], key: str, kind: str) -> None:
    with refused("wrong-type", f"loss.{key}: {section[key]!r} ", kind):
        build(section, "loss")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("fpn_channels", "many", "int"),
        ("mean", 3.0, "Sequence[float]"),
        ("anchor_sizes", [16, "x"], "Sequence[float] or null"),
    ],
)
def test_of_a_model_too(name: str, value: Any, kind: str) -> None:
    with refused("wrong-type", f"model.{name}: {value!r} ", kind):
        call(retinanet, "model", num_classes=3, **{name: value})


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("retina.data.augmentations.color_matrix", "no-transform"),
        ("retina.data.transforms.Transform", "no-transform"),
        ("retina.data.transforms.Sample", "no-transform"),
        ("retina.errors.DataError", None),
        ("albumentations.core.validation.ValidatedTransformMeta", None),
    ],
)
def test_what_is_no_transform_is_told_before_its_arguments_are(target: str, code: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"_target_": target, "message": "x"}, "augment.x")
    assert caught.value.key == "augment.x._target_"
    assert code is None or caught.value.code == code


def test_no_number_has_hundreds_of_digits() -> None:
    with refused("wrong-type", "optimizer.lr"):
        build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 10**400}, "optimizer")


@pytest.mark.parametrize("name", ["num_classes", "plugins"])
def test_what_the_data_and_the_command_decide_is_no_setting_of_the_model(name: str) -> None:
    settings = compose("train", ["data=coco", "data.root=x", f"+model.{name}=10"])
    with refused("not-a-setting", f"model.{name}"):
        make_recipe(settings)
