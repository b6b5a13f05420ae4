"""Which images are drawn, under which names, and with which detections."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retina.data.coco import Annotations, read_coco
from retina.evaluation.metrics import DetectionArrays
from retina.evaluation.pictures import evaluation_pictures, write_evaluation_pictures


@pytest.fixture
def annotations(tmp_path: Path) -> Annotations:
    """Seven black images, every second without objects, some names leading elsewhere."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    names = ["a.png", "sub/a.png", "../images/c.png", "d.png", "e.png", "f.png", "g.png"]
    images, objects = [], []
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / name)
        images.append({"id": 10 + i, "file_name": name, "width": 40, "height": 30})
        if i % 2 == 0:
            objects.append({"image_id": 10 + i, "category_id": 1, "bbox": [5, 5, 20, 20]})
    document = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "gt.json").write_text(json.dumps(document))
    return read_coco(tmp_path / "gt.json", tmp_path / "images", allow_outside=True)


def detections(indices: list[int], scores: list[float]) -> DetectionArrays:
    boxes = np.tile(np.array([[4.0, 4.0, 30.0, 25.0]]), (len(indices), 1))
    return DetectionArrays(
        np.array(indices, np.int64), boxes, np.array(scores, np.float64), np.zeros(len(indices), np.int64)
    )


def test_pictures_are_spread_evenly_and_stay_in_the_folder(annotations: Annotations, tmp_path: Path) -> None:
    nothing = detections([], [])
    for max_images, names in [
        (3, ["10_a.jpg", "13_d.jpg", "16_g.jpg"]),
        (1, ["10_a.jpg"]),
        (99, [f"{10 + i}_{name}.jpg" for i, name in enumerate("aacdefg")]),
        (0, []),
    ]:
        folder = tmp_path / f"pictures{max_images}"
        count = write_evaluation_pictures(folder, annotations, nothing, max_images=max_images, score_threshold=0.3)
        assert count == len(names)
        assert sorted(path.name for path in folder.glob("*")) == names


def drawn(annotations: Annotations, tmp_path: Path, indices: list[int], scores: list[float]) -> list[bool]:
    """Whether anything is drawn onto the right half of each of the first, fourth and last picture."""
    folder = tmp_path / "drawn"
    found = detections(indices, scores)
    write_evaluation_pictures(folder, annotations, found, max_images=3, score_threshold=0.5)
    pictures = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
    return [bool((picture[60:-4, picture.shape[1] // 2 + 8 : -4] > 60).any()) for picture in pictures]


def test_detections_are_drawn_on_their_own_image_from_the_threshold_on(
    annotations: Annotations, tmp_path: Path
) -> None:
    assert drawn(annotations, tmp_path, [], []) == [False, False, False]
    assert drawn(annotations, tmp_path, [3, 3, 6, 1], [0.6, 0.2, 0.4, 0.9]) == [False, True, False]
    assert drawn(annotations, tmp_path, [6, 0], [0.5, 0.9]) == [True, False, True]


def test_one_picture_for_the_board(annotations: Annotations) -> None:
    small = evaluation_pictures(annotations, detections([0], [0.9]), max_images=1)
    assert small.dtype == np.uint8
    assert small.shape[1] > 2 * 768
    large = evaluation_pictures(annotations, detections([0], [0.9]), max_images=7)
    assert max(large.shape) == 2400


def test_an_image_that_cannot_be_read_is_left_out(annotations: Annotations, tmp_path: Path) -> None:
    """Whoever loaded the images has told of it."""
    (tmp_path / "images" / "a.png").unlink()
    (tmp_path / "images" / "g.png").write_text("no image")
    nothing, folder = detections([], []), tmp_path / "pictures"
    assert write_evaluation_pictures(folder, annotations, nothing, max_images=3, score_threshold=0.3) == 1
    assert [path.name for path in folder.iterdir()] == ["13_d.jpg"]
    assert evaluation_pictures(annotations, nothing, max_images=3).shape[1] > 2 * 768
    assert evaluation_pictures(annotations, nothing, max_images=1).shape == (1, 1, 3)
    assert evaluation_pictures(annotations, nothing, max_images=7, max_pixels=40 * 30 - 1).shape == (1, 1, 3)


def test_the_longest_of_names(tmp_path: Path) -> None:
    name = "\u00e9" * 125 + ".png"
    Image.new("RGB", (40, 30)).save(tmp_path / name)
    document = {
        "images": [{"id": 2**62, "file_name": name, "width": 40, "height": 30}],
        "annotations": [],
        "categories": [{"id": 1, "name": "x"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(document))
    annotations = read_coco(tmp_path / "gt.json", tmp_path)
    folder = tmp_path / "pictures"
    assert write_evaluation_pictures(folder, annotations, detections([], []), max_images=1, score_threshold=0.3) == 1
    assert [path.name for path in folder.iterdir()] == [f"{2**62}_" + "\u00e9" * 100 + ".jpg"]
