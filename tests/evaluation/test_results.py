import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faults import refused
from retina.data.checks import RecordsError
from retina.data.coco import Annotations, read_coco
from retina.data.results import write_results
from retina.errors import DataError
from retina.evaluation.metrics import coco_metrics, format_metrics, write_metrics
from retina.evaluation.results import read_results

GOOD = {"image_id": 7, "category_id": 3, "bbox": [1.5, 2.0, 3.0, 4.25], "score": 0.75}


@pytest.fixture
def annotations(tmp_path: Path) -> Annotations:
    ground = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in (9, 7)],
        "categories": [{"id": 3, "name": "cell"}, {"id": 12, "name": "platelet, small"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
    }
    file = tmp_path / "gt.json"
    file.write_text(json.dumps(ground))
    return read_coco(file, tmp_path)


def written(folder: Path, content: Any) -> Path:
    file = folder / "dt.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_results_become_rows_and_corners(tmp_path: Path, annotations: Annotations) -> None:
    second = {"image_id": 9, "category_id": 12, "bbox": [0, 1, 2, 3], "score": 1, "segmentation": []}
    detections = read_results(written(tmp_path, [GOOD, second]), annotations)
    assert detections.indices.tolist() == [1, 0]
    assert detections.labels.tolist() == [0, 1]
    assert detections.boxes.tolist() == [[1.5, 2.0, 4.5, 6.25], [0.0, 1.0, 2.0, 4.0]]
    assert detections.scores.tolist() == [0.75, 1.0]
    assert detections.boxes.dtype == detections.scores.dtype == np.float64


def test_an_empty_list_is_fine(tmp_path: Path, annotations: Annotations) -> None:
    detections = read_results(written(tmp_path, []), annotations)
    assert detections.boxes.shape == (0, 4)
    assert coco_metrics(annotations, detections)["AP"] == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": ["7"]}, r"image_id is \['7'\]"),
        ({"image_id": 7.5}, "image_id is 7.5"),
        ({"category_id": True}, "category_id is True"),
        ({"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox holds '4'"),
        ({"bbox": [1, 2, 3, float("inf")]}, "bbox holds inf"),
        ({"bbox": 5}, "bbox is 5"),
        ({"score": float("nan")}, "score holds nan"),
        ({"score": None}, "score holds None"),
        ({"score": 10**400}, "score holds 1000"),
        ({"score": True}, "score holds True"),
        ({"score": 1e200}, r"score holds 1e\+200"),
    ],
)
def test_a_faulty_record_is_named(tmp_path: Path, annotations: Annotations, change: dict[str, Any], words: str) -> None:
    file = written(tmp_path, [GOOD, GOOD | change])
    with pytest.raises(DataError, match=rf"dt.json: result 1: {words}.* - ") as error:
        read_results(file, annotations)
    assert "\n" not in str(error.value)


def test_all_faulty_records_are_listed(tmp_path: Path, annotations: Annotations) -> None:
    bad = [GOOD | {"score": float("nan")}, GOOD | {"bbox": [1, 2]}, {}, GOOD | {"score": float("-inf")}]
    with pytest.raises(RecordsError) as error:
        read_results(written(tmp_path, [GOOD, *bad, GOOD]), annotations)
    assert [fault.split(": ")[1] for fault in error.value.faults] == [f"result {n}" for n in (1, 2, 3, 4)]
    assert str(error.value) == f"{error.value.faults[0]} (and 3 more)"
    assert "score holds nan - write a finite number" in str(error.value)


def test_unknown_images_and_categories_are_counted(tmp_path: Path, annotations: Annotations) -> None:
    strange = [GOOD | change for change in ({"image_id": 8}, {"category_id": 1}, {"image_id": -5, "category_id": 2})]
    with pytest.raises(RecordsError) as error:
        read_results(written(tmp_path, [GOOD, *strange, *strange[:1] * 3]), annotations)
    gt = f"not in {annotations.file} - use the ids of that file"
    assert [fault.removeprefix(f"{tmp_path}/dt.json: ") for fault in error.value.faults] == [
        f"image_id 8: is that of 4 results, but {gt}",
        f"image_id -5: is that of 1 result, but {gt}",
    ]


