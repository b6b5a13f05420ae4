"""Curves and confusion as pictures: one for each, of any classes, that change with what was detected."""

from pathlib import Path

import numpy as np

from retina.data.coco import read_coco
from retina.data.layouts import locate_split
from retina.evaluation.decision_pictures import decision_pictures
from retina.evaluation.metrics import DetectionArrays
from retina.evaluation.operating_points import fit_operating_point


def test_each_is_a_picture_that_shows_what_was_detected(tiny_data: Path) -> None:
    truth = read_coco(*locate_split(tiny_data, "val"))
    images = np.repeat(np.arange(len(truth)), np.diff(truth.offsets))
    right = DetectionArrays(images, truth.boxes, np.linspace(0.9, 0.5, len(images)), truth.labels)
    swapped = right._replace(labels=(right.labels + 1) % len(truth.classes))
    none = DetectionArrays(*(values[:0] for values in right))
    pictures = {}
    for name, detections in (("right", right), ("swapped", swapped), ("none", none)):
        point = fit_operating_point(truth, detections, draws=10)
        pictures[name] = decision_pictures(truth, detections, point, max_dets=100)
        assert set(pictures[name]) == {"precision_recall", "confusion"}
        for picture in pictures[name].values():
            assert (picture.dtype, picture.shape[2]) == (np.uint8, 3)
            assert picture.std() > 0
    for kind in ("precision_recall", "confusion"):
        assert (pictures["right"][kind] != pictures["none"][kind]).any()
    assert (pictures["right"]["confusion"] != pictures["swapped"]["confusion"]).any()
    assert decision_pictures(truth, right, {}, max_dets=100) == {}
