from collections.abc import Mapping, Sequence
from pathlib import Path
from re import Pattern
from typing import Any

import pytest

from faults import refused
from retina.cli.data import DataConfig, SplitConfig
from retina.engine import config
from retina.engine.config import TrainConfig, from_mapping, to_steps, unknown_key
from retina.errors import ConfigError
from retina.evaluation import metrics
from retina.schema import check_type
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
    ("values", "code", "named"),
    [
        ({"lenght": 3}, "unknown-key", ["train.lenght: ", "train.length?"]),
        ({"zzz": 3}, "unknown-key", ["train.zzz: ", "--cfg job"]),
        ({"batch_size": "many"}, "wrong-type", ["train.batch_size: 'many'", "give int"]),
        ({"batch_size": True}, "wrong-type", ["train.batch_size: True", "give int"]),
        ({"ema": "x"}, "wrong-type", ["train.ema: 'x'", "give float or null"]),
        ({"compile": 1}, "wrong-type", ["train.compile: 1", "give bool"]),
        ({"batch_size": 0}, "out-of-range", ["train.batch_size: 0", "1 or more"]),
        ({"best_metric": "mAP"}, "unknown-value", ["train.best_metric: 'mAP'", "AP, AP50"]),
        ({"precision": "fp8"}, "unknown-value", ["train.precision: 'fp8'", "fp32, tf32, bf16, fp16"]),
        ({"ema": 1.0}, "out-of-range", ["train.ema: 1.0", "[0, 1), or null"]),
        ({"seed": 2**32}, "out-of-range", ["train.seed: 4294967296", "2^32"]),
        ({"length": 0.5}, "out-of-range", ["train.length: 0.5"]),
        ({"length": "3 epochs"}, "out-of-range", ["train.length: '3 epochs'"]),
    ],
)
def test_a_wrong_setting_is_one_line(values: dict[str, object], code: str, named: list[str]) -> None:
    with refused(code, *named, kind=ConfigError):
        from_mapping(TrainConfig, values, "train")


def test_in_python_the_argument_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(batch_size=0)
    assert (caught.value.code, caught.value.key) == ("out-of-range", "batch_size")


def test_a_missing_key_is_named() -> None:
    with refused("missing-setting", "data.name: ", "data.name=", kind=ConfigError):
        from_mapping(DataConfig, {}, "data")


@pytest.mark.parametrize(
    ("values", "code", "named"),
    [
        ({"sampling": "rare"}, "unknown-value", ["data.sampling: 'rare'", "null, repeat_factor, class_balanced"]),
        ({"sampling": True}, "wrong-type", ["data.sampling: True", "give str or dict[str, Any] or null"]),
        ({"repeat_threshold": 0}, "out-of-range", ["data.repeat_threshold: 0.0", "a share of the images above 0"]),
        ({"repeat_threshold": 1.5}, "out-of-range", ["data.repeat_threshold: 1.5", "a share of the images above 0"]),
        ({"repeat_threshold": None}, "wrong-type", ["data.repeat_threshold: None", "give float"]),
        ({"canvases": [[32, 64], [32]]}, "out-of-range", ["data.canvases: [32]", "[height, width]"]),
        ({"canvases": [[10**9, 10**9]]}, "out-of-range", ["data.canvases: [1000000000"]),
        ({"long_side": 10**9}, "out-of-range", ["data.long_side: 1000000000"]),
        ({"pad_multiple": 10**9}, "out-of-range", ["data.pad_multiple: 1000000000"]),
        ({"short_side": 100, "long_side": 50}, "out-of-range", ["data.short_side: 100", "long_side"]),
    ],
)
def test_a_wrong_setting_of_the_data_is_one_line(values: dict[str, object], code: str, named: list[str]) -> None:
    with refused(code, *named, kind=ConfigError):
        from_mapping(DataConfig, {"name": "x", **values}, "data")


@pytest.mark.parametrize(
    ("value", "steps"), [(90, 90), (90.0, 90), ("2ep", 20), ("0.5ep", 5), (0.25, 250), ("0.001ep", 1), (0.0001, 1)]
)
def test_lengths(value: int | float | str, steps: int) -> None:
    assert to_steps(value, steps_per_epoch=10, total=1000, key="k") == steps


@pytest.mark.parametrize("value", [0, -1, -0.5, 1.5, "ep", "-1ep", "nanep", "infep", "12", float("nan"), float("inf")])
def test_lengths_that_mean_nothing(value: int | float | str) -> None:
    with refused("out-of-range", "k: ", kind=ConfigError):
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
    with refused("wrong-type", "key: ", repr(value), kind=ConfigError):
        check_type(value, hint, "key")
