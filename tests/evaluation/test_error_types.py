"""Error types on cases made by hand, and their costs against hotcoco where that is installed."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest

from retina.evaluation.error_types import KINDS, error_costs, find_errors
from retina.evaluation.metrics import DetectionArrays, coco_metrics
from retina.evaluation.outcomes import find_outcomes
from scenes import annotations_of, detections_of, random_scene, write_coco

BOX = [10.0, 10.0, 50.0, 50.0]
FAR = [120.0, 120.0, 160.0, 160.0]
HALF = [30.0, 10.0, 70.0, 50.0]  # IoU 1/3 with BOX
NEAR = [12.0, 10.0, 52.0, 50.0]  # IoU 0.9 with BOX


@pytest.mark.parametrize(
    ("found", "kinds", "missed"),
    [
        ([(0, BOX)], [None], 0),
        ([(1, BOX)], ["classification"], 0),
        ([(0, HALF)], ["localisation"], 0),
        ([(1, HALF)], ["both"], 1),
        ([(0, BOX), (0, NEAR)], [None, "duplicate"], 0),
        ([(0, FAR)], ["background"], 1),
        ([], [], 1),
        ([(0, BOX), (1, NEAR)], [None, "classification"], 0),
        ([(0, HALF), (1, BOX)], ["localisation", "classification"], 0),
    ],
)
def test_each_kind(found: list[tuple[int, list[float]]], kinds: list[str | None], missed: int) -> None:
    annotations = annotations_of([(0, 0, BOX)], 1, ["a", "b"])
    detections = detections_of([(0, label, 0.9 - 0.1 * n, box) for n, (label, box) in enumerate(found)])
    outcomes = find_outcomes(annotations, detections)
    errors = find_errors(outcomes)
    by_row = dict(zip(outcomes.rows.tolist(), errors.kinds.tolist(), strict=True))
    assert [None if by_row[n] < 0 else KINDS[by_row[n]] for n in range(len(found))] == kinds
    assert errors.missed.sum() == missed


def test_costs_are_ap_without_the_error() -> None:
    """Two objects: one found, one of wrong class with a false alarm before everything."""
    annotations = annotations_of([(0, 0, BOX), (1, 0, BOX)], 2, ["a", "b"])
    detections = detections_of([(0, 0, 0.5, BOX), (1, 1, 0.6, BOX), (0, 0, 0.9, FAR)])
    outcomes = find_outcomes(annotations, detections)
    costs = error_costs(outcomes, find_errors(outcomes))
    base = coco_metrics(annotations, detections)["AP50"]
    mended = detections._replace(labels=np.zeros(3, np.int64))
    assert costs["classification"]["ap50"] == pytest.approx(coco_metrics(annotations, mended)["AP50"] - base)
    without = DetectionArrays(*(field[:2] for field in detections))
    assert costs["background"]["ap50"] == pytest.approx(coco_metrics(annotations, without)["AP50"] - base)
    assert costs["missed"] == {"count": 0, "ap50": 0.0}


@pytest.mark.parametrize("seed", range(3))
def test_kinds_and_costs_are_those_of_hotcoco(tmp_path: Path, seed: int) -> None:
    hotcoco = pytest.importorskip("hotcoco", reason="hotcoco is not installed")
    annotations, detections = random_scene(seed, decimals=6, crowds=False)
    ground, results = write_coco(annotations, detections, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = hotcoco.COCO(ground)
        evaluation = hotcoco.COCOeval(truth, truth.load_res(results), "bbox")
        evaluation.run()
        theirs = evaluation.tide_errors(pos_thr=0.5, bg_thr=0.1)
    outcomes = find_outcomes(annotations, detections)
    ours = error_costs(outcomes, find_errors(outcomes))
    names = {"classification": "Cls", "localisation": "Loc", "both": "Both", "duplicate": "Dupe", "background": "Bkg"}
    for kind, name in {**names, "missed": "Miss"}.items():
        assert ours[kind]["count"] == theirs["counts"][name], kind
        assert ours[kind]["ap50"] == pytest.approx(theirs["delta_ap"][name], abs=1e-9), kind
    assert sum(one["count"] for one in ours.values()) > 30
