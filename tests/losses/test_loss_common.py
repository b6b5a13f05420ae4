"""What is common is mostly tested where it is used: `test_focal`, `test_softmax_focal`."""

import pytest
import torch

from retina.losses.common import along_classes, at_least_float32, class_indices, element_targets, per_class


def test_only_narrow_dtypes_are_widened():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    widened = [at_least_float32(torch.zeros(1, dtype=dtype)).dtype for dtype in dtypes]
    assert widened == [torch.float32, torch.float32, torch.float32, torch.float64]


def test_where_nobody_looks_wrong_targets_give_nan(monkeypatch: pytest.MonkeyPatch):
    """A GPU would have to be waited for, and a compiler cannot branch on values."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    targets, _ = element_targets(torch.zeros(4), torch.tensor([0.0, 0.5, 1.5, -1.0]))
    assert targets.isnan().tolist() == [False, False, True, True]
    targets, counted = element_targets(torch.zeros(4), torch.tensor([0, 1, 2, -7]), -7)
    assert targets.isnan().tolist() == [False, False, True, False]
    assert counted.tolist() == [True, True, True, False]


def test_nothing_is_read_on_another_device_than_a_cpu():
    """Tensors of the meta device have no values: looking at one would raise."""
    logits = torch.zeros(2, 3, device="meta")
    element_targets(logits, torch.zeros(2, 3, device="meta"))
    index, counted = class_indices(logits, torch.zeros(2, dtype=torch.int64, device="meta"), -100)
    assert index.shape == counted.shape == (2, 1)
    assert per_class(torch.zeros(3, device="meta"), "weight").shape == (3,)


@pytest.mark.parametrize(("shape", "expected"), [((3,), (3,)), ((5, 3), (1, 3)), ((5, 3, 2, 2), (1, 3, 1, 1))])
def test_values_lie_along_the_class_axis(shape: tuple[int, ...], expected: tuple[int, ...]):
    values = along_classes(torch.ones(3), torch.zeros(*shape, dtype=torch.float64), "weight")
    assert values.shape == expected
    assert values.dtype == torch.float64


@pytest.mark.parametrize("values", [[], torch.ones(1, 1), [-1.0], [float("nan")], [float("inf")]])
def test_numbers_that_are_no_weights_are_refused(values):
    with pytest.raises(ValueError, match="weight must be"):
        per_class(values, "weight")


def test_a_single_logit_has_no_classes():
    with pytest.raises(ValueError, match="class axis"):
        along_classes(torch.ones(1), torch.tensor(0.0), "alpha")
    with pytest.raises(ValueError, match="targets must have the shape"):
        class_indices(torch.tensor(0.0), torch.zeros(1, dtype=torch.int64), -100)
