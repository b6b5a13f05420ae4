"""The YOLO reader: lines, layouts, every fault with its file and line."""

from pathlib import Path

import pytest
from PIL import Image

from faults import refused
from retina.data.convert.records import Object, Records
from retina.data.convert.yolo import label_path, parse_line, read_yolo
from retina.errors import DataError

SIZE = (100, 200)  # height, width
CLASSES = ("cat", "dog")


def add(image: Path, labels: str | None = None) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (20, 90, 160)).save(image)
    if labels is not None:
        file = label_path(image)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(labels)


def read_one(root: Path, labels: str) -> Records:
    """Read a data set whose training image has the given labels."""
    add(root / "images" / "train" / "a.png", labels)
    add(root / "images" / "val" / "b.png")
    (root / "classes.txt").write_text("cat\ndog\n")
    return read_yolo(root)


def names(reading: Records) -> tuple[list[str], list[str]]:
    return [record.file_name for record in reading.train], [record.file_name for record in reading.val]


def test_lines() -> None:
    assert parse_line("1 0.5 0.5 0.25 0.5", SIZE, CLASSES) == Object("dog", (75, 25, 125, 75))
    assert parse_line("0 0.1 0.2 0.5 0.1 0.3 0.9", SIZE, CLASSES) == Object("cat", (20, 10, 100, 90))
    assert parse_line("0.0 0.5 0.5 1 1", SIZE, CLASSES) == Object("cat", (0, 0, 200, 100))


def test_overhang_of_a_pixel_is_clipped() -> None:
    assert parse_line("0 0.5 0.5 1.005 1.0000001", SIZE, CLASSES) == Object("cat", (0, 0, 200, 100))