def test_results_of_other_categories_are_left_out_and_counted(tmp_path: Path, annotations: Annotations) -> None:
    other = GOOD | {"category_id": 4}
    warnings: list[str] = []
    detections = read_results(written(tmp_path, [other, GOOD | {"image_id": 9}, other]), annotations, warnings)
    assert (detections.indices.tolist(), detections.labels.tolist()) == ([0], [0])
    (line,) = warnings
    assert "category_id 4: is that of 2 results" in line


def test_ids_may_be_written_as_floats_and_text(tmp_path: Path, annotations: Annotations) -> None:
    changes = ({"image_id": 9.0}, {"image_id": "9", "category_id": "12"}, {"category_id": 3.0})
    detections = read_results(written(tmp_path, [GOOD | change for change in changes]), annotations)
    assert (detections.indices.tolist(), detections.labels.tolist()) == ([0, 0, 1], [0, 1, 0])


def test_images_whose_ids_are_text(tmp_path: Path) -> None:
    ground = {
        "images": [{"id": name, "file_name": f"{name}.jpg", "width": 64, "height": 48} for name in ("sea/9", "007")],
        "categories": [{"id": 3, "name": "cell"}],
        "annotations": [{"image_id": "007", "category_id": "3", "bbox": [1, 2, 3, 4]}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(ground))
    annotations = read_coco(tmp_path / "gt.json", tmp_path)
    assert np.diff(annotations.offsets).tolist() == [0, 1]
    detections = read_results(written(tmp_path, [GOOD | {"image_id": name} for name in ("007", "sea/9")]), annotations)
    assert detections.indices.tolist() == [1, 0]
    write_results(tmp_path / "out.json", annotations, *detections)
    assert [result["image_id"] for result in json.loads((tmp_path / "out.json").read_text())] == ["007", "sea/9"]
    with refused("records", "image_id '7'", kind=RecordsError):
        read_results(written(tmp_path, [GOOD | {"image_id": 7}]), annotations)


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_key_is_named(tmp_path: Path, annotations: Annotations, key: str) -> None:
    file = written(tmp_path, [{name: value for name, value in GOOD.items() if name != key}])
    with refused("records", file, "result 0: ", repr(key), kind=RecordsError):
        read_results(file, annotations)


@pytest.mark.parametrize(
    ("content", "code", "record"),
    [
        ("{not json", "not-json", ""),
        ('[{"score": 1, "score": 2}]', "not-json", "score"),
        ("[" * 100_000, "not-json", ""),
        ('{"images": []}', "wrong-type", ""),
        ("[4]", "records", "result 0: "),
    ],
)
def test_a_file_that_holds_no_results_is_refused(
    tmp_path: Path, annotations: Annotations, content: str, code: str, record: str
) -> None:
    with refused(code, "dt.json", record, kind=DataError):
        read_results(written(tmp_path, content), annotations)


def test_a_missing_file_is_refused(tmp_path: Path, annotations: Annotations) -> None:
    with refused("no-file", "absent.json", kind=DataError):
        read_results(tmp_path / "absent.json", annotations)


def test_metrics_are_written_whole_or_not_at_all(tmp_path: Path, annotations: Annotations) -> None:
    metrics = coco_metrics(annotations, read_results(written(tmp_path, [GOOD]), annotations))
    file = tmp_path / "eval" / "metrics.json"
    write_metrics(file, metrics)
    assert json.loads(file.read_text()) == metrics
    assert json.loads(file.read_text())["APl"] is None
    before = file.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(file, metrics | {"AP": float("nan")})
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == ["metrics.json"]


def test_the_table_is_aligned_and_shows_undefined_as_a_dash(tmp_path: Path, annotations: Annotations) -> None:
    metrics = coco_metrics(annotations, read_results(written(tmp_path, [GOOD | {"bbox": [1, 2, 3, 4]}]), annotations))
    headlines, table = (block.splitlines() for block in format_metrics(metrics).split("\n\n"))
    assert headlines[0] == "AP     1.000  IoU 0.50:0.95"
    assert headlines[5].split()[:2] == ["APl", "-"]
    assert len(headlines) == 12
    assert table[0].split() == ["class", "objects", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
    assert table[1].split() == ["cell", "1", "1.000", "1.000", "1.000", "1.000", "-", "-", "1.000"]
    assert table[2].startswith("platelet, small  ")
    assert len({len(line) for line in table}) == 1
