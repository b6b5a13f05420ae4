"""CSV tables of boxes: heads, splits, images, and every fault with its line."""

from pathlib import Path

import pytest
from PIL import Image

from faults import refused
from retina.data.convert.records import Records
from retina.data.convert.tables import read_csv
from retina.errors import DataError

ROBOFLOW = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
DEEPFOREST = "image_path,xmin,ymin,xmax,ymax,label\n"


def draw(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / name)


def read(root: Path, text: str, name: str = "boxes.csv", **options: object) -> Records:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    return read_csv(root, **options)  # type: ignore[arg-type]


def boxes_of(reading: Records) -> dict[str, list[object]]:
    records = (*reading.train, *reading.val, *reading.test)
    return {record.file_name: [(item.name, *item.box) for item in record.objects] for record in records}


EXPECTED = {"a.png": [("cat", 1, 2, 9, 8), ("dog", 0, 0, 5, 5.5)], "b.png": []}


@pytest.mark.parametrize(
    "text",
    [
        ROBOFLOW + "a.png,40,30,cat,1,2,9,8\na.png,40,30,dog,0,0,5,5.5\nb.png,40,30,,,,,\n",
        DEEPFOREST + "a.png,1,2,9,8,cat\na.png,0,0,5,5.5,dog\nb.png,0,0,0,0,cat\n",
        "\ufeffImage_Path;XMin;YMin;XMax;YMax;Label\na.png;1;2;9;8;cat\na.png;0;0;5;5.5;dog\nb.png;;;;;\n",
        "a.png,1,2,9,8,cat\na.png,0,0,5,5.5,dog\nb.png,,,,,\n",
    ],
)
def test_heads(tmp_path: Path, text: str) -> None:
    draw(tmp_path, "a.png", "b.png", "c.png")
    reading = read(tmp_path, text)
    assert boxes_of(reading) == EXPECTED
    assert (reading.classes, reading.faults) == (("cat", "dog"), ())
    assert (len(reading.train), len(reading.val)) == (1, 1)
    (warning,) = reading.warnings
    assert "1 images are in no table" in warning


@pytest.mark.parametrize(
    ("tables", "counts"),
    [
        ({"train_labels.csv": "ab", "test_labels.csv": "c"}, (2, 1, 0)),
        ({"train/_annotations.csv": "ab", "valid/_annotations.csv": "c", "test/_annotations.csv": "d"}, (2, 1, 1)),
        ({"x-val.csv": "c", "x-train.csv": "abd"}, (3, 1, 0)),
        ({"trainings_of_a_contest.csv": "abcd"}, (3, 1, 0)),
    ],
)
def test_splits(tmp_path: Path, tables: dict[str, str], counts: tuple[int, int, int]) -> None:
    draw(tmp_path / "pictures", *(f"{letter}.png" for letter in "abcd"))
    for name, letters in tables.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(DEEPFOREST + "".join(f"{letter}.png,1,2,9,8,x\n" for letter in letters))
    reading = read_csv(tmp_path)
    assert (len(reading.train), len(reading.val), len(reading.test)) == counts
    assert reading.faults == ()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("a.png,40,30,cat,1,two,9,8", "ymin is 'two'"),
        ("a.png,40,30,cat,1,,9,8", "ymin is ''"),
        ("a.png,40,31,cat,1,2,9,8", "height is '31', the image's is 30"),
        ("a.png,40,30,,1,2,9,8", "a box without class"),
        ("a.png,40,30,cow,1,2,9,8", "unknown class 'cow'"),
        ("a.png,40,30,cat,9,2,1,8", "box [9, 2, 1, 8] has no area"),
        ("gone.png,40,30,cat,1,2,9,8", "missing image 'gone.png'"),
        ("two.png,40,30,cat,1,2,9,8", "2 images are called 'two.png'"),
    ],
)
def test_faults_name_the_line(tmp_path: Path, row: str, problem: str) -> None:
    draw(tmp_path, "a.png", "b.png", "x/two.png", "y/two.png")
    text = f"{ROBOFLOW}b.png,40,30,cat,1,2,9,8\nb.png,,,cat,1,2,9,9\n\n{row}\n"
    (fault,) = read(tmp_path, text, classes=["cat"]).faults
    assert str(fault).startswith(f"{tmp_path}/boxes.csv:5: {problem}")


def test_what_is_no_table_of_boxes(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    with refused("not-csv", tmp_path, kind=DataError):
        read(tmp_path, "epoch,loss\n1,2\n")
    (tmp_path / "b.csv").write_text(DEEPFOREST + "a.png,1,2,9,8,cat\n")
    with refused("too-few-images", kind=DataError):
        read_csv(tmp_path / "b.csv")  # one table alone is a source too