def test_more_is_clipped_and_counted(tmp_path: Path) -> None:
    reading = read_one(tmp_path, "0 0.95 0.5 0.2 0.1\n0 0.1 0.1 0.2 0.2 1.1 0.3\n0 0.5 0.5 0.1 0.1")
    first, second, _ = (item.box for item in reading.train[0].objects)
    assert (first, second) == (pytest.approx((170, 45, 200, 55)), pytest.approx((20, 10, 200, 30)))
    assert reading.faults == ()
    assert any(": 2 boxes" in warning for warning in reading.warnings)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("0 0.5 0.5 x 0.1", "'x'"),
        ("cat 0.5 0.5 0.1 0.1", "'cat'"),
        ("0 0.5 0.5 0.1", "4"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8"),
        ("2 0.5 0.5 0.1 0.1", "class 2"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("nan 0.5 0.5 0.1 0.1", "class nan"),
        ("0 nan 0.5 0.1 0.1", "nan"),
        ("0 0.5 inf 0.1 0.1", "inf"),
        ("0 120 50 20 20", "120"),
        ("0 0.5 0.5 0.1 -0.1", "width 20, height -10"),
        ("0 0.5 0.5 0.1 -0.5", "-0.5"),
        ("0 0.1 0.1 0.2 0.2 1.5 0.3", "1.5"),
        ("0 0.5 0.5 0 0.1", "width 0, height 10"),
        ("0 0.1 0.1 0.2 0.1 0.3 0.1", "height 0"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    reading = read_one(tmp_path, f"0 0.5 0.5 0.1 0.1\n\n{line}\n1 0.5 0.5 0.2 0.2")
    (fault,) = reading.faults
    file = tmp_path / "labels" / "train" / "a.txt"
    assert (fault.file, fault.line) == (file, 3)
    assert problem in fault.text
    assert str(fault).startswith(f"{file}:3: ")
    assert " - " in str(fault)
    assert [item.name for item in reading.train[0].objects] == ["cat", "dog"]


def test_empty_and_missing_labels_are_negative_images(tmp_path: Path) -> None:
    reading = read_one(tmp_path, "\n")
    assert reading.train[0].objects == ()
    assert reading.val[0].objects == ()
    assert reading.faults == ()


def test_no_label_file_at_all_is_no_set_of_negatives(tmp_path: Path) -> None:
    add(tmp_path / "images" / "train" / "a.png")
    add(tmp_path / "images" / "val" / "b.png")
    with refused("no-labels", tmp_path, kind=DataError):
        read_yolo(tmp_path, classes=["cat"])


def test_labels_without_image_broken_images_and_binary_labels(tmp_path: Path) -> None:
    add(tmp_path / "images" / "train" / "a.png", "0 0.5 0.5 0.1 0.1")
    add(tmp_path / "images" / "train" / "broken.jpg", "0 0.5 0.5 0.1 0.1")
    (tmp_path / "images" / "train" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    add(tmp_path / "images" / "val" / "b.png", "")
    labels = tmp_path / "labels"
    (labels / "train" / "lost.txt").write_text("0 0.5 0.5 0.1 0.1")
    (labels / "train" / "classes.txt").write_text("cat\n")
    (labels / "val" / "b.txt").write_bytes(b"\xff\xfe\x00")
    faults = read_yolo(tmp_path, classes=["cat"]).faults
    assert [(fault.file, fault.line) for fault in faults] == [
        (labels / "train" / "lost.txt", 1),
        (labels / "train" / "broken.txt", 1),
        (labels / "val" / "b.txt", 1),
    ]


def test_label_path_replaces_the_last_images() -> None:
    assert label_path(Path("/images/set/images/train/a.b.jpg")) == Path("/images/set/labels/train/a.b.txt")
    assert label_path(Path("set/a.jpg")) == Path("set/a.txt")


def test_sub_folders_stay_apart(tmp_path: Path) -> None:
    for sub, labels in (("x", "0 0.5 0.5 0.1 0.1"), ("y", "1 0.5 0.5 0.2 0.2")):
        add(tmp_path / "images" / "train" / sub / "a.png", labels)
    add(tmp_path / "images" / "val" / "a.png")
    reading = read_yolo(tmp_path, classes=CLASSES)
    assert names(reading) == (["x/a.png", "y/a.png"], ["a.png"])
    assert [record.objects[0].name for record in reading.train] == ["cat", "dog"]


def test_other_folder_layouts(tmp_path: Path) -> None:
    add(tmp_path / "one" / "train" / "images" / "a.png", "0 0.5 0.5 0.1 0.1")
    add(tmp_path / "one" / "valid" / "images" / "b.png", "0 0.5 0.5 0.1 0.1")
    reading = read_yolo(tmp_path / "one", classes=CLASSES)
    assert names(reading) == (["a.png"], ["b.png"])
    assert len(reading.val[0].objects) == 1

    for i in range(5):
        add(tmp_path / "two" / "images" / f"{i}.png", "0 0.5 0.5 0.1 0.1")
    first, second = (names(read_yolo(tmp_path / "two", classes=CLASSES, val_fraction=0.4)) for _ in range(2))
    assert first == second
    assert len(first[1]) == 2
    assert sorted(first[0] + first[1]) == [f"{i}.png" for i in range(5)]


@pytest.mark.parametrize("table", ["names: [no, dog]", "names: {1: dog, 0: no}"])
def test_data_yaml(tmp_path: Path, table: str) -> None:
    add(tmp_path / "pictures" / "images" / "t" / "a.png", "0 0.5 0.5 0.1 0.1")
    add(tmp_path / "pictures" / "images" / "v" / "b.png", "1 0.5 0.5 0.1 0.1")
    (tmp_path / "data.yaml").write_text(f"path: pictures\ntrain: images/t\nval: ../pictures/images/v\n{table}\n")
    reading = read_yolo(tmp_path)
    assert names(reading) == (["a.png"], ["b.png"])
    assert reading.classes == ("no", "dog")
    assert [record.objects[0].name for record in reading.train + reading.val] == ["no", "dog"]


def test_data_yaml_of_roboflow(tmp_path: Path) -> None:
    add(tmp_path / "set" / "train" / "images" / "a.png", "0 0.5 0.5 0.1 0.1")
    add(tmp_path / "set" / "valid" / "images" / "b.png", "0 0.5 0.5 0.1 0.1")
    (tmp_path / "set" / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat]\n")
    assert names(read_yolo(tmp_path / "set")) == (["a.png"], ["b.png"])


def test_data_yaml_with_a_list_file(tmp_path: Path) -> None:
    for name in "abc":
        add(tmp_path / "images" / f"{name}.png", "0 0.5 0.5 0.1 0.1")
    (tmp_path / "train.txt").write_text("./images/a.png\nimages/gone.png\n./images/c.png\n./images/a.png\n")
    (tmp_path / "val.txt").write_text("./images/b.png\n")
    (tmp_path / "data.yaml").write_text("path: ../moved\ntrain: train.txt\nval: [val.txt]\nnames: [cat]\n")
    reading = read_yolo(tmp_path)
    assert names(reading) == (["a.png", "c.png"], ["b.png"])
    (fault,) = reading.faults
    assert (fault.file, fault.line) == (tmp_path / "train.txt", 2)


@pytest.mark.parametrize(
    ("table", "code", "named"),
    [
        ("names: [cat, cat]", "class-names", "'cat'"),
        ("names: {0: cat, 2: dog}", "class-names", "0..1"),
        ("names: cat", "class-names", "names: "),
        ("names: [cat\nval: x", "data-yaml", "YAML"),
        ("names: [cat, dog]\nnc: 1", "class-names", "nc: 1"),
        ("just text", "data-yaml", "names:"),
        ("names: [cat]\ntrain: nowhere", "no-such-split", "nowhere"),
        ("names: [cat]\nkpt_shape: [17, 3]", "data-yaml", "kpt_shape"),
    ],
)
def test_faults_of_data_yaml(tmp_path: Path, table: str, code: str, named: str) -> None:
    add(tmp_path / "images" / "train" / "a.png", "")
    (tmp_path / "data.yaml").write_text(table)
    with refused(code, f"{tmp_path / 'data.yaml'}: ", named, kind=DataError):
        read_yolo(tmp_path)


def test_no_class_names(tmp_path: Path) -> None:
    add(tmp_path / "images" / "train" / "a.png", "")
    with refused("class-names", tmp_path, kind=DataError):
        read_yolo(tmp_path)
    with refused("no-such-folder", "nowhere", kind=DataError):
        read_yolo(tmp_path / "nowhere")


def test_two_images_of_one_label_file_are_faults(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.png", "c.png"):
        add(tmp_path / "images" / name, "0 0.5 0.5 0.1 0.1")
    reading = read_yolo(tmp_path, classes=["cat"])
    assert {fault.file.name for fault in reading.faults} == {"a.txt"}
    assert {record.file_name for record in reading.train + reading.val} == {"b.png", "c.png"}


def test_images_without_labels_and_repeated_lines_are_counted(tmp_path: Path) -> None:
    reading = read_one(tmp_path, "0 0.5 0.5 0.1 0.1\n" * 3)
    repeated, unlabelled = reading.warnings
    assert ": 2 objects" in repeated
    assert ": 1 of 2 images" in unlabelled


def test_files_of_macos_are_left_out(tmp_path: Path) -> None:
    for name in "ab":
        add(tmp_path / "images" / "train" / f"{name}.png", "0 0.5 0.5 0.1 0.1")
        for file in (f"images/train/._{name}.png", f"labels/train/._{name}.txt"):
            (tmp_path / file).write_bytes(b"\0\5\26\7")
    (tmp_path / "mine.yaml").write_text("names: [cat]")
    (tmp_path / "._mine.yaml").write_bytes(b"\0\5\26\7")
    reading = read_yolo(tmp_path)
    assert (reading.faults, reading.warnings) == ((), ())


def test_suffix_of_labels_in_capitals(tmp_path: Path) -> None:
    add(tmp_path / "images" / "a.png", "0 0.5 0.5 0.1 0.1")
    add(tmp_path / "images" / "b.png", "0 0.5 0.5 0.1 0.1")
    (tmp_path / "labels" / "a.txt").rename(tmp_path / "labels" / "a.TXT")
    reading = read_yolo(tmp_path, classes=["cat"])
    assert [len(record.objects) for record in reading.train + reading.val] == [1, 1]


@pytest.mark.parametrize("has_data", [True, False])
def test_darknet_and_cvat(tmp_path: Path, has_data: bool) -> None:
    """CVAT's YOLO 1.1 names everything from a folder `data/` that is not there."""
    for name in "abc":
        add(tmp_path / "obj_train_data" / f"{name}.png", "1 0.5 0.5 0.1 0.1")
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "train.txt").write_text("data/obj_train_data/a.png\ndata/obj_train_data/b.png\n")
    (tmp_path / "valid.txt").write_text("data/obj_train_data/c.png\n")
    if has_data:
        table = "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = b/\n"
        (tmp_path / "obj.data").write_text(table)
    reading = read_yolo(tmp_path)
    assert names(reading) == (["a.png", "b.png"], ["c.png"])
    assert reading.classes == ("cat", "dog")
    assert (reading.faults, reading.warnings) == ((), ())
    assert [len(record.objects) for record in reading.train + reading.val] == [1, 1, 1]


def test_a_third_split_is_read(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        add(tmp_path / "images" / split / f"{split}.png", "0 0.5 0.5 0.1 0.1")
    assert [record.file_name for record in read_yolo(tmp_path, classes=["cat"]).test] == ["test.png"]
