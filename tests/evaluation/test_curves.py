"""Curves, confusion and calibration against pycocotools, plain loops and hotcoco; resampled AP against AP."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest

from retina.evaluation.bootstrap import mean_over_classes, resampled_ap, resamples
from retina.evaluation.confusion import confusion_matrix, precision_and_recall
from retina.evaluation.curves import GRID, calibration, counts_over_thresholds, precision_curves
from retina.evaluation.metrics import DetectionArrays, coco_metrics
from retina.evaluation.outcomes import find_outcomes
from scenes import annotations_of, detections_of, plain_matches, random_scene, write_coco

BOX = [10.0, 10.0, 50.0, 50.0]


@pytest.mark.parametrize("seed", range(3))
def test_counts_over_thresholds_are_those_of_plain_loops(seed: int) -> None:
    annotations, detections = random_scene(seed)  # scores of two decimals: many are equal to a threshold
    hits, false = counts_over_thresholds(find_outcomes(annotations, detections))
    taken = plain_matches(annotations, detections)
    for number in (0, 17, 50, 99):
        expected = np.zeros((2, 3), dtype=int)
        for row, (score, label) in enumerate(zip(detections.scores, detections.labels, strict=True)):
            if score >= GRID[number] and not (row in taken and annotations.crowd[taken[row]]):
                expected[0 if row in taken else 1, label] += 1
        assert hits[:, number].tolist() == expected[0].tolist()
        assert false[:, number].tolist() == expected[1].tolist()
    assert hits.sum() > 0


@pytest.mark.parametrize("seed", range(3))
def test_precision_curves_are_those_of_pycocotools(tmp_path: Path, seed: int) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, detections = random_scene(seed, decimals=6, crowds=False)
    ground, results = write_coco(annotations, detections, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(ground)
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    theirs = evaluation.eval["precision"][:, :, :, 0, 2].transpose(0, 2, 1)
    np.testing.assert_allclose(precision_curves(find_outcomes(annotations, detections)), theirs, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.7])
def test_sums_of_the_confusion_matrix_are_precision_and_recall(seed: int, threshold: float) -> None:
    annotations, detections = random_scene(seed)
    outcomes = find_outcomes(annotations, detections)
    matrix = confusion_matrix(outcomes, outcomes.scores >= threshold)
    hits, false = (table[:, round(100 * threshold)] for table in counts_over_thresholds(outcomes))
    precision, recall = precision_and_recall(matrix)
    np.testing.assert_allclose(precision, hits / (hits + false))
    np.testing.assert_allclose(recall, hits / annotations.class_counts())
    assert matrix[:-1].sum() == annotations.num_objects, "every object is in one place"
    assert matrix[:, :-1].sum() == (hits + false).sum(), "and so is every detection"
    assert matrix[-1, -1] == 0
    assert (matrix[:-1, :-1].sum() > np.trace(matrix)) or threshold > 0.5, "some are confused"


def test_confusion_by_hand() -> None:
    """One is taken for another class, one is found although another class claims it too, one is missed."""
    other, third = [100.0, 100.0, 140.0, 140.0], [150.0, 10.0, 190.0, 50.0]
    annotations = annotations_of([(0, 0, BOX), (0, 0, other), (0, 1, third)], 1, ["a", "b", "c"])
    found = [(0, 1, 0.9, BOX), (0, 0, 0.5, other), (0, 2, 0.8, other), (0, 2, 0.1, third)]
    outcomes = find_outcomes(annotations, detections_of(found))
    matrix = confusion_matrix(outcomes, outcomes.scores >= 0.3)
    expected = np.zeros((4, 4), dtype=int)
    expected[0, 1] = expected[0, 0] = expected[1, 3] = expected[3, 2] = 1
    assert matrix.tolist() == expected.tolist()


def test_calibration_is_that_of_hotcoco(tmp_path: Path) -> None:
    hotcoco = pytest.importorskip("hotcoco", reason="hotcoco is not installed")
    annotations, detections = random_scene(0, decimals=6, crowds=False)
    ground, results = write_coco(annotations, detections, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = hotcoco.COCO(ground)
        evaluation = hotcoco.COCOeval(truth, truth.load_res(results), "bbox")
        evaluation.run()
        theirs = evaluation.calibration(n_bins=10, iou_threshold=0.5)
    ours = calibration(find_outcomes(annotations, detections))
    assert ours["ece"] == pytest.approx(theirs["ece"], abs=1e-9)
    assert [row["count"] for row in ours["bins"]] == [row["count"] for row in theirs["bins"]]


def test_scores_that_are_probabilities_have_no_error() -> None:
    generator = np.random.default_rng(0)
    objects, found = [], []
    for image in range(2000):
        score = float(generator.random())
        objects.append((image, 0, BOX))
        place = BOX if generator.random() < score else [100.0, 100.0, 120.0, 120.0]
        found.append((image, 0, score, place))
    right = find_outcomes(annotations_of(objects, 2000, ["a"]), detections_of(found))
    error = calibration(right)["ece"]
    assert error is not None
    assert error < 0.04
    sure = calibration(right._replace(scores=np.full(2000, 0.99)))["ece"]
    assert sure is not None
    assert sure > 0.4


@pytest.mark.parametrize("crowds", [False, True])
def test_resampled_ap_is_ap_of_repeated_images(crowds: bool) -> None:
    annotations, detections = random_scene(3, num_images=40, crowds=crowds, decimals=6)
    weights = np.concatenate([np.ones((1, 40), np.uint8), resamples(40, draws=3)])
    values = resampled_ap(find_outcomes(annotations, detections), weights)
    for draw, row in enumerate(weights):
        images = np.repeat(np.arange(40), row).tolist()
        objects, found, crowd = [], [], set[int]()
        for place, image in enumerate(images):
            for number in range(annotations.offsets[image], annotations.offsets[image + 1]):
                if annotations.crowd[number]:
                    crowd.add(len(objects))
                objects.append((place, int(annotations.labels[number]), annotations.boxes[number].tolist()))
            for number in np.flatnonzero(detections.indices == image):
                label, score = int(detections.labels[number]), float(detections.scores[number])
                found.append((place, label, score, detections.boxes[number].tolist()))
        copies = annotations_of(objects, len(images), list(annotations.classes), crowd)
        metrics = coco_metrics(copies, detections_of(found))
        assert mean_over_classes(values[draw].mean(axis=1)[None])[0] == pytest.approx(metrics["AP"], abs=0.01)
        assert mean_over_classes(values[draw][None, :, 0])[0] == pytest.approx(metrics["AP50"], abs=0.01)
    assert np.ptp(values[:, 0, 0]) > 0.02


def test_resampled_ap_of_nothing() -> None:
    annotations = annotations_of([(0, 0, BOX)], 3, ["a", "b"])
    values = resampled_ap(find_outcomes(annotations, detections_of([])), resamples(3, draws=50))
    assert np.isnan(values[:, 1]).all()
    drawn = resamples(3, draws=50)[:, 0] > 0
    assert (values[drawn, 0] == 0).all()
    assert np.isnan(values[~drawn, 0]).all()
    assert not drawn.all()
    nothing = DetectionArrays(*(field[:0] for field in detections_of([(0, 0, 0.5, BOX)])))
    assert calibration(find_outcomes(annotations, nothing))["ece"] is None
