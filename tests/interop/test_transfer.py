from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from faults import refused
from retina.errors import ConfigError
from retina.interop.transfer import match_classes, merge_rows, norms_of, other_settings
from retina.model.weights import DetectorCard, save_detector


def test_classes_are_matched_by_name() -> None:
    assert match_classes(["cat", "dog", "cow"], ["dog", "ant", "cat"], {}) == {2: 0, 0: 1}
    assert match_classes(["cat"], ["dog"], {}) == {}
    assert match_classes([], ["dog"], {}) == {}


def test_a_class_can_have_another_name_here() -> None:
    assert match_classes(["car", "bird"], ["vehicle", "bird"], {"car": "vehicle"}) == {0: 0, 1: 1}
    assert match_classes(["a", "b"], ["a", "b"], {"a": "b", "b": "a"}) == {1: 0, 0: 1}


@pytest.mark.parametrize(
    ("remap", "code", "named"),
    [
        ({"carr": "bike"}, "unknown-class", ["carr", "did you mean car?"]),
        ({"car": "plane"}, "unknown-class", ["plane", "bike, bird"]),
        ({"car": "bike", "van": "bike"}, "same-name", ["car", "van", "bike"]),
        ({"car": "bird"}, "same-name", ["car", "bird"]),
    ],
)
def test_a_remap_that_makes_no_sense_is_refused(remap: dict[str, str], code: str, named: list[str]) -> None:
    with refused(code, "remap", *named, kind=ConfigError):
        match_classes(["car", "van", "bird"], ["bike", "bird"], remap)


def test_rows_of_matched_classes_are_taken_for_every_anchor() -> None:
    own, other = torch.zeros(2 * 3, 4, 1, 1), torch.arange(2 * 2 * 4.0).view(4, 4, 1, 1)
    merged = merge_rows(own, other, {2: 0, 0: 1}, (3, 2))
    assert merged is not None
    expected = torch.stack([other[1], own[0], other[0], other[3], own[0], other[2]])
    assert torch.equal(merged, expected)
    assert own.eq(0).all()
    bias = merge_rows(torch.zeros(6), torch.arange(4.0), {2: 0, 0: 1}, (3, 2))
    assert bias is not None
    assert bias.tolist() == [1.0, 0.0, 0.0, 3.0, 0.0, 2.0]


def test_other_anchors_or_inputs_cannot_be_taken() -> None:
    assert merge_rows(torch.zeros(6, 4), torch.zeros(6, 4), {0: 0}, (3, 2)) is None
    assert merge_rows(torch.zeros(6, 4), torch.zeros(4, 5), {0: 0}, (3, 2)) is None


@pytest.mark.parametrize(
    ("there", "here", "is_told"),
    [("frozen", "batch", True), ("batch", "frozen", True), ("batch", "batch", False), ("frozen", "frozen", False)],
)
def test_norms_that_are_trained_from_now_on_or_no_longer_are_told(
    tmp_path: Path, there: str, here: str, is_told: bool
) -> None:
    """As `init_from` and as `model.weights`, whose default is to fix them."""
    card = DetectorCard(
        model={"norm": there}, classes=["a"], category_ids=[1], preprocessing={}, postprocess={}, environment={}
    )
    save_detector(tmp_path / "best.safetensors", {"x": torch.zeros(1)}, card)
    for lines in (
        other_settings({"norm": there}, {"norm": here}),
        norms_of(str(tmp_path / "best.safetensors"), {"norm": here}),
    ):
        assert [f"model.norm={there}" in line for line in lines] == [True] * is_told


def test_weights_without_a_detector_say_nothing_of_norms(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    for weights in (None, "DEFAULT", str(tmp_path / "bare.safetensors"), str(tmp_path / "lost.safetensors")):
        assert norms_of(weights, {"norm": "frozen"}) == []
