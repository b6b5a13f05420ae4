import pytest
import torch

from faults import refused
from retina.errors import ConfigError
from retina.interop.transfer import match_classes, merge_rows


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
