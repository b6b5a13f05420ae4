from pathlib import Path

import numpy as np
import pytest

from faults import refused
from retina.errors import CheckpointError
from retina.export.description import check_description
from retina.export.proof import Differences, Tolerance, at_edge, batches, choose, compare, overlap, pack

SETTINGS = {
    "raw": False,
    "channels": 3,
    "classes": ["a", "b"],
    "thresholds": [0.0, 0.4],
    "score_threshold": 0.05,
    "nms_iou": 0.5,
    "max_detections": 3,
    "class_agnostic": False,
}
TOLERANCE = Tolerance(0.5, 0.01)
ROWS = np.array([[10, 10, 50, 50, 0.9, 0], [60, 10, 90, 50, 0.8, 1]], dtype=np.float64)


def differences(expected: np.ndarray, found: np.ndarray) -> Differences:
    result = Differences()
    compare("a.jpg", expected, found, result, TOLERANCE, SETTINGS)
    return result


def test_small_differences_are_measured() -> None:
    found = ROWS[::-1].copy()  # the order of equal scores may differ
    found[0, 2] += 0.25
    found[1, 4] -= 0.005
    result = differences(ROWS, found)
    assert (result.matched, result.edges, result.faults) == (2, 0, [])
    assert result.pixels == pytest.approx(0.25)
    assert result.score == pytest.approx(0.005)


@pytest.mark.parametrize("change", [(0, 1.0), (4, -0.05), (5, 1)])
def test_a_detection_that_moved_is_told_twice(change: tuple[int, float]) -> None:
    column, step = change
    found = ROWS.copy()
    found[0, column] += step
    result = differences(ROWS, found)
    assert result.matched == 1
    assert len(result.faults) == 2
    assert all("a.jpg" in line for line in result.faults)


def test_a_detection_answers_for_one_only() -> None:
    twice = np.concatenate([ROWS[:1], ROWS[:1]])
    assert len(differences(twice, ROWS[:1]).faults) == 1
    assert len(differences(ROWS[:1], twice).faults) == 1


def test_some_may_be_without_a_match_where_the_tolerance_says_so() -> None:
    result = differences(ROWS, ROWS[:1])
    assert result.refuses(TOLERANCE)
    assert result.refuses(TOLERANCE._replace(unmatched=0.49))
    assert not result.refuses(TOLERANCE._replace(unmatched=0.5))
    assert not differences(ROWS, ROWS).refuses(TOLERANCE)


@pytest.mark.parametrize(
    ("row", "table"),
    [
        ([0, 0, 9, 9, 0.055, 0], []),  # the threshold of all
        ([0, 0, 9, 9, 0.395, 1], []),  # that of its class
        ([0, 0, 9, 9, 0.3, 0], [[1, 1, 5, 5, 0.5, 0], [2, 2, 5, 5, 0.4, 0], [3, 3, 5, 5, 0.305, 1]]),  # the last place
        ([0, 0, 20, 10, 0.3, 0], [[0, 0, 10, 10, 0.5, 0]]),  # overlaps by a half
    ],
)
def test_what_rounding_decides_is_excused(row: list[float], table: list[list[float]]) -> None:
    others = np.array(table).reshape(-1, 6)
    lone = np.array([row])
    assert at_edge(lone[0], np.concatenate([others, lone]), (others, others), TOLERANCE, SETTINGS)
    far = lone[0] + [0, 0, 500, 500, 0.2, 0]
    assert not at_edge(far, np.concatenate([others, far[None]]), (others, others), TOLERANCE, SETTINGS)


def test_images_of_several_sizes_share_a_canvas() -> None:
    one, other = np.full((2, 5, 3), 7, np.uint8), np.full((4, 3, 3), 9, np.uint8)
    packed = pack([one, other])
    assert packed["images"].shape == (2, 4, 5, 3)
    assert packed["sizes"].tolist() == [[2, 5], [4, 3]]
    assert (packed["images"][0, :2, :5] == 7).all()
    assert packed["images"].sum() == one.sum() + other.sum()


def test_every_image_is_looked_at_alone_and_in_company() -> None:
    for count in (1, 2, 7, 12):
        groups = batches(count)
        assert [group for group in groups if len(group) == 1] == [[number] for number in range(count)]
        together = [number for group in groups if len(group) > 1 for number in group]
        assert len(together) >= count - 1
        assert together == sorted(set(together))


def test_the_best_of_overlapping_boxes_stays() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    scores = np.array([[0.5, 0.0], [0.6, 0.0], [0.0, 0.45], [0.02, 0.3]], np.float32)
    table = choose(boxes, scores, SETTINGS)
    assert table[:, 4:].round(2).tolist() == [[0.6, 0], [0.45, 1]]  # 0.3 is below the threshold of its class
    (only,) = choose(boxes[:3], scores[:3], SETTINGS | {"class_agnostic": True})
    assert only[4] == pytest.approx(0.6)


def test_overlap_is_that_of_the_areas() -> None:
    boxes = np.array([[0, 0, 4, 4], [2, 0, 6, 4], [9, 9, 9, 9]], dtype=np.float64)
    np.testing.assert_allclose(overlap(boxes, boxes), [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]])


def description() -> dict[str, object]:
    header = {"schema_version": 1, "format": "onnx", "category_ids": [1, 2], "candidates_per_level": 9}
    return SETTINGS | header | {"preprocessing": {}, "precision": "fp32", "proof": proof()}


def proof(**changes: object) -> dict[str, object]:
    image = {"name": "a.jpg", "sha256": "0", "size": [4, 5], "detections": [[0.0, 0.0, 1.0, 1.0, 0.5, 1.0]]}
    return {"folder": "photos", "tolerance": {"pixels": 1.0, "score": 0.1}, "images": [image | changes]}


BROKEN = {
    "classes": ("wrong-type", "classes", [1]),
    "version": ("other-version", "schema_version", 2),
    "thresholds": ("bad-header", "thresholds", [0.1]),
    "no proof": ("bad-header", "proof", {}),
    "no images": ("bad-header", "proof", proof() | {"images": []}),
    "label": ("bad-header", "proof", proof(detections=[[0.0, 0.0, 1.0, 1.0, 0.5, 2.0]])),
    "tolerance": ("bad-header", "proof", proof() | {"tolerance": {"pixels": 1.0, "score": 0.1, "luck": 1.0}}),
    "more": ("bad-header", "proof", proof(other=1)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_strangers_description_is_checked(broken: str) -> None:
    check_description(description(), Path("a.onnx"))
    code, key, value = BROKEN[broken]
    with refused(code, "a.onnx", kind=CheckpointError):
        check_description(description() | {key: value}, Path("a.onnx"))
