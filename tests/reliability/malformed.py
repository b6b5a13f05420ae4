"""Data sets with one thing wrong: real files, one mutation each of a valid set, and what is to be said of it."""

import gzip
import io
import json
import os
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Json = Any
WIDTH, HEIGHT = 40, 30
BOXES = [[1.0, 2.0, 10.0, 8.0], [20.5, 10.25, 12.0, 15.5], [5.0, 15.0, 30.0, 12.0]]
"""Sound as [x, y, width, height]; their corners fill the image, so that written as corners they are told apart."""


def picture(seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def document(first: int, images: int) -> Json:
    names = ["cat", "dog", "owl"]
    numbers = range(first, first + images)
    return {
        "images": [{"id": i, "file_name": f"image_{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in numbers],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "category_id": k + 1, "bbox": list(box)}
            for i in numbers
            for k, box in enumerate(BOXES)
        ],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)],
    }


def write_valid(root: Path) -> Path:
    """Six images to train on, three to evaluate on, three boxes of three classes on each."""
    (root / "annotations").mkdir(parents=True)
    for split, first, images in (("train", 1, 6), ("val", 101, 3)):
        (root / split).mkdir()
        content = document(first, images)
        for image in content["images"]:
            picture(image["id"]).save(root / split / image["file_name"])
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


