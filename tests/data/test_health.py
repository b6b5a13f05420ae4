"""Image files against their annotations, and splits against each other."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from retina.data.checks import DataReport
from retina.data.coco import Annotations, read_coco
from retina.data.health import check_files, compare_splits, examine, undecodable, unnamed_images
from retina.data.images import MAX_PIXELS

SIZE = (40, 30)


def split(
    folder: Path,
    names: Sequence[str],
    *,
    labels: Sequence[int] = (1,),
    categories: Sequence[tuple[int, str]] | None = None,
    classes: Sequence[str] | None = None,
    colour: int = 0,
    draw: bool = True,
) -> Annotations:
    """Images of one colour each, the same sizes and very likely the same lengths; one object per label on each."""
    categories = categories or [(k, name) for k, name in ((1, "cat"), (2, "dog")) if k in labels or classes]
    content = {
        "images": [{"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": k, "bbox": [1 + n, 1, 9, 9]}
            for i in range(len(names))
            for n, k in enumerate(labels)
        ],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if draw:
            Image.new("RGB", SIZE, (colour, i, 0)).save(folder / name, "BMP")
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(content))
    return read_coco(file, folder, classes=classes)


def bad_of(annotations: Annotations) -> dict[int, str]:
    prefix = f"{annotations.file}: "
    bad = check_files(annotations, max_pixels=MAX_PIXELS).bad
    return {row: line.removeprefix(prefix) for row, line in bad.items()}


def test_sound_files(tmp_path: Path) -> None:
    annotations = split(tmp_path / "a", [f"{i}.bmp" for i in range(200)])
    files = check_files(annotations, max_pixels=MAX_PIXELS)
    assert files.bad == {}
    assert files.lengths.tolist() == [os.path.getsize(annotations.path(row)) for row in range(200)]
    assert list(undecodable(annotations, range(200), max_pixels=MAX_PIXELS)) == [None] * 200


def test_all_sorts_of_missing_files_are_told_by_row(tmp_path: Path) -> None:
    annotations = split(tmp_path / "a", ["0.bmp", "1.bmp", "sub/2.bmp", "x/3.bmp", "4.bmp"])
    (tmp_path / "a" / "1.bmp").unlink()
    (tmp_path / "a" / "sub" / "2.bmp").rename(tmp_path / "a" / "sub" / "2.BMP")
    (tmp_path / "a" / "x" / "3.bmp").rename(tmp_path / "a" / "3.bmp")
    (tmp_path / "a" / "x").rmdir()
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "4.bmp").rename(tmp_path / "a" / "deep" / "4.bmp")
    bad, folder = bad_of(annotations), tmp_path / "a"
    assert list(bad) == [1, 2, 3, 4]
    for row, named in enumerate((("1.bmp", folder), ("'2.BMP'", folder / "sub"), ("'3.bmp'",), ("'deep/4.bmp'",)), 1):
        assert bad[row].startswith(f"image {row} (")
        assert [name for name in named if str(name) not in bad[row]] == [], bad[row]
    assert check_files(annotations, max_pixels=MAX_PIXELS).lengths.tolist()[1:] == [-1] * 4


def test_another_number_or_a_file_in_use_is_not_proposed(tmp_path: Path) -> None:
    annotations = split(tmp_path / "a", ["image_0001.bmp", "image_0002.bmp", "photo.bmp", "phota.bmp"])
    for name in ("image_0001.bmp", "photo.bmp"):
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / "image_0003.bmp").touch()
    assert all("add the file" in line for line in bad_of(annotations).values())
    assert len(bad_of(annotations)) == 2


def test_a_folder_of_other_images(tmp_path: Path) -> None:
    """A thousand files missing among a thousand others: nothing is done for each pair of them."""
    annotations = split(tmp_path / "a", [f"picture_{i}_of_the_first_batch.bmp" for i in range(1000)], draw=False)
    for i in range(1000):
        (tmp_path / "a" / f"picture_{i}_of_the_second_batch.bmp").touch()
    assert len(bad_of(annotations)) == 1000


def test_names_that_no_file_has(tmp_path: Path) -> None:
    annotations = split(tmp_path / "a", ["0.bmp"])
    content = json.loads(annotations.file.read_text())
    names = ["9" * 5000 + ".bmp", "a/" * 3000 + "b.bmp", "c" * 300, "folder/", "0.bmp/x", "0.bmp/"]
    content["images"] = [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)]
    annotations.file.write_text(json.dumps(content))
    assert list(bad_of(read_coco(annotations.file, annotations.image_root))) == list(range(len(names)))


def test_missing_image_folder(tmp_path: Path) -> None:
    annotations = split(tmp_path / "a", ["0.bmp"], draw=False)
    (tmp_path / "a").rmdir()
    assert list(bad_of(annotations)) == [0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_by_exif_is_diagnosed(tmp_path: Path, orientation: int) -> None:
    annotations = split(tmp_path / "a", ["0.jpg"])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", SIZE).save(tmp_path / "a" / "0.jpg", exif=exif)
    found = bad_of(annotations)
    if orientation < 5:
        assert found == {}
    else:
        assert "stated as 40x30, but the file is 30x40: width and height are swapped, the file is rotated" in found[0]


@pytest.mark.parametrize(
    ("orientation", "size", "unseen"), [(1, SIZE, 0), (3, SIZE, 1), (2, SIZE, 1), (6, (40, 40), 1)]
)
def test_rotation_that_leaves_the_size_is_counted(
    tmp_path: Path, orientation: int, size: tuple[int, int], unseen: int
) -> None:
    annotations = split(tmp_path / "a", ["0.jpg", "1.jpg"])
    annotations.sizes[0] = size[::-1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(tmp_path / "a" / "0.jpg", exif=exif)
    report = DataReport()
    examine({"train": annotations}, report, max_pixels=MAX_PIXELS)
    assert report.faults == []
    assert len([line for line in report.warnings if "images: 1 are turned by EXIF" in line]) == unseen


def test_images_that_look_alike_are_counted(tmp_path: Path) -> None:
    splits = {name: split(tmp_path / name, ["0.jpg", "1.jpg"]) for name in ("train", "val")}
    blobs = Image.frombytes("L", (8, 6), bytes(37 * n % 256 for n in range(48)))
    picture = blobs.resize(SIZE, Image.Resampling.BICUBIC).convert("RGB")
    picture.save(tmp_path / "train" / "1.jpg", quality=95)
    picture.save(tmp_path / "val" / "0.jpg", quality=60)
    report = DataReport()
    examine(splits, report, max_pixels=MAX_PIXELS)
    (line,) = [line for line in report.warnings if "look like" in line]
    assert line.startswith(f"{tmp_path}/val.json: images: 1 look like")
    assert "0.jpg and 1.jpg" in line


def test_swapped_without_exif_and_otherwise_wrong(tmp_path: Path) -> None:
    annotations = split(tmp_path / "a", ["0.bmp", "1.bmp"])
    Image.new("RGB", (30, 40)).save(tmp_path / "a" / "0.bmp")
    Image.new("RGB", (80, 60)).save(tmp_path / "a" / "1.bmp")
    found = bad_of(annotations)
    assert found[0].endswith("the file is 30x40: width and height are swapped - swap them")
    assert "rotated" not in found[1]
    assert found[1].endswith("the file is 80x60 - correct the image's width, height and boxes")


def test_undecodable_images_are_found_in_order(tmp_path: Path) -> None:
    annotations = split(tmp_path / "a", [f"{i}.png" for i in range(6)])
    for i in range(6):
        Image.effect_noise(SIZE, 50).save(tmp_path / "a" / f"{i}.png", "PNG")
    for i in (1, 4):
        file = tmp_path / "a" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:200])
    assert check_files(annotations, max_pixels=MAX_PIXELS).bad == {}, "their headers are whole"
    faults = list(undecodable(annotations, [5, 4, 3, 1], max_pixels=MAX_PIXELS))
    assert [fault and fault.split(": ")[0] for fault in faults] == [
        None,
        str(tmp_path / "a" / "4.png"),
        None,
        str(tmp_path / "a" / "1.png"),
    ]


def warnings_of(train: Annotations, val: Annotations) -> list[str]:
    report = DataReport()
    examine({"train": train, "val": val}, report, max_pixels=MAX_PIXELS)
    assert report.faults == []
    return report.warnings


def test_only_equal_bytes_make_images_the_same(tmp_path: Path) -> None:
    """All files have equal lengths and shapes, and two of them equal names."""
    train = split(tmp_path / "train", ["0.bmp", "1.bmp", "2.bmp"], colour=0)
    val = split(tmp_path / "val", ["1.bmp", "a.bmp", "b.bmp"], colour=1)
    lengths = {os.path.getsize(split.path(row)) for split in (train, val) for row in range(3)}
    assert len(lengths) == 1
    assert warnings_of(train, val) == []
    (tmp_path / "val" / "b.bmp").write_bytes((tmp_path / "train" / "0.bmp").read_bytes())
    (line,) = warnings_of(train, val)
    assert f"{val.file}: image 2 (b.bmp): has the same bytes as image 0 (0.bmp) of {train.file} - " in line


def test_bad_files_are_the_same_as_none(tmp_path: Path) -> None:
    train, val = split(tmp_path / "train", ["0.bmp"]), split(tmp_path / "val", ["0.bmp"], colour=1)
    for annotations in (train, val):
        annotations.path(0).write_bytes(b"")
    report = DataReport()
    examine({"train": train, "val": val}, report, max_pixels=MAX_PIXELS)
    assert (len(report.faults), report.warnings) == (2, [])


def test_classes_that_one_split_lacks(tmp_path: Path) -> None:
    train = split(tmp_path / "train", ["0.bmp"], labels=[1, 2, 2])
    val = split(tmp_path / "val", ["0.bmp"], labels=[1], colour=1, classes=train.classes)
    (line,) = warnings_of(train, val)
    assert line.startswith(f"{val.file}: categories: no object of dog, of which {train.file} ")
    (line,) = warnings_of(val, train)
    assert line.startswith(f"{val.file}: categories: no object of dog, of which {train.file} ")


def test_other_ids_are_told_once(tmp_path: Path) -> None:
    train = split(tmp_path / "train", ["0.bmp"], labels=[1, 2])
    val = split(
        tmp_path / "val", ["0.bmp"], labels=[7, 8], categories=[(7, "dog"), (8, "cat")], colour=1, classes=train.classes
    )
    (line,) = warnings_of(train, val)
    assert "(cat is 1 and 8, dog is 2 and 7)" in line
    fewer = split(tmp_path / "few", ["0.bmp"], labels=[1], categories=[(1, "cat")], colour=2, classes=train.classes)
    assert not any("cat is 1" in line for line in warnings_of(train, fewer))


def test_one_file_as_both_splits(tmp_path: Path) -> None:
    train = split(tmp_path / "train", ["0.bmp"])
    again = read_coco(train.file, train.image_root)
    (line,) = warnings_of(train, again)
    assert "is both train and val" in line
    report = DataReport()
    examine({"train": train, "val": train}, report, max_pixels=MAX_PIXELS)
    assert report.warnings == [], "without an evaluation, both are the same object"


def test_a_file_that_vanishes_while_it_is_compared(tmp_path: Path) -> None:
    train = split(tmp_path / "train", ["0.bmp", "1.bmp"])
    val = split(tmp_path / "val", ["0.bmp", "1.bmp"])
    report = DataReport()
    files = {"train": check_files(train, max_pixels=MAX_PIXELS), "val": check_files(val, max_pixels=MAX_PIXELS)}
    train.path(0).unlink()
    val.path(1).unlink()
    compare_splits(train, val, report, files)
    assert report.warnings == []


def test_images_that_no_record_names_are_counted_by_folder(tmp_path: Path) -> None:
    train = split(tmp_path / "a", ["0.bmp", "sub/1.bmp", "sub/2.bmp"])
    val = split(tmp_path / "b", ["3.bmp"])
    assert list(unnamed_images({"train": train, "val": val})) == []
    for name in ("a/new.BMP", "a/sub/x.jpg", "a/sub/y.png", "a/notes.txt", "a/.hidden.jpg", "elsewhere.jpg"):
        (tmp_path / name).touch()
    lines = list(unnamed_images({"train": train, "val": val}))
    assert [line.partition(": ")[2].split()[0] for line in lines] == ["1", "2"]
    assert lines[0].startswith(f"{tmp_path / 'a'}: ")
    assert all(name in lines[1] for name in ("x.jpg", "y.png"))


def test_images_of_another_split_in_the_same_folder_are_named(tmp_path: Path) -> None:
    train = split(tmp_path / "a", ["0.bmp", "1.bmp"])
    (tmp_path / "b").symlink_to(tmp_path / "a")
    val = split(tmp_path / "b", ["2.bmp", "3.bmp"], draw=True)
    assert list(unnamed_images({"train": train, "val": val})) == []
    assert len(list(unnamed_images({"train": train}))) == 1
