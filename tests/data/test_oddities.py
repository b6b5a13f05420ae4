"""What is read but likely not meant is counted, and changes nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from retina.data.annotations import Annotations
from retina.data.checks import DataReport
from retina.data.coco import read_coco
from retina.data.health import check_objects
from retina.data.oddities import content_oddities

Box = dict[str, Any]


def read(
    folder: Path, boxes: Sequence[Box], classes: Sequence[str] = ("cat", "dog"), file: str = "a.json"
) -> tuple[Annotations, list[str]]:
    """One image of 100 x 80, and the warnings of the reader."""
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "annotations": [{"image_id": 1, "category_id": 0} | box for box in boxes],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes)],
    }
    (folder / file).write_text(json.dumps(content))
    report = DataReport()
    return read_coco(folder / file, folder, report=report), report.warnings


SOUND: Box = {"bbox": [10, 20, 30, 10], "area": 300, "segmentation": [[10, 20, 40, 20, 40, 30]], "iscrowd": 0}


def test_a_sound_file_has_no_oddities(tmp_path: Path) -> None:
    annotations, warnings = read(tmp_path, [SOUND, {"bbox": [1, 2, 3, 4], "category_id": 1, "ignore": 0}])
    assert warnings == []
    assert list(content_oddities({"train": annotations})) == []
    assert check_objects(annotations) == []


@pytest.mark.parametrize(
    "change",
    [
        {"ignore": 1},
        {"area": 7500},
        {"segmentation": [[70, 20, 80, 20, 80, 30]]},
        {"attributes": {"rotation": 90.0}},
    ],
)
def test_flags_and_contradictions_are_counted(tmp_path: Path, change: Box) -> None:
    _, (warning,) = read(tmp_path, [SOUND, SOUND | change, SOUND | change, SOUND])
    assert warning.startswith(f"{tmp_path}/a.json: annotations: ")
    assert " 2 " in warning


def test_turned_boxes_become_the_upright_boxes_around_them(tmp_path: Path) -> None:
    turned = [SOUND | {"attributes": {"rotation": degrees, "occluded": False}} for degrees in (0.0, 90.0, 45, None)]
    boxes = read(tmp_path, turned)[0].boxes
    reach = (30 + 10) / 8**0.5
    around = [25 - reach, 25 - reach, 25 + reach, 25 + reach]
    upright = [10, 20, 40, 30]
    for box, expected in zip(boxes.tolist(), [upright, [20, 10, 30, 40], around, upright], strict=True):
        assert box == pytest.approx(expected, abs=1e-5)


def test_repeated_and_shared_boxes(tmp_path: Path) -> None:
    other = {"bbox": [1, 2, 3, 4], "category_id": 1}
    repeated, _ = read(tmp_path, [SOUND, SOUND, SOUND, other, SOUND | {"iscrowd": 1}])
    (warning,) = content_oddities({"train": repeated})
    assert " 2 repeat " in warning
    shared, _ = read(tmp_path, [SOUND, SOUND | {"category_id": 1}, other])
    (warning,) = content_oddities({"train": shared})
    assert " 1 boxes have more than one class (cat and dog)" in warning


def test_crowd_regions_mostly(tmp_path: Path) -> None:
    crowd = [{"bbox": [k, 2, 3, 4], "iscrowd": 1, "category_id": 1} for k in range(3)]
    annotations, _ = read(tmp_path, [SOUND, SOUND | {"bbox": [2, 3, 4, 5], "category_id": 1}, *crowd])
    (warning,) = content_oddities({"train": annotations})
    assert " 3 of 5 " in warning


def test_classes_without_an_object_anywhere_and_names_that_look_alike(tmp_path: Path) -> None:
    names = ("fruits", "apple", "Apple ", "pear")
    train, _ = read(tmp_path, [SOUND | {"category_id": 1}], names)
    val, _ = read(tmp_path, [SOUND | {"category_id": 2}], names, "b.json")
    dead, alike = content_oddities({"train": train, "val": val})
    assert "no object of fruits, pear in any split" in dead
    assert "'apple' and 'Apple '" in alike


@pytest.mark.parametrize("boxes", [[], [[0, 0, 0, 0]], [[5, 5, 0, 9], [5, 5, 9, 0]], [[100, 10, 0, 9]]])
def test_boxes_without_area_are_nothing_to_learn(tmp_path: Path, boxes: list[list[int]]) -> None:
    annotations, _ = read(tmp_path, [{"bbox": box} for box in boxes])
    assert len(check_objects(annotations)) == 1