class Data:
    """A data set to be spoilt."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "annotations" / "instances_train.json"
        self.val_file = root / "annotations" / "instances_val.json"
        self.images = root / "train"

    def edit(self, change: Callable[[Json], object], *, file: Path | None = None) -> None:
        file = file or self.file
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))


class Case(NamedTuple):
    spoil: Callable[[Data], object]
    parts: tuple[str, ...]
    """What the one line must hold, beside the name of a file and ` - `."""
    exit_code: int = 2
    overrides: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def case(name: str, *parts: str, exit_code: int = 2, overrides: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    def keep(spoil: Callable[[Data], object]) -> Callable[[Data], object]:
        assert name not in CASES
        CASES[name] = Case(spoil, parts, exit_code, overrides)
        return spoil

    return keep


def bytes_case(name: str, change: Callable[[bytes], bytes], *parts: str, exit_code: int = 2) -> None:
    case(name, "instances_train.json: ", *parts, exit_code=exit_code)(
        lambda data: data.file.write_bytes(change(data.file.read_bytes()))
    )


def record_case(name: str, section: str, row: int, changes: Json, *parts: str, exit_code: int = 2) -> None:
    """One record of the training file with other values; `...` takes a key away, and no dict replaces the record."""

    def change(content: Json) -> None:
        if not isinstance(changes, dict):
            content[section][row] = changes
            return
        for key, value in changes.items():
            content[section][row][key] = value
            if value is ...:
                del content[section][row][key]

    case(name, "instances_train.json: ", *parts, exit_code=exit_code)(lambda data: data.edit(change))


def zipped(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("instances_train.json", data)
    return stream.getvalue()


AGAIN = "export it again"
bytes_case("truncated", lambda data: data[: len(data) // 2], "is cut off after", "finish its download")
bytes_case("truncated behind a record", lambda data: data[: data.index(b"},") + 1], "is cut off after", AGAIN)
bytes_case("empty file", lambda data: b"", "is empty (0 bytes)", AGAIN)
bytes_case("blank file", lambda data: b" \n\n", "is empty (3 bytes)", AGAIN)
bytes_case("not JSON", lambda data: b"images: 6\n", "is not JSON (Expecting value: line 1 column 1", AGAIN)
bytes_case("invalid UTF-8", lambda data: data.replace(b"cat", b"c\xe4t"), "is not JSON ('utf-8' codec", AGAIN)
bytes_case("nested too deep", lambda data: b"[" * 200_000 + b"]" * 200_000, "is not JSON (maximum recursion", AGAIN)
bytes_case("number too long", lambda data: data.replace(b"40", b"4" * 5000, 1), "is not JSON (Exceeds the limit", AGAIN)
bytes_case("UTF-8 BOM", lambda data: b"\xef\xbb\xbf" + data, "byte order mark (BOM)", "save it as UTF-8", exit_code=0)
bytes_case("UTF-16", lambda data: data.decode().encode("utf-16"), "byte order mark (BOM)", "save it as", exit_code=0)
bytes_case("gzip", gzip.compress, "is compressed with gzip, not JSON", "unpack it with gunzip")
bytes_case("zip", zipped, "is a zip archive, not JSON", "unpack it")
bytes_case("XML", lambda data: b"<annotation></annotation>", "is XML or HTML", "tools/convert.py")
bytes_case("Git LFS pointer", lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "git lfs pull")
bytes_case("results list", lambda data: json.dumps(json.loads(data)["annotations"]).encode(), "is a list", "`images`")
bytes_case("a number", lambda data: b"7", "holds a int, not an object", "give a COCO annotation file")
for section in ("images", "annotations", "categories"):
    case(f"no {section}", "instances_train.json: ", f"`{section}` is missing (there is", AGAIN)(
        lambda data, section=section: data.edit(lambda content: content.pop(section))
    )
    case(f"{section} no list", "instances_train.json: ", f"`{section}` is not a list", AGAIN)(
        lambda data, section=section: data.edit(lambda content: content.update({section: {"1": {}}}))
    )
for section in ("images", "categories"):
    case(f"{section} empty", "instances_train.json: ", f"`{section}` is empty", "at least one record")(
        lambda data, section=section: data.edit(lambda content: content.update({section: []}))
    )

record_case("category id twice", "categories", 1, {"id": 1}, "category 1: id is already that of 'cat'", "its own id")
record_case(
    "category name twice", "categories", 1, {"name": "cat"}, "category 2: name 'cat' is already", "merge the two"
)
record_case("category without name", "categories", 1, {"name": ...}, "categories[1]: has no `name`", "add it")
record_case("category name blank", "categories", 1, {"name": " "}, "category 2: name ' ' is no text", "a name")
record_case(
    "category id text", "categories", 1, {"id": "b"}, "categories[1]: id 'b' is not a whole", "number the categ"
)

record_case(
    "image no object", "images", 2, "image_3.jpg", "images[2]: is 'image_3.jpg', not an object", "write an object"
)
record_case("image without id", "images", 2, {"id": ...}, "images[2]: has no `id`", "add it")
record_case("image id half", "images", 2, {"id": 3.5}, "images[2]: id 3.5 is not a whole number", "number the images")
record_case(
    "image id twice", "images", 2, {"id": 2}, "image 2 (image_3.jpg): id is already that of image_2", "its own id"
)
record_case("image without width", "images", 2, {"width": ...}, "images[2]: has no `width`", "add it")
record_case(
    "width text", "images", 2, {"width": "40"}, "image 3 (image_3.jpg): width '40' and height 30", "the image's pixels"
)
record_case(
    "width infinite", "images", 2, {"width": float("inf")}, "image 3 (image_3.jpg): width inf", "the image's pixels"
)
record_case(
    "height zero", "images", 2, {"height": 0}, "image 3 (image_3.jpg): width 40 and height 0", "the image's pixels"
)
record_case("width a half", "images", 2, {"width": 39.5}, "image 3 (image_3.jpg): width 39.5", "the image's pixels")
record_case("no file_name", "images", 2, {"file_name": ...}, "images[2]: has no `file_name`", "add it")
record_case(
    "file_name a number", "images", 2, {"file_name": 3}, "image 3 (3): file_name 3 is no text", "give the image's path"
)
record_case(
    "file_name empty", "images", 2, {"file_name": ""}, "image 3 (): file_name '' is no text", "give the image's path"
)
record_case(
    "file_name twice", "images", 2, {"file_name": "image_2.jpg"}, "image 3 (image_2.jpg): file_name is", "merge"
)
record_case(
    "file_name twice, dotted", "images", 2, {"file_name": "./image_2.jpg"}, "is already that of image 2", "merge"
)

INSIDE = "write it relative to the image folder, with /, or set allow_outside=true"
record_case("path up", "images", 2, {"file_name": "../train/image_3.jpg"}, "leads out of the image folder", INSIDE)
record_case("path in and up", "images", 2, {"file_name": "a/../../val/image_101.jpg"}, "leads out of the image", INSIDE)
record_case(
    "path absolute", "images", 2, {"file_name": "/etc/hostname"}, "image 3 (/etc/hostname): file_name is an", INSIDE
)
record_case("path with drive", "images", 2, {"file_name": "C:/image_3.jpg"}, "file_name names a drive", INSIDE)
record_case("path with backslash", "images", 2, {"file_name": "a\\image_3.jpg"}, "file_name has backslashes", INSIDE)
record_case(
    "path with NUL", "images", 2, {"file_name": "a\0.jpg"}, r"image 3 (a\x00.jpg): file_name holds", "correct it"
)
record_case(
    "path no text", "images", 2, {"file_name": "\ud800.jpg"}, r"(\ud800.jpg): file_name holds char", "correct it"
)

WHO = "annotation 31 of image 3 (image_3.jpg): "
record_case(
    "annotation no object", "annotations", 7, [1, 2], "annotations[7]: is [1, 2], not an object", "write an object"
)
record_case("without image_id", "annotations", 7, {"image_id": ...}, "annotation 31: has no `image_id`", "add it")
record_case("without category_id", "annotations", 7, {"category_id": ...}, WHO + "has no `category_id`", "add it")
record_case("without bbox", "annotations", 7, {"bbox": ...}, WHO + "has no `bbox`", "add it")
record_case(
    "image unknown", "annotations", 7, {"image_id": 77}, "annotation 31: image_id 77 is not in `im", "add the image"
)
record_case("image id as text", "annotations", 7, {"image_id": "03"}, "image_id '03' is not in", "add the image")
record_case(
    "category unknown", "annotations", 7, {"category_id": 9}, WHO + "category_id 9 is not in", "add the category"
)
record_case("category id 2.5", "annotations", 7, {"category_id": 2.5}, WHO + "category_id 2.5 is", "add the category")
record_case("category null", "annotations", 7, {"category_id": None}, WHO + "category_id None", "add the category")
FOUR = "write [x, y, width, height] in pixels"
record_case("bbox null", "annotations", 7, {"bbox": None}, WHO + "bbox None is not four finite numbers", FOUR)
record_case(
    "bbox of text", "annotations", 7, {"bbox": ["1", "2", "3", "4"]}, WHO + "bbox ['1', '2', '3', '4'] is", FOUR
)
record_case("bbox NaN", "annotations", 7, {"bbox": [1, 2, float("nan"), 4]}, WHO + "bbox [1, 2, nan, 4] is not", FOUR)
record_case("bbox Infinity", "annotations", 7, {"bbox": [1, 2, float("inf"), 4]}, WHO + "bbox [1, 2, inf, 4] is", FOUR)
bytes_case("bbox 1e999", lambda data: data.replace(b"12.0", b"1e999", 1), "bbox [20.5, 10.25, inf, 15.5]", FOUR)
record_case("bbox nested", "annotations", 7, {"bbox": [[1, 2, 3, 4]]}, WHO + "bbox [[1, 2, 3, 4]] is not four", FOUR)
record_case("bbox short", "annotations", 7, {"bbox": [1, 2, 3]}, WHO + "bbox [1, 2, 3] is not four", FOUR)
record_case("bbox long", "annotations", 7, {"bbox": [1, 2, 3, 4, 5]}, WHO + "bbox [1, 2, 3, 4, 5] is not four", FOUR)
record_case("bbox true", "annotations", 7, {"bbox": [1, 2, True, 4]}, WHO + "bbox [1, 2, True, 4] is not four", FOUR)
record_case(
    "bbox negative", "annotations", 7, {"bbox": [9, 9, -5, 5]}, WHO + "bbox [9, 9, -5, 5] has a negative", "correct"
)
record_case(
    "bbox outside", "annotations", 7, {"bbox": [41, 2, 3, 4]}, WHO + "bbox [41, 2, 3, 4] lies outside the", "width and"
)
record_case(
    "bbox at the edge", "annotations", 7, {"bbox": [40, 2, 3, 4]}, WHO + "bbox [40, 2, 3, 4] lies outside", "correct"
)
record_case(
    "bbox huge", "annotations", 7, {"bbox": [1, 2, 1e300, 4]}, WHO + "bbox [1, 2, 1e+300, 4] is larger", "correct"
)
record_case(
    "bbox leaving",
    "annotations",
    7,
    {"bbox": [30, 2, 14, 4]},
    WHO + "bbox [30, 2, 14, 4] leaves the image of 40x30 by 4 px",
    "correct",
    exit_code=0,
)
record_case(
    "bbox before 0",
    "annotations",
    7,
    {"bbox": [-2, 2, 14, 4]},
    "leaves the image of 40x30 by 2 px",
    "correct",
    exit_code=0,
)
record_case(
    "bbox without area",
    "annotations",
    7,
    {"bbox": [3, 2, 14, 0]},
    WHO + "bbox [3, 2, 14, 0] has no area",
    "correct",
    exit_code=0,
)
record_case(
    "bbox below a pixel",
    "annotations",
    7,
    {"bbox": [3, 2, 0.4, 9]},
    WHO + "bbox [3, 2, 0.4, 9] is less than a",
    "check its units",
    exit_code=0,
)
record_case("area text", "annotations", 7, {"area": "9"}, WHO + "area '9' is not a number from 0 up", "leave it out")
record_case("area negative", "annotations", 7, {"area": -9}, WHO + "area -9 is not a number from 0 up", "leave it out")
record_case("iscrowd 2", "annotations", 7, {"iscrowd": 2}, WHO + "iscrowd 2 is neither 0 nor 1", "leave it out")
record_case(
    "annotation id twice",
    "annotations",
    7,
    {"id": 30},
    "annotations: id 30 used more than once",
    "renumber",
    exit_code=0,
)


@case("all boxes as corners", "annotations: the boxes are [x1, y1, x2, y2]", "write [x1, y1, x2 - x1, y2 - y1]")
def _(data: Data) -> None:
    def change(content: Json) -> None:
        for a in content["annotations"]:
            x, y, w, h = a["bbox"]
            a["bbox"] = [x, y, x + w, y + h]

    data.edit(change)


@case("all boxes as fractions", "annotations: 100% of the boxes lie within 0..1", "multiply x and width by the image's")
def _(data: Data) -> None:
    def change(content: Json) -> None:
        for a in content["annotations"]:
            a["bbox"] = [value / side for value, side in zip(a["bbox"], [WIDTH, HEIGHT] * 2, strict=True)]

    data.edit(change)


@case("nothing annotated", "instances_train.json: annotations: are empty", "annotate some images")
def _(data: Data) -> None:
    data.edit(lambda content: content.update(annotations=[]))


@case("only crowd regions", "instances_train.json: annotations: are crowd regions only", "annotate some images")
def _(data: Data) -> None:
    data.edit(lambda content: [a.update(iscrowd=1) for a in content["annotations"]])


@case(
    "names apart in case only", "image 99 (IMAGE_2.jpg): differs from image 2 (image_2.jpg)", "rename one", exit_code=0
)
def _(data: Data) -> None:
    picture(99).save(data.images / "IMAGE_2.jpg")
    new = {"id": 99, "file_name": "IMAGE_2.jpg", "width": WIDTH, "height": HEIGHT}
    data.edit(lambda content: content["images"].append(new))


@case("link out of the folder", "image 3 (image_3.jpg): a symbolic link leads out of", "allow_outside=true")
def _(data: Data) -> None:
    (data.images / "image_3.jpg").rename(data.root / "elsewhere.jpg")
    (data.images / "image_3.jpg").symlink_to("../elsewhere.jpg")


@case("folder that is a link out", "image 3 (sub/image_3.jpg): a symbolic link leads out", "copy the file there")
def _(data: Data) -> None:
    (data.images / "sub").symlink_to(data.root / "val")
    data.edit(lambda content: content["images"][2].update(file_name="sub/image_3.jpg"))


@case(
    "annotation file missing",
    "expected ",
    "instances_val.json or ",
    "put them there, or name them: data.val.annotations",
)
def _(data: Data) -> None:
    data.val_file.unlink()
    data.val_file.symlink_to("nowhere.json")


@case(
    "annotation file is a folder",
    "somewhere: is a folder",
    "give the path",
    overrides=("data.val.annotations=somewhere",),
)
def _(data: Data) -> None:
    Path("somewhere").mkdir(exist_ok=True)


@case("image folder missing", "split 'train': expected the images in ", "data.train.images=<folder>")
def _(data: Data) -> None:
    data.images.rename(data.root / "pictures")


def missing_case(name: str, there: str, stated: str, *parts: str) -> None:
    def spoil(data: Data) -> None:
        (data.images / there).parent.mkdir(exist_ok=True)
        (data.images / "image_3.jpg").rename(data.images / there)
        data.edit(lambda content: content["images"][2].update(file_name=stated))

    case(name, f"instances_train.json: image 3 ({stated}): no such image in ", *parts)(spoil)


missing_case("image missing", "image_300.jpeg.part", "image_3.jpg", "add the file, or correct the image folder")
missing_case("image misspelt", "imgae_3.jpg", "image_3.jpg", "did you mean 'imgae_3.jpg'?")
missing_case("image in a sub-folder", "sub/image_3.jpg", "image_3.jpg", "did you mean 'sub/image_3.jpg'?")
missing_case("image above", "image_3.jpg", "train/image_3.jpg", "did you mean 'image_3.jpg'?")
missing_case("image of another suffix", "image_3.png", "image_3.jpg", "did you mean 'image_3.png'?")
missing_case("image in another case", "Image_3.JPG", "image_3.jpg", "it is written 'Image_3.JPG' there")
missing_case(
    "accents encoded otherwise", unicodedata.normalize("NFD", "é.jpg"), "é.jpg", "it is written ", "file_name so"
)


@case(
    "size not the file's", "image 3 (image_3.jpg): stated as 40x30, but the file is 50x30", "correct the image's width"
)
def _(data: Data) -> None:
    picture(3, (50, 30)).save(data.images / "image_3.jpg")


@case(
    "size swapped",
    "image 3 (image_3.jpg): stated as 40x30, but the file is 30x40: width and height are swapped",
    "swap",
)
def _(data: Data) -> None:
    picture(3, (30, 40)).save(data.images / "image_3.jpg")


@case(
    "size before EXIF rotation", "the file is 30x40: width and height are swapped, the file is rotated by EXIF", "state"
)
def _(data: Data) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(3).save(data.images / "image_3.jpg", exif=exif)


def image_case(name: str, spoil: Callable[[Path], object], *parts: str, overrides: tuple[str, ...] = ()) -> None:
    def replace(data: Data) -> None:
        file = data.images / "image_3.jpg"
        content = file.read_bytes()
        file.unlink()
        if (new := spoil(file, content)) is not None:  # type: ignore[call-arg]
            file.write_bytes(new)

    case(name, "image_3.jpg: ", *parts, overrides=overrides)(replace)


def broken_png() -> bytes:
    stream = io.BytesIO()
    picture(3).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


def bomb() -> bytes:
    """A PNG whose header states 50,000 x 50,000 pixels."""
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


image_case("image truncated", lambda file, content: content[: len(content) // 2])
image_case("image of zero bytes", lambda file, content: b"")
image_case("text named .jpg", lambda file, content: b"an image of a cat\n")
image_case("PNG with a bad CRC", lambda file, content: broken_png())
image_case("decompression bomb", lambda file, content: bomb(), "max_pixels")
image_case("FIFO", lambda file, content: os.mkfifo(file))
image_case("image that is a folder", lambda file, content: file.mkdir())
image_case("dangling link", lambda file, content: file.symlink_to("gone.jpg"))


@case("other ids in val", "instances_val.json: categories: other ids", "matched by name", exit_code=0)
def _(data: Data) -> None:
    def change(content: Json) -> None:
        for record, key in [(c, "id") for c in content["categories"]] + [
            (a, "category_id") for a in content["annotations"]
        ]:
            record[key] = 4 - record[key]

    data.edit(change, file=data.val_file)


@case("class of val unknown to train", "instances_val.json: category 9 (wolf): used by 1 annotation", "remove its")
def _(data: Data) -> None:
    def change(content: Json) -> None:
        content["categories"].append({"id": 9, "name": "wolf"})
        content["annotations"][0]["category_id"] = 9

    data.edit(change, file=data.val_file)


@case("class absent in val", "instances_val.json: categories: no object of dog", "divide the images anew", exit_code=0)
def _(data: Data) -> None:
    data.edit(
        lambda content: [a.update(category_id=1) for a in content["annotations"] if a["category_id"] == 2],
        file=data.val_file,
    )


@case(
    "class absent in train", "instances_train.json: categories: no object of dog", "they are never learned", exit_code=0
)
def _(data: Data) -> None:
    data.edit(lambda content: [a.update(category_id=1) for a in content["annotations"] if a["category_id"] == 2])


@case(
    "image in both splits",
    "instances_val.json: image 102 (image_102.jpg): has the same bytes as image 3 (image_3.jpg)",
    "remove it",
    exit_code=0,
)
def _(data: Data) -> None:
    (data.root / "val" / "image_102.jpg").write_bytes((data.images / "image_3.jpg").read_bytes())


@case("train and val are one file", "is both train and val", exit_code=0)
def _(data: Data) -> None:
    data.val_file.unlink()
    data.val_file.hardlink_to(data.file)
    data.val_file.unlink()
    data.val_file.symlink_to("instances_train.json")
    (data.root / "val").rename(data.root / "old")
    (data.root / "val").symlink_to("train")
