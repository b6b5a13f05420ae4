"""The COCO reader: arrays, class tables, every fault with its record, split layout, results files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from faults import refused
from retina.data.checks import DataReport
from retina.data.coco import Annotations, RecordsError, read_coco
from retina.data.layouts import locate_split
from retina.data.results import write_results
from retina.errors import DataError


def a_document() -> dict:
    """Three images out of order, one empty; sparse unsorted categories; annotations interleaved, without ids."""
    return {
        "images": [
            {"id": 50, "file_name": "sub/b.jpg", "width": 640, "height": 480},
            {"id": 7, "file_name": "a é.jpg", "width": 100, "height": 200},
            {"id": 12, "file_name": "empty.jpg", "width": 30, "height": 40},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 4, "name": "cat"}, {"id": 17, "name": "owl"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [1.5, 2, 10, 20.25]},
            {"image_id": 50, "category_id": 4, "bbox": [0, 0, 5, 5], "area": 12.5, "iscrowd": 1, "id": 0},
            {"image_id": 7, "category_id": 4, "bbox": [3, 4, 1, 2], "area": 1, "iscrowd": 0, "segmentation": "no"},
            {"image_id": 50, "category_id": 17, "bbox": [-2, 1, 7, 6], "area": None, "id": 0},
        ],
    }


def save(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "instances.json", a_document())


def read(file: Path, **options) -> Annotations:
    return read_coco(file, file.parent / "images", **options)


def faults_of(tmp_path: Path, document: object, **options) -> list[str]:
    file = save(tmp_path / "faulty.json", document)
    with pytest.raises(RecordsError) as caught:
        read(file, **options)
    assert all(line.startswith(f"{file}: ") and " - " in line and "\n" not in line for line in caught.value.faults)
    return [line.removeprefix(f"{file}: ") for line in caught.value.faults]


def test_arrays(file):
    annotations = read(file)
    assert len(annotations) == 3
    assert annotations.classes == ("cat", "owl", "dog")
    assert annotations.category_ids == (4, 17, 90)
    np.testing.assert_array_equal(annotations.image_ids, [50, 7, 12])
    np.testing.assert_array_equal(annotations.sizes, [[480, 640], [200, 100], [40, 30]])
    np.testing.assert_array_equal(annotations.offsets, [0, 2, 4, 4])
    np.testing.assert_array_equal(annotations.boxes, [[0, 0, 5, 5], [-2, 1, 5, 7], [1.5, 2, 11.5, 22.25], [3, 4, 4, 6]])
    np.testing.assert_array_equal(annotations.labels, [0, 1, 2, 0])
    np.testing.assert_array_equal(annotations.crowd, [True, False, False, False])
    np.testing.assert_array_equal(annotations.areas, [12.5, 42, 202.5, 1])
    assert annotations.boxes.dtype == np.float64


def test_names_counts_and_paths(file):
    annotations = read(file)
    assert [annotations.file_name(i) for i in range(3)] == ["sub/b.jpg", "a é.jpg", "empty.jpg"]
    assert annotations.file_name(-1) == "empty.jpg"
    with pytest.raises(IndexError):
        annotations.file_name(3)
    assert annotations.path(0) == file.parent / "images" / "sub" / "b.jpg"
    assert annotations.num_objects == 3
    np.testing.assert_array_equal(annotations.class_counts(), [1, 1, 1])


def test_no_annotations_at_all(tmp_path):
    annotations = read(save(tmp_path / "a.json", a_document() | {"annotations": []}))
    assert len(annotations) == 3
    assert annotations.boxes.shape == (0, 4)
    np.testing.assert_array_equal(annotations.offsets, [0, 0, 0, 0])
    np.testing.assert_array_equal(annotations.class_counts(), [0, 0, 0])


def test_given_classes_set_the_order_and_may_be_unknown_to_the_file(file):
    annotations = read(file, classes=["dog", "fish", "owl", "cat"])
    assert annotations.classes == ("dog", "fish", "owl", "cat")
    assert annotations.category_ids == (90, None, 17, 4)
    np.testing.assert_array_equal(annotations.labels, [3, 2, 0, 3])
    np.testing.assert_array_equal(annotations.class_counts(), [1, 0, 1, 1])


def test_unused_category_outside_the_given_classes_is_left_out(tmp_path):
    document = a_document()
    document["annotations"].pop()
    annotations = read(save(tmp_path / "a.json", document), classes=["cat", "dog"])
    assert annotations.category_ids == (4, 90)


def test_used_category_outside_the_given_classes_is_named_once(tmp_path):
    document = a_document()
    document["annotations"] *= 2
    cat, owl = faults_of(tmp_path, document, classes=["dog", "cats"])
    assert cat.startswith("category 4 (cat): used by 4 ")
    assert "'cats'" in cat
    assert owl.startswith("category 17 (owl): used by 2 ")


def test_fingerprint_changes_with_the_data_and_not_with_the_place(file, tmp_path):
    original = read(file).fingerprint()
    (tmp_path / "elsewhere").mkdir()
    assert read(save(tmp_path / "elsewhere" / "b.json", a_document())).fingerprint() == original
    seen = {original}
    for path, value in [
        (("images", 0, "file_name"), "sub/c.jpg"),
        (("images", 1, "width"), 101),
        (("images", 2, "id"), 13),
        (("categories", 0, "name"), "wolf"),
        (("categories", 0, "id"), 91),
        (("annotations", 0, "bbox"), [1.5, 2, 10, 20.5]),
        (("annotations", 1, "iscrowd"), 0),
        (("annotations", 1, "area"), 12),
    ]:
        document = a_document()
        section, row, key = path
        document[section][row][key] = value
        if key == "id" and section == "categories":
            document["annotations"][0]["category_id"] = value
        seen.add(read(save(tmp_path / "c.json", document)).fingerprint())
    assert len(seen) == 9


OF_7, OF_50 = "annotations[0] of image 7 (a é.jpg)", "annotation 0 of image 50 (sub/b.jpg)"


@pytest.mark.parametrize(
    ("section", "row", "change", "record", "named"),
    [
        ("images", 0, {"id": 7}, "image 7 (a é.jpg)", "sub/b.jpg"),
        ("images", 0, {"id": 5.5}, "images[0]", "id 5.5"),
        ("images", 0, {"id": "5" * 1000}, "images[0]", "id '555"),
        ("categories", 1, {"id": "four"}, "categories[1]", "id 'four'"),
        ("images", 1, {"width": 0}, "image 7 (a é.jpg)", "width 0"),
        ("images", 1, {"height": 1e300}, "image 7 (a é.jpg)", "height 1e+300"),
        ("images", 1, {"file_name": None}, "image 7 (None)", "file_name None"),
        ("images", 2, {"height": ...}, "images[2]", "`height`"),
        ("categories", 1, {"id": 90}, "category 90", "'dog'"),
        ("categories", 1, {"name": "owl"}, "category 17", "category 4"),
        ("categories", 1, {"name": ...}, "categories[1]", "`name`"),
        ("annotations", 0, {"bbox": ...}, OF_7, "`bbox`"),
        ("annotations", 0, {"category_id": ...}, OF_7, "`category_id`"),
        ("annotations", 0, {"image_id": ..., "id": 9}, "annotation 9", "`image_id`"),
        ("annotations", 0, {"image_id": 8, "id": 9}, "annotation 9", "image_id 8"),
        ("annotations", 0, {"image_id": [7]}, "annotations[0]", "image_id [7]"),
        ("annotations", 0, {"category_id": 5}, OF_7, "category_id 5"),
        ("annotations", 1, {"bbox": [1, 2, 3]}, OF_50, "bbox [1, 2, 3]"),
        ("annotations", 1, {"bbox": [1, 2, 3, "4"]}, OF_50, "bbox [1, 2, 3, '4']"),
        ("annotations", 1, {"bbox": [1, 2, 3, float("nan")]}, OF_50, "bbox [1, 2, 3, na"),
        ("annotations", 1, {"bbox": [1, 2, 3, 10**400]}, OF_50, "bbox [1, 2, 3, 1000"),
        ("annotations", 1, {"bbox": [1, 2, 3, -4]}, OF_50, "bbox [1, 2, 3, -4]"),
        ("annotations", 1, {"area": "9"}, OF_50, "area '9'"),
        ("annotations", 1, {"iscrowd": "0"}, OF_50, "iscrowd '0'"),
    ],
)
def test_faults_of_single_records_name_the_record(tmp_path, section, row, change, record, named):
    document = a_document()
    content = document[section][row]
    for key, value in change.items():
        content[key] = value
        if value is ...:
            del content[key]
    fault = faults_of(tmp_path, document)[0]
    assert fault.startswith(f"{record}: ")
    assert named in fault


def test_record_that_is_no_object(tmp_path):
    document = a_document()
    document["annotations"][2] = [1, 2, 3, 4]
    (fault,) = faults_of(tmp_path, document)
    assert fault.startswith("annotations[2]: is [1, 2, 3, 4]")


def test_boxes_without_area_are_read_as_coco_itself_has_them(tmp_path):
    document = a_document()
    document["annotations"][0]["bbox"] = [5, 6, 0, 4]
    assert [5, 6, 5, 10] in read(save(tmp_path / "thin.json", document)).boxes.tolist()


def test_faulty_records_can_be_left_out(tmp_path):
    document = a_document()
    document["annotations"][0]["bbox"] = [0, 0, -1, 1]
    document["annotations"].append({"image_id": 7, "category_id": 4, "bbox": [3, 4, 5, 6], "id": 9})
    document["annotations"].append({"image_id": 7, "category_id": 4, "bbox": [300, 4, 5, 6]})
    document["images"][0]["width"] = "640"
    file = save(tmp_path / "faulty.json", document)
    report = DataReport()
    annotations = read(file, skip_faulty=True, report=report)
    np.testing.assert_array_equal(annotations.image_ids, [7, 12])
    np.testing.assert_array_equal(annotations.sizes, [[200, 100], [40, 30]])
    np.testing.assert_array_equal(annotations.boxes, [[3, 4, 4, 6], [3, 4, 8, 10]])
    np.testing.assert_array_equal(annotations.offsets, [0, 2, 2])
    np.testing.assert_array_equal(annotations.areas, [1, 30])
    assert annotations.file_name(1) == "empty.jpg"
    with pytest.raises(RecordsError) as caught:
        read(file)
    assert report.faults == caught.value.faults
    assert len(report.faults) == 3


def test_contradicting_images_are_all_left_out_and_equal_ones_once(tmp_path):
    document = a_document()
    document["images"] += [dict(document["images"][2]), document["images"][1] | {"file_name": "other.jpg"}]
    report = DataReport()
    annotations = read(save(tmp_path / "a.json", document), skip_faulty=True, report=report)
    np.testing.assert_array_equal(annotations.image_ids, [50, 12])
    assert len(report.faults) == 2
    assert annotations.num_objects == 1


@pytest.mark.parametrize("change", [{"id": 90}, {"name": "owl"}, {"id": "4a"}])
def test_faulty_categories_are_never_skipped(tmp_path, change):
    document = a_document()
    document["categories"][1] |= change
    with pytest.raises(RecordsError) as caught:
        read(save(tmp_path / "a.json", document), skip_faulty=True)
    assert len(caught.value.faults) == 1, "their annotations are not at fault"


def test_nothing_left_is_a_fault(tmp_path):
    document = a_document()
    for image in document["images"]:
        image["height"] = 0
    with pytest.raises(RecordsError):
        read(save(tmp_path / "a.json", document), skip_faulty=True)


@pytest.mark.parametrize("write", [str, float])
def test_ids_of_one_kind_and_references_of_another(tmp_path, file, write):
    document = a_document()
    for record in document["annotations"]:
        record |= {"image_id": write(record["image_id"]), "category_id": write(record["category_id"])}
    report = DataReport()
    other = read(save(tmp_path / "other.json", document), report=report)
    assert other.fingerprint() == read(file).fingerprint()
    assert len([line for line in report.warnings if " ids are " in line]) == 2


def test_ids_of_text(tmp_path, file):
    document = a_document()
    for record in document["images"]:
        record["id"] = f"{record['id']}"
    texts = read(save(tmp_path / "text.json", document))  # whose annotations still refer to 7 and 50
    numbers = read(file)
    assert texts.image_ids.tolist() == [f"{image_id}" for image_id in numbers.image_ids]
    assert texts.offsets.tolist() == numbers.offsets.tolist()


def test_order_and_ids_of_annotations_mean_nothing(tmp_path, file):
    document = a_document()
    for number, annotation in enumerate(document["annotations"]):
        annotation["id"] = -number
    assert read(save(tmp_path / "b.json", document)).fingerprint() == read(file).fingerprint()


def test_all_faults_are_listed_and_the_line_counts_them(tmp_path):
    document = a_document()
    document["annotations"][0]["bbox"] = [0, 0, -1, 1]
    document["annotations"][2]["bbox"] = None
    document["images"][2]["width"] = -1
    file = save(tmp_path / "faulty.json", document)
    with pytest.raises(DataError) as caught:
        read(file)
    assert len(caught.value.faults) == 3
    assert str(caught.value) == caught.value.faults[0] + " (and 2 more)"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.faults) == (str(caught.value), caught.value.faults)


def test_a_faulty_image_does_not_make_its_annotations_faulty(tmp_path):
    document = a_document()
    del document["images"][1]["width"]
    (fault,) = faults_of(tmp_path, document)
    assert fault.startswith("images[1]: ")
    assert "`width`" in fault


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "0 bytes"),
        (" \n", "2 bytes"),
        ('{"images": [', "after 12 bytes"),
        ('{"images": [{"id": 1, "file_name": "a.j', "after 39 bytes"),
        ('{"images": [{"id": 1}', "after 21 bytes"),
        ("images = 3", "line 1 column 1"),
        ('{"images": [1,, 2]}', "line 1 column 15"),
        ("<html></html>", "HTML"),
        ("version https://git-lfs.github.com/spec/v1", "Git LFS"),
        ("[]", "list"),
        ("3", "int"),
        ('{"images": [], "info": 3}', "`images`"),
        ('{"images": [{"id": 1, "id": 2}], "annotations": []}', "'id'"),
        ('{"info": {}, "images": [{}]}', "`annotations`"),
        ('{"images": {}, "annotations": [], "categories": []}', "`images`"),
        ('{"images": [{}], "annotations": [], "categories": []}', "`categories`"),
    ],
)
def test_files_that_are_not_built_like_annotations(tmp_path, text, named):
    file = tmp_path / "a.json"
    file.write_text(text)
    with refused("not-coco", f"{file}: ", named, kind=DataError):
        read(file)


def test_missing_file_says_what_lies_there(file):
    with refused("no-such-file", f"{file.parent} holds instances.json", kind=DataError):
        read(file.parent / "instance.json")
    with refused("no-such-file", f"{file.parent} holds instances.json", kind=DataError):
        read(file.parent / "deep" / "er" / "a.json")


def test_repeated_given_classes_are_a_programming_error(file):
    with pytest.raises(ValueError, match="not unique"):
        read(file, classes=["cat", "cat"])


@pytest.mark.parametrize("year", ["", "2017"])
def test_locate_split(tmp_path, year):
    (tmp_path / "annotations").mkdir()
    file = save(tmp_path / "annotations" / f"instances_val{year}.json", {})
    (tmp_path / f"val{year}").mkdir()
    assert locate_split(tmp_path, "val") == (file, tmp_path / f"val{year}")


def test_roboflows_layout(tmp_path):
    for folder in ("train", "valid"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "_annotations.coco.json").touch()
    assert locate_split(tmp_path, "val") == (tmp_path / "valid" / "_annotations.coco.json", tmp_path / "valid")
    assert locate_split(tmp_path, "train")[1] == tmp_path / "train"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train/_annotations.csv", "csv"),
        ("Annotations/a.xml", "voc"),
        ("data.yaml", "yolo"),
        ("labels/train/a.txt", "yolo"),
    ],
)
def test_labels_of_other_programs_are_answered_with_the_command(tmp_path, name, kind):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with refused("no-such-split", f"tools/convert.py format={kind} source={tmp_path}", kind=DataError):
        locate_split(tmp_path, "train")


def test_locate_split_names_candidates_and_settings(tmp_path):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    save(annotations / "instances_val.json", {})
    files = [annotations / f"instances_train{year}.json" for year in ("", "2017")]
    settings = ("data.train.annotations=", "data.train.images=")
    with refused("no-such-split", *files, "holds instances_val.json", *settings, kind=DataError):
        locate_split(tmp_path, "train")
    with refused("no-such-split", "/val/", "/val2017/", "holds annotations/", kind=DataError):
        locate_split(tmp_path, "val")


def test_results_are_read_by_pycocotools_without_loss(tmp_path, file):
    annotations = read(file)
    boxes = np.array([[1 / 3, 2 / 3, 100.1, 50.7], [0.1, 0.2, 0.7, 0.9], [5, 5, 6, 6]])
    scores = np.array([0.123456789012345, 1.0, 1e-9])
    results = tmp_path / "eval" / "detections.json"
    write_results(results, annotations, np.array([1, 0, 1]), boxes, scores, np.array([2, 0, 1]))
    assert [p.name for p in results.parent.iterdir()] == ["detections.json"]
    found = json.loads(results.read_text())
    assert [(d["image_id"], d["category_id"], d["score"]) for d in found] == [
        (7, 90, 0.123456789012345),
        (50, 4, 1.0),
        (7, 17, 1e-9),
    ]
    xywh = np.array([d["bbox"] for d in found])
    np.testing.assert_array_equal(xywh, np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1))
    document = a_document()
    for number, annotation in enumerate(document["annotations"], start=1):
        annotation["id"] = number  # pycocotools needs them
    reference = COCO(str(save(tmp_path / "numbered.json", document | {"info": {}})))
    assert [d["category_id"] for d in reference.loadRes(str(results)).anns.values()] == [90, 4, 17]


def test_results_of_float32_and_of_nothing(tmp_path, file):
    annotations = read(file)
    results = tmp_path / "detections.json"
    write_results(
        results, annotations, np.array([2]), np.float32([[0.1, 0.2, 3.3, 4.4]]), np.float32([0.1]), np.array([0])
    )
    (found,) = json.loads(results.read_text())
    assert np.float32(found["score"]) == np.float32(0.1)
    assert np.float32(found["bbox"][0] + found["bbox"][2]) == np.float32(3.3)
    write_results(results, annotations, np.zeros(0, int), np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    assert json.loads(results.read_text()) == []


def test_results_of_a_class_the_file_does_not_know(tmp_path, file):
    annotations = read(file, classes=["cat", "dog", "owl", "fish"])
    results = tmp_path / "detections.json"
    arguments = (np.array([0]), np.array([[0.0, 0, 1, 1]]), np.array([0.5]))
    with refused("unknown-class", "'fish'", kind=DataError):
        write_results(results, annotations, *arguments, np.array([3]))
    assert not results.exists()
    write_results(results, annotations, *arguments, np.array([1]))
    assert json.loads(results.read_text())[0]["category_id"] == 90


def test_same_content_as_pycocotools_on_real_files(bccd):
    for split in ("train", "val"):
        file, images = locate_split(bccd, split)
        annotations = read_coco(file, images)
        reference = COCO(str(file))
        assert annotations.num_objects == len(reference.anns)
        for index, image_id in enumerate(annotations.image_ids.tolist()):
            rows = slice(annotations.offsets[index], annotations.offsets[index + 1])
            expected = reference.imgToAnns[image_id]
            assert annotations.path(index).is_file()
            assert [annotations.category_ids[k] for k in annotations.labels[rows]] == [
                a["category_id"] for a in expected
            ]
            boxes = np.array([a["bbox"] for a in expected]).reshape(-1, 4)
            np.testing.assert_allclose(annotations.boxes[rows, 2:] - annotations.boxes[rows, :2], boxes[:, 2:])
