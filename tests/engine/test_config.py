from collections.abc import Mapping, Sequence
from pathlib import Path
from re import Pattern
from typing import Any

import pytest

from retina.engine import config
from retina.engine.config import DataConfig, SplitConfig, TrainConfig, check_type, from_mapping, to_steps, unknown_key
from retina.errors import ConfigError
from retina.evaluation import metrics
from retina.types import DTYPES


def test_defaults_and_given_values() -> None:
    config = from_mapping(TrainConfig, {"batch_size": 8, "clip_norm": 1, "length": "3ep"}, "train")
    assert config == TrainConfig(batch_size=8, clip_norm=1.0, length="3ep")
    assert isinstance(config.clip_norm, float)


def test_names_that_settings_know_without_torch_are_those_of_the_library() -> None:
    assert tuple(DTYPES) == config.PRECISIONS
    assert tuple(metrics.METRICS) == config.METRICS


def test_nested_sections() -> None:
    data = from_mapping(DataConfig, {"name": "x", "val": {"images": "v"}, "prepare": {"_target_": "f"}}, "data")
    assert data.val == SplitConfig(images="v")
    assert data.train == SplitConfig()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"lenght": 3}, "train.lenght: no such key - did you mean train.length?"),
        ({"zzz": 3}, "train.zzz: no such key - --cfg job prints the keys there are"),
        ({"batch_size": "many"}, "train.batch_size: 'many' is of the wrong type - give int"),
        ({"batch_size": True}, "train.batch_size: True is of the wrong type - give int"),
        ({"ema": "x"}, "train.ema: 'x' is of the wrong type - give float or null"),
        ({"compile": 1}, "train.compile: 1 is of the wrong type - give bool"),
        ({"batch_size": 0}, "train.batch_size: 0 is not allowed - give 1 or more"),
        ({"best_metric": "mAP"}, "train.best_metric: 'mAP' is not allowed - choose AP, AP50"),
        ({"precision": "fp8"}, "train.precision: 'fp8' is not allowed - choose fp32, bf16, fp16"),
        ({"ema": 1.0}, "train.ema: 1.0 is not allowed - give a decay in [0, 1), or null"),
        ({"length": 0.5}, "train.length: 0.5 is not allowed"),
        ({"length": "3 epochs"}, "train.length: '3 epochs' is not allowed"),
    ],
)
def test_a_wrong_setting_is_one_line(values: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(TrainConfig, values, "train")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.name: missing - give data\.name="):
        from_mapping(DataConfig, {}, "data")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"sampling": "rare"},
            "data.sampling: 'rare' is not allowed - choose repeat_factor or class_balanced, or null",
        ),
        ({"sampling": True}, "data.sampling: True is of the wrong type - give str or dict[str, Any] or null"),
        ({"repeat_threshold": 0}, "data.repeat_threshold: 0.0 is not allowed - give a share of the images above 0"),
        ({"repeat_threshold": 1.5}, "data.repeat_threshold: 1.5 is not allowed - give a share of the images above 0"),
        ({"repeat_threshold": None}, "data.repeat_threshold: None is of the wrong type - give float"),
    ],
)
def test_a_wrong_sampling_is_one_line(values: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(DataConfig, {"name": "x", **values}, "data")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_sides_must_fit() -> None:
    with pytest.raises(ConfigError, match="short_side"):
        DataConfig(name="x", short_side=100, long_side=50)


@pytest.mark.parametrize(
    ("value", "steps"), [(90, 90), (90.0, 90), ("2ep", 20), ("0.5ep", 5), (0.25, 250), ("0.001ep", 1), (0.0001, 1)]
)
def test_lengths(value: int | float | str, steps: int) -> None:
    assert to_steps(value, steps_per_epoch=10, total=1000, key="k") == steps


@pytest.mark.parametrize("value", [0, -1, -0.5, 1.5, "ep", "-1ep", "nanep", "infep", "12", float("nan"), float("inf")])
def test_lengths_that_mean_nothing(value: int | float | str) -> None:
    with pytest.raises(ConfigError, match=r"^k: "):
        to_steps(value, steps_per_epoch=10, total=1000, key="k")


def test_nearest_key_by_whole_name_then_by_last_part() -> None:
    known = ["optimizer.lr", "train.length", "data.root"]
    assert unknown_key("optimzer.lr", known).endswith("did you mean optimizer.lr?")
    assert unknown_key("root", known).endswith("did you mean data.root?")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (2, float),
        (None, float | None),
        ([0, 0.5, 1], Sequence[float]),
        ((3, 4), Sequence[int]),
        ({"a": 1}, dict[str, int]),
        ({"a": 1}, Mapping[str, Any]),
        ("a", Any),
        ("a", Path),
    ],
)
def test_what_yaml_may_write_for_it(value: Any, hint: Any) -> None:
    check_type(value, hint, "key")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (["a"], Sequence[float]),
        ("ab", Sequence[str]),
        ([True], list[int]),
        ({"a": "b"}, dict[str, list[str]]),
        ({1: ["b"]}, dict[str, list[str]]),
        ([("a", 1)], Mapping[str, int]),
        ("a", Pattern[str]),
    ],
)
def test_values_of_a_wrong_type(value: Any, hint: Any) -> None:
    with pytest.raises(ConfigError, match=r"^key: .* is of the wrong type - give "):
        check_type(value, hint, "key")
