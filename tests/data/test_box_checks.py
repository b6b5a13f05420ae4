"""Boxes against their images: the gravest problem of each, and files in another convention as a whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina.data.checks import box_problems, convention_problem

Rows = list[list[float]]


def of(boxes: Rows, size: tuple[int, int] = (30, 40)) -> tuple[np.ndarray, np.ndarray]:
    return np.array(boxes, np.float64).reshape(-1, 4), np.tile(np.array(size, np.int64), (len(boxes), 1))


@pytest.mark.parametrize(
    ("box", "named", "is_fault"),
    [
        ([40, 0, 5, 5], "40x30", True),
        ([0, 30, 5, 5], "40x30", True),
        ([-5, 0, 5, 5], "40x30", True),
        ([41, 5, 0, 5], "40x30", True),
        ([-7, 5, 4, 0], "40x30", True),
        ([0, 0, 1e10, 5], "", True),
        ([0, 0, 1.7e308, 1.7e308], "", True),
        ([1.7e308, 0, 1.7e308, 5], "", True),
        ([-1.25, 0, 5, 5], "by 1.25 px", False),
        ([0, 0, 5, 32], "by 2 px", False),
        ([38, 0, 5, 0], "by 3 px", False),
        ([5, 5, 0, 5], "", False),
        ([40, 5, 0, 5], "", False),
        ([5, 5, 0.5, 5], "", False),
    ],
)
def test_odd_boxes(box: list[float], named: str, is_fault: bool) -> None:
    sound = [[1.0, 1, 2, 2]]
    (found,) = box_problems(*of([*sound, box, *sound]))
    assert (found.row, found.is_fault) == (1, is_fault)
    assert named in found.text
    assert " - " in found.text


@pytest.mark.parametrize("box", [[0, 0, 40, 30], [-1, -1, 42, 32], [39, 29, 1, 1], [0.5, 0.5, 1, 1]])
def test_sound_boxes(box: list[float]) -> None:
    assert list(box_problems(*of([box]))) == []


def test_no_boxes() -> None:
    assert list(box_problems(*of([]))) == []
    assert convention_problem(*of([])) is None


def test_each_box_is_judged_by_its_own_image() -> None:
    xywh = np.array([[0, 0, 50, 20], [0, 0, 50, 20]], np.float64)
    (found,) = box_problems(xywh, np.array([[20, 50], [50, 20]]))
    assert (found.row, "20x50 by 30 px" in found.text) == (1, True)


CORNERS = [[1.0, 2, 11, 10], [20, 10, 32, 25], [5, 15, 35, 27], [25, 3, 39, 29]]


def test_corners_are_recognised_over_the_file() -> None:
    assert "[x1, y1, x2, y2]" in (convention_problem(*of(CORNERS)) or "")
    assert convention_problem(*of(CORNERS[:2])) is None, "too few to judge"
    assert convention_problem(*of([*CORNERS, [30, 20, 5, 5]])) is None, "x2 < x1: they cannot be corners"
    large = [[1.0, 2, 20, 20]] * 8 + [[15.0, 10, 28, 22]] * 2
    assert convention_problem(*of(large)) is None, "they could be corners, but only a few leave their images"
    as_xywh = [[x, y, x2 - x, y2 - y] for x, y, x2, y2 in CORNERS]
    assert convention_problem(*of(as_xywh)) is None


def test_fractions_are_recognised_over_the_file() -> None:
    fractions = [[0.1, 0.2, 0.5, 0.25], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]]
    assert "fractions of the image" in (convention_problem(*of(fractions)) or "")
    assert convention_problem(*of(fractions[:2])) is None, "too few to judge"
    assert convention_problem(*of([*fractions, [3, 3, 5, 5]])) is None
    assert convention_problem(*of([[0, 0, 1, 1]] * 5)) is None, "single pixels"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.booleans())
def test_sound_files_are_never_taken_for_another_convention(seed: int, count: int, large: bool) -> None:
    """Whether boxes are small, as most, or nearly fill their images."""
    random = np.random.default_rng(seed)
    sizes = random.integers(20, 500, (count, 2))
    wh = sizes[:, ::-1] * (random.uniform(0.8, 1, (count, 2)) if large else random.uniform(0.05, 1, (count, 2)))
    xy = (sizes[:, ::-1] - wh) * random.uniform(0, 1, (count, 2))
    xywh = np.concatenate([xy, wh], axis=1)
    assert convention_problem(xywh, sizes) is None
    assert [found for found in box_problems(xywh, sizes) if found.is_fault] == []
