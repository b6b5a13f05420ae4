"""Choices follow from facts, and what is given wins. The facts are made up; no data is read."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from faults import refused
from retina.cli.compose import compose
from retina.engine.plan import Facts, plan, plan_pixels, steps_in, to_seconds, with_values

NONE = frozenset[str]()


def facts(*, size: tuple[int, int] = (480, 640), side: float = 60.0, images: int = 200, **changes: Any) -> Facts:
    """Three square objects of about one size in each image."""
    objects = np.full((3 * images, 2), side)
    image_of = np.repeat(np.arange(images), 3)
    sizes = np.tile(np.array(size), (images, 1))
    base = Facts(image_sizes=sizes, objects=objects, image_of=image_of, shares=np.array([1.0, 0.9]), pretrained=False)
    return replace(base, **changes)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return compose("train", ["data=coco", "data.root=x"])


def chosen(facts: Facts, settings: dict[str, Any], *typed: str) -> dict[str, Any]:
    return {choice.key: choice.value for choice in plan(facts, settings, frozenset(typed))}


@pytest.mark.parametrize(
    ("side", "device", "short"),
    [(60.0, "cpu", 256), (40.0, "cpu", 384), (20.0, "cpu", 512), (20.0, "cuda", 768), (400.0, "cpu", 256)],
)
def test_small_objects_want_large_images(settings: dict[str, Any], side: float, device: str, short: int) -> None:
    values = chosen(facts(side=side, device=device), settings)
    assert values["data.short_side"] == short
    assert values["data.long_side"] == pytest.approx(short * 4 / 3, abs=16)


def test_levels_span_the_objects(settings: dict[str, Any]) -> None:
    assert chosen(facts(side=60.0), settings)["model.levels"] == [3, 4, 5]
    assert chosen(facts(side=6.0), settings)["model.levels"][0] == 2
    assert chosen(facts(size=(800, 1200), side=700.0, device="cuda"), settings)["model.levels"][0] == 3
    large = facts(size=(1000, 1000), device="cuda")
    large.objects[::2] = 980.0
    large.objects[1::2] = 20.0
    assert chosen(large, settings)["model.levels"] == [3, 4, 5, 6, 7]


def test_anchors_stay_and_the_table_says_why(settings: dict[str, Any]) -> None:
    for ratios in ([1.0], [0.5, 1.0, 2.0]):
        values = {
            choice.key: choice for choice in plan(facts(), with_values(settings, {"model.anchor_ratios": ratios}), NONE)
        }
        assert values["model.anchor_ratios"].value == ratios
        assert values["model.anchor_ratios"].reason


def test_the_rate_depends_on_the_start(settings: dict[str, Any]) -> None:
    scratch, tuned = (chosen(facts(pretrained=one), settings) for one in (False, True))
    assert scratch["optimizer.lr"] == 1e-3
    many = chosen(facts(pretrained=True, images=5000), settings)
    assert many["optimizer.lr"] < 2e-4 < tuned["optimizer.lr"] < 4e-4
    assert scratch["train.lr_batch_size"] == scratch["train.batch_size"] == 8
    wide = with_values(settings, {"train.batch_size": 32})
    assert chosen(facts(), wide, "train.batch_size")["optimizer.lr"] == 2e-3, "it follows what is given"


def test_what_is_given_is_not_chosen(settings: dict[str, Any]) -> None:
    free = chosen(facts(), settings)
    for typed, blocked in [
        ("data.short_side", ["data.short_side"]),
        ("schedule.warmup", ["schedule"]),
        ("optimizer", ["optimizer.lr"]),
        ("model", [key for key in free if key.startswith("model.")]),
        ("augment.blur._target_", ["augment"]),
        ("train", [key for key in free if key.startswith("train.")]),
    ]:
        assert set(blocked) <= free.keys()
        assert free.keys() - chosen(facts(), settings, typed).keys() == set(blocked), typed


def test_a_model_stays_as_the_weights_of_init_from_want_it(settings: dict[str, Any]) -> None:
    values = chosen(facts(pretrained=True), settings | {"init_from": "runs/other"})
    assert not [key for key in values if key.startswith("model.")]
    file = with_values(settings, {"model.weights": "mine.safetensors"})
    assert "model.backbone" not in chosen(facts(pretrained=True), file, "model.weights")


def test_a_cpu_gets_a_light_network(settings: dict[str, Any]) -> None:
    scratch, tuned = (chosen(facts(pretrained=one), settings) for one in (False, True))
    assert (scratch["model.backbone"], scratch["model.fpn_channels"]) == ("resnet18_half", 64)
    assert (tuned["model.backbone"], tuned["model.fpn_channels"]) == ("resnet18", 128), "a half has no weights"
    assert chosen(facts(device="cuda"), settings)["model.backbone"] == "resnet18"


def test_precision_is_what_the_device_has(settings: dict[str, Any]) -> None:
    assert chosen(facts(bf16=True), settings)["train.precision"] == "bf16"
    assert chosen(facts(bf16=False), settings)["train.precision"] == "fp32"


def test_rare_classes_are_repeated(settings: dict[str, Any]) -> None:
    assert "data.sampling" not in chosen(facts(), settings)
    values = chosen(facts(shares=np.array([0.9, 0.01])), settings)
    assert (values["data.sampling"], values["data.repeat_threshold"]) == ("repeat_factor", 0.1)


def test_a_short_budget_makes_images_smaller_and_a_long_one_does_not(settings: dict[str, Any]) -> None:
    """At this speed 100 s hold 2 epochs of 384 x 512, 10000 s hold 250."""
    speed = 200 * 384 * 512 / 50
    sides = [
        chosen(facts(side=40.0, seconds=s, pixels_per_second=speed), settings)["data.short_side"] for s in (1e2, 1e4)
    ]
    assert sides[0] < 384
    assert sides[1] == 384
    assert "train.length" not in chosen(facts(seconds=1e4), settings), "it is decided when the speed is known"


def test_few_epochs_leave_the_colours_alone(settings: dict[str, Any]) -> None:
    assert "color" in chosen(facts(), settings)["augment"]
    many = facts(images=2000, pretrained=True)
    assert list(chosen(many, settings)["augment"]) == ["flip", "resize"]


def test_images_that_are_not_rgb_have_their_own_mean_and_no_colours(settings: dict[str, Any]) -> None:
    measured = ([1.0] * 5, [2.0] * 5)
    for changes in ({}, {"pretrained": True}):
        five = facts(channels=5, mean_std=measured, **changes)
        assert "color" not in chosen(five, settings)["augment"]
        for typed in (settings, settings | {"init_from": "runs/other"}):
            values = chosen(five, typed)
            assert (values["model.mean"], values["model.std"]) == measured
        assert "model.mean" not in chosen(five, settings, "model.mean"), "what is given wins"
        assert [choice.key for choice in plan_pixels(five, settings, NONE)] == ["model.mean", "model.std"]
    assert plan_pixels(facts(), settings, NONE) == []


def test_steps_fill_the_budget_and_end_with_an_evaluation() -> None:
    steps = steps_in(1000.0, step=1.0, evaluation=20.0, evaluations=5)
    assert steps == 880
    with refused("out-of-range", "budget"):
        steps_in(20.0, step=1.0, evaluation=5.0, evaluations=3)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5h", 5400), ("1h30min", 5400), (60, 60), (None, None)]
)
def test_budgets_are_times(text: Any, seconds: float | None) -> None:
    assert to_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "30", "0s", -1, 0, True, "30 min x"])
def test_a_budget_that_is_no_time_is_refused(text: Any) -> None:
    with refused("out-of-range", "budget"):
        to_seconds(text)
