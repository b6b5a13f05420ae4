"""The VOC reader: every fault with its file and line, coordinate conventions, splits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faults import refused
from retina.data.convert.records import Records
from retina.data.convert.voc import read_voc
from retina.errors import DataError

OBJECT = """
 <object><name>{name}</name><difficult>{difficult}</difficult>
  <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
 </object>"""


def an_object(*edges: object, name: str = "cat", difficult: object = 0) -> str:
    return OBJECT.format(*edges, name=name, difficult=difficult)


def add(root: Path, name: str, content: str = "", *, size: tuple[int, int] = (40, 30), orientation: int = 1) -> None:
    """An image of (width, height) and its XML, whose first line is <annotation>."""
    add_image(root, name, size, orientation)
    xml = root / "Annotations" / f"{name}.xml"
    xml.parent.mkdir(parents=True, exist_ok=True)
    xml.write_text(f"<annotation>{content}\n</annotation>\n")


def add_image(root: Path, name: str, size: tuple[int, int] = (40, 30), orientation: int = 1) -> None:
    file = root / "JPEGImages" / f"{name}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (90, 120, 30)).save(file, exif=exif)


def a_list(root: Path, split: str, *names: str) -> None:
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}\n" for name in names))


def read_one(root: Path, content: str, **options: object) -> Records:
    """Read a data set whose image `a` has the given XML; `b` is a sound negative for val."""
    add(root, "a", content)
    add(root, "b")
    a_list(root, "train", "a")
    a_list(root, "val", "b")
    return read_voc(root, **options)  # type: ignore[arg-type]


def test_boxes_are_the_edges_of_the_xml(tmp_path: Path) -> None:
    reading = read_one(tmp_path, an_object(1, 2, 40, 30) + an_object(0, 0.25, 7.5, 9, name="dog"))
    assert [item.box for item in reading.train[0].objects] == [(1, 2, 40, 30), (0, 0.25, 7.5, 9)]
    assert reading.classes == ("cat", "dog")
    assert reading.train[0].size == (30, 40)
    assert reading.val[0].objects == ()
    assert reading.faults == ()


def test_one_based_subtracts_from_the_first_edges_only(tmp_path: Path) -> None:
    reading = read_one(tmp_path, an_object(1, 1, 40, 30) + an_object(5, 5, 5, 5), one_based=True)
    assert [item.box for item in reading.train[0].objects] == [(0, 0, 40, 30), (4, 4, 5, 5)]


@pytest.mark.parametrize(("choice", "crowd"), [("keep", [False, False]), ("crowd", [True, False]), ("drop", [False])])
def test_difficult(tmp_path: Path, choice: str, crowd: list[bool]) -> None:
    reading = read_one(tmp_path, an_object(1, 2, 9, 9, difficult=1) + an_object(3, 3, 9, 9), difficult=choice)
    assert [item.crowd for item in reading.train[0].objects] == crowd


def test_parts_of_an_object_are_not_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"
    content = an_object(1, 1, 9, 9, name="person").replace("<bndbox>", part + "<bndbox>", 1)
    assert [item.box for item in read_one(tmp_path, content).train[0].objects] == [(1, 1, 9, 9)]


def test_a_pixel_of_overhang_is_clipped(tmp_path: Path) -> None:
    reading = read_one(tmp_path, an_object(-1, 5, 41, 30.5))
    assert reading.train[0].objects[0].box == (0, 5, 40, 30)
    assert (reading.faults, reading.warnings) == ((), ())


def test_more_is_clipped_and_counted(tmp_path: Path) -> None:
    reading = read_one(tmp_path, an_object(1, -3, 49, 9) + an_object(1, 2, 9, 9))
    assert [item.box for item in reading.train[0].objects] == [(1, 0, 40, 9), (1, 2, 9, 9)]
    assert reading.faults == ()
    (warning,) = reading.warnings
    assert warning.startswith(f"{tmp_path}: 1 box")


@pytest.mark.parametrize(("orientation", "size", "count"), [(1, (40, 40), 0), (3, (40, 30), 1), (6, (40, 40), 1)])
def test_images_turned_without_a_change_of_size_are_counted(
    tmp_path: Path, orientation: int, size: tuple[int, int], count: int
) -> None:
    add(tmp_path, "a", an_object(1, 2, 9, 9), size=size, orientation=orientation)
    add(tmp_path, "b")
    reading = read_voc(tmp_path)
    assert reading.faults == ()
    assert len([line for line in reading.warnings if "1 images are turned by EXIF" in line]) == count


def test_frames_of_a_video_come_into_one_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for clip in range(10):
        scene = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        for frame in range(4):
            add(tmp_path, f"clip{clip}_{frame:03}", an_object(1, 2, 9, 9))
            picture = Image.fromarray(np.clip(scene.astype(int) + 2 * frame, 0, 255).astype(np.uint8))
            picture.resize((40, 30)).save(tmp_path / "JPEGImages" / f"clip{clip}_{frame:03}.jpg")
    for seed in range(3):
        reading = read_voc(tmp_path, val_fraction=0.2, seed=seed)
        clips = [{record.file_name.partition("_")[0] for record in part} for part in (reading.train, reading.val)]
        assert (len(reading.train), len(reading.val)) == (32, 8)
        assert clips[0].isdisjoint(clips[1])
        assert len([line for line in reading.warnings if "40 images are of 10 scenes" in line]) == 1


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        (an_object(1, "two", 9, 9), 3, "ymin is 'two'"),
        (an_object(1, 2, "nan", 9), 3, "nan"),
        (an_object(1, 2, "inf", 9), 3, "inf"),
        (an_object(5, 2, 5, 9), 3, "width 0, height 7"),
        (an_object(9, 2, 5, 9), 3, "width -4, height 7"),
        (an_object(40, 2, 41, 9), 3, "image"),
        (an_object(1, 2, 9, 9, name=" "), 2, "<name>"),
        (an_object(1, 2, 9, 9, difficult="yes"), 3, "difficult is 'yes'"),
        (f"\n\n <object>{BOX}</object>", 3, "<name>"),
        ("\n <object><name>cat</name></object>", 2, "<bndbox><xmin>"),
        ("\n <object><name>cat</name>\n" + BOX.replace("<ymax>9</ymax>", "") + "</object>", 3, "<bndbox><ymax>"),
        ("\n <size>\n<width>30</width><height>40</height></size>", 2, "40x30"),
        ("\n <object>\n </wrong>", 3, "XML"),
        ("\n <object>&bomb;</object>", 2, "XML"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, content: str, line: int, problem: str) -> None:
    faults = read_one(tmp_path, content).faults
    assert len(faults) == 1, faults
    assert (faults[0].file, faults[0].line) == (tmp_path / "Annotations" / "a.xml", line)
    assert problem in faults[0].text
    assert str(faults[0]).startswith(f"{tmp_path / 'Annotations' / 'a.xml'}:{line}: ")
    assert " - " in str(faults[0])
    assert "\n" not in str(faults[0])


def test_a_faulty_object_leaves_the_others(tmp_path: Path) -> None:
    reading = read_one(tmp_path, an_object(1, 2, 9, 9) + an_object(5, 5, 5, 5) + an_object(3, 3, 4, 4))
    assert [item.box for item in reading.train[0].objects] == [(1, 2, 9, 9), (3, 3, 4, 4)]
    assert [fault.line for fault in reading.faults] == [6]


def test_unknown_class_names_the_nearest(tmp_path: Path) -> None:
    (fault,) = read_one(tmp_path, an_object(1, 2, 9, 9, name="Cat"), classes=["dog", "cat"]).faults
    assert fault.line == 2
    assert all(name in fault.text for name in ("'Cat'", "'cat'"))


def test_given_classes_keep_their_order(tmp_path: Path) -> None:
    content = an_object(1, 2, 9, 9) + an_object(1, 2, 9, 9, name="ant")
    assert read_one(tmp_path, content, classes=["zebra", "cat", "ant"]).classes == ("zebra", "cat", "ant")


def test_missing_files_are_faults(tmp_path: Path) -> None:
    add(tmp_path, "a", an_object(1, 2, 9, 9))
    add(tmp_path, "b")
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    add(tmp_path, "broken")
    (tmp_path / "JPEGImages" / "broken.jpg").write_bytes(b"no image")
    a_list(tmp_path, "train", "a", "no_xml", "../a", "b")
    a_list(tmp_path, "val", "broken")
    reading = read_voc(tmp_path)
    train = tmp_path / "ImageSets" / "Main" / "train.txt"
    annotations = tmp_path / "Annotations"
    assert [(fault.file, fault.line) for fault in reading.faults] == [
        (train, 2),
        (train, 3),
        (annotations / "b.xml", 1),
        (annotations / "broken.xml", 1),
    ]
    assert "no_xml.xml" in reading.faults[0].text
    assert len(reading.train) == 1
    assert reading.val == ()


def test_doctype_is_refused_before_any_entity(tmp_path: Path) -> None:
    add(tmp_path, "b")
    add_image(tmp_path, "a")
    entities = "".join(f'\n<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "ha"}">' for i in range(30))
    xml = f"<?xml version='1.0'?>\n<!DOCTYPE annotation [{entities}]>\n<annotation>&e29;</annotation>"
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "Annotations" / "a.xml").write_bytes(xml.encode(encoding))
        (fault,) = read_voc(tmp_path).faults
        assert (fault.line, "DOCTYPE" in fault.text) == (2, True)


def test_other_xml_is_no_negative_image(tmp_path: Path) -> None:
    add(tmp_path, "b")
    add(tmp_path, "a")
    (tmp_path / "Annotations" / "a.xml").write_text("<annotations><image/></annotations>")
    reading = read_voc(tmp_path)
    assert "<annotations>" in reading.faults[0].text
    assert len(reading.train) + len(reading.val) == 1


def test_size_is_that_after_exif_rotation(tmp_path: Path) -> None:
    content = "\n<size><width>30</width><height>40</height></size>" + an_object(1, 2, 30, 40)
    add(tmp_path, "a", content, size=(40, 30), orientation=6)
    add(tmp_path, "b")
    a_list(tmp_path, "train", "a")
    a_list(tmp_path, "val", "b")
    reading = read_voc(tmp_path)
    assert reading.faults == ()
    assert reading.train[0].size == (40, 30)
    assert reading.train[0].objects[0].box == (1, 2, 30, 40)


@pytest.mark.parametrize(
    ("lists", "train", "val"),
    [
        ({"train": "ab", "val": "cd", "trainval": "abcd", "test": "ef"}, "ab", "cd"),
        ({"trainval": "abcd", "val": "cd"}, "ab", "cd"),
        ({"trainval": "abcd", "test": "ef"}, "abcd", "ef"),
        ({"train": "ba", "test": "fe"}, "ba", "fe"),
    ],
)
def test_split_lists(tmp_path: Path, lists: dict[str, str], train: str, val: str) -> None:
    for name in "abcdef":
        add(tmp_path, name)
    for split, names in lists.items():
        a_list(tmp_path, split, *names)
    reading = read_voc(tmp_path)
    assert "".join(record.image.stem for record in reading.train) == train
    assert "".join(record.image.stem for record in reading.val) == val
    rest = set(lists.get("test", "")) - set(val)
    assert {record.image.stem for record in reading.test} == rest
    assert bool(reading.warnings) == (len({*train, *val, *rest}) < 6)  # XML in no list is counted


def test_drawn_split_is_deterministic_and_whole(tmp_path: Path) -> None:
    for i in range(10):
        add(tmp_path, f"sub{i % 2}/{i}")
    draws = [read_voc(tmp_path, val_fraction=0.3, seed=seed) for seed in (0, 0, 1)]
    names = [[record.file_name for record in draw.val] for draw in draws]
    assert len(names[0]) == 3
    assert names[0] == names[1]
    assert names[0] != names[2]
    everything = {record.file_name for record in draws[0].train + draws[0].val}
    assert everything == {f"sub{i % 2}/{i}.jpg" for i in range(10)}


def test_a_lone_train_list_is_divided(tmp_path: Path) -> None:
    for name in "abcdef":
        add(tmp_path, name)
    a_list(tmp_path, "train", *"abcde")
    reading = read_voc(tmp_path)
    assert len(reading.train) == 4
    assert len(reading.val) == 1
    assert "f" not in {record.image.stem for record in reading.train + reading.val}


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    with refused("not-voc", "Annotations/", kind=DataError):
        read_voc(tmp_path)
    add(tmp_path, "a")
    with refused("too-few-images", "1 image", kind=DataError):
        read_voc(tmp_path)
    a_list(tmp_path, "val", "a")
    with refused("no-train-list", tmp_path, kind=DataError):
        read_voc(tmp_path)


def move(root: Path, *moves: tuple[str, str]) -> None:
    for old, new in moves:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


LAYOUTS = [("annotations", "images"), (".", "."), ("Annotations", "."), (".", "Images")]


@pytest.mark.parametrize(("xmls", "images"), LAYOUTS)
def test_other_layouts(tmp_path: Path, xmls: str, images: str) -> None:
    """labelImg keeps XML beside images, others call the folders images/ and annotations/, in any case."""
    for name in "abc":
        add(tmp_path / "made", name, an_object(1, 2, 9, 9))
        move(tmp_path, (f"made/Annotations/{name}.xml", f"set/{xmls}/{name}.XML"))
        move(tmp_path, (f"made/JPEGImages/{name}.jpg", f"set/{images}/{name}.JPG"))
        (tmp_path / "set" / xmls / f"._{name}.xml").write_bytes(b"\0\5\26\7")
    reading = read_voc(tmp_path / "set")
    assert (reading.faults, reading.warnings) == ((), ())
    assert sorted(record.file_name for record in reading.train + reading.val) == ["a.JPG", "b.JPG", "c.JPG"]


def test_split_folders(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "valid/c", "test/d"):
        add(tmp_path, name, an_object(1, 2, 9, 9))
        move(tmp_path, (f"Annotations/{name}.xml", f"{name}.xml"), (f"JPEGImages/{name}.jpg", f"{name}.jpg"))
    reading = read_voc(tmp_path)
    splits = (reading.train, reading.val, reading.test)
    assert [[record.file_name for record in split] for split in splits] == [
        ["train/a.jpg", "train/b.jpg"],
        ["valid/c.jpg"],
        ["test/d.jpg"],
    ]


def named(name: str) -> str:
    return f"<filename>{name}</filename>" + an_object(1, 2, 9, 9)


def test_an_image_is_what_its_xml_names(tmp_path: Path) -> None:
    add(tmp_path, "a", named("photo.jpg"))
    move(tmp_path, ("JPEGImages/a.jpg", "JPEGImages/photo.jpg"))
    add(tmp_path, "b", named("renamed since.jpg"))
    add(tmp_path, "c.v2", named("C:\\labels\\c.v2.jpg"))
    reading = read_voc(tmp_path)
    assert (reading.faults, reading.warnings) == ((), ())
    assert sorted(record.file_name for record in reading.train + reading.val) == ["b.jpg", "c.v2.jpg", "photo.jpg"]


def test_images_of_one_name_or_one_image_of_two_xmls_are_faults(tmp_path: Path) -> None:
    for name in "abcde":
        add(tmp_path, name, an_object(1, 2, 9, 9))
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / "a.png")
    add(tmp_path, "f", named("e.jpg"))
    reading = read_voc(tmp_path)
    faulty = {fault.file.name for fault in reading.faults}
    assert faulty - {"e.xml", "f.xml"} == {"a.xml"}
    assert len(faulty) == 2
    assert not {"a.jpg", "a.png"} & {record.file_name for record in reading.train + reading.val}
    xml = tmp_path / "Annotations" / "a.xml"
    xml.write_text(xml.read_text().replace("<annotation>", "<annotation><filename>a.png</filename>"))
    assert "a.png" in {record.file_name for record in read_voc(tmp_path).train + read_voc(tmp_path).val}


def test_a_picture_of_faulty_objects_is_no_negative(tmp_path: Path) -> None:
    reading = read_one(tmp_path, an_object(5, 5, 5, 5))
    assert len(reading.faults) == 1
    assert reading.train == ()


def test_images_without_xml_are_counted(tmp_path: Path) -> None:
    for name in "abc":
        add(tmp_path, name, an_object(1, 2, 9, 9))
    for name in "uvwxyz":
        add_image(tmp_path, name)
    (warning,) = read_voc(tmp_path).warnings
    assert "6 images" in warning


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    for name in "abc":
        add(tmp_path, name, an_object(1, 2, 9, 9))
    for name in ("clip.mp4", "scan.pdf"):
        (tmp_path / name).write_bytes(b"\0\1\2")
    (warning,) = read_voc(tmp_path).warnings
    assert ": 2 files" in warning
    assert all(name in warning for name in ("clip.mp4", "scan.pdf"))


def test_rotated_boxes_become_the_boxes_around_them(tmp_path: Path) -> None:
    rotation = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes></object>"
    content = an_object(10, 12, 30, 18).replace("</object>", rotation.format("90.0"))
    reading = read_one(tmp_path, content + an_object(1, 2, 9, 9).replace("</object>", rotation.format("0.0")))
    assert [item.box for item in reading.train[0].objects] == [(17, 5, 23, 25), (1, 2, 9, 9)]
    (fault,) = read_one(tmp_path, content.replace("90.0", "askew")).faults
    assert "rotation" in fault.text


def test_alike_classes_and_repeated_objects_are_told(tmp_path: Path) -> None:
    boxes = an_object(1, 2, 9, 9) + an_object(1, 2, 9, 9) + an_object(3, 2, 9, 9, name="Cat")
    repeated, alike = read_one(tmp_path, boxes).warnings
    assert "1 object" in repeated
    assert "'Cat'" in alike
