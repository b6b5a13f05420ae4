"""Reads Pascal VOC data sets: Annotations/*.xml, JPEGImages/, ImageSets/Main/*.txt.

Layout and meaning of the nodes: The PASCAL Visual Object Classes Challenge 2012 Development Kit, sections 2.4-2.5.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from retina.data.convert.records import (
    Object,
    Record,
    RecordError,
    Records,
    divide,
    make_object,
    quoted,
    read_lines,
    read_pair,
    read_records,
)
from retina.data.images import list_images
from retina.errors import DataError, check_choice

LINE = "line"
"""Attribute under which `parse_xml` keeps the line of an element; VOC itself uses no attributes."""

DIFFICULT = ("keep", "crowd", "drop")
Listed = tuple[str, Path, int]
"""An image id such as `2007_000027` or `sub/0001`, and the file and line that name it."""


def read_voc(
    source: Path,
    *,
    classes: Sequence[str] | None = None,
    one_based: bool = False,
    difficult: str = "keep",
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Records:
    """The records of a VOC folder; nothing is written.

    one_based: boxes are (xmin, ymin, xmax, ymax) as in the XML, as most annotation tools write plain edges. The VOC
        challenge itself counts pixels from 1, the last included, so there (xmin - 1, ymin - 1, xmax, ymax) is meant.
    difficult: VOC's evaluation neither asks for nor punishes such objects, COCO has no such flag. "keep" makes them
        normal objects, "crowd" sets `iscrowd` (nothing is learned there, and detections there are not counted), "drop"
        leaves them out.
    classes: None takes the names met, sorted.

    Splits: train.txt (else trainval.txt without val) and val.txt (else test.txt). With only one list, or none (then all
    XML files), `val_fraction` is drawn for val. An image without XML is in no split unless a list names it (a fault).

    Raises DataError when the folder is not a VOC folder, ConfigError for another word for `difficult`.
    """
    check_choice(difficult, DIFFICULT, "difficult")
    xmls, folder = source / "Annotations", source / "JPEGImages"
    for part in (xmls, folder):
        if not part.is_dir():
            fix = "give the folder that holds Annotations/ and JPEGImages/"
            raise DataError(f"{source}: no folder {part.name}/ - {fix}", code="not-voc")
    images = {file.relative_to(folder).with_suffix("").as_posix(): file for file in list_images(folder)}
    faults: list[RecordError] = []

    def read(listed: Listed, faults: list[RecordError]) -> Record:
        name, file, line = listed
        xml = xmls / f"{name}.xml"
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise RecordError(file, line, f"image id {quoted(name)} leaves the data set - use ids such as 'sub/0001'")
        if not xml.is_file():
            raise RecordError(file, line, f"no {xml} - add the file or remove the line (ids carry no suffix)")
        if name not in images:
            missing = folder / f"{name}.jpg"
            raise RecordError(xml, 1, f"missing image {missing} - add the image (any usual suffix) or remove both")
        tree, size = _read_tree(xml, images[name])
        objects = []
        for node in tree.findall("object"):
            try:
                item = _read_object(xml, node, size, classes, shift=float(one_based))
                if not (item.crowd and difficult == "drop"):
                    objects.append(item._replace(crowd=item.crowd and difficult == "crowd"))
            except RecordError as fault:
                faults.append(fault)
        return Record(images[name], images[name].relative_to(folder).as_posix(), size, tuple(objects))

    train, val = (read_records(split, read, faults) for split in _splits(source, val_fraction, seed))
    names = sorted({item.name for record in (*train, *val) for item in record.objects})
    return Records(train, val, tuple(names if classes is None else classes), tuple(faults))


def parse_xml(data: bytes) -> ElementTree.Element:
    """The tree of an XML file, each element with its line in the attribute `line`.

    A document type declaration is refused when it starts, before any entity exists: so there are no entity expansion
    bombs and no external entities. Raises expat.ExpatError, or ValueError or LookupError for the encoding.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(tag, {**attributes, LINE: str(parser.CurrentLineNumber)})

    def refuse(*_: Any) -> None:
        error = expat.ExpatError("a DOCTYPE is not allowed")
        error.lineno = parser.CurrentLineNumber
        raise error

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(data, True)
    return builder.close()


def _splits(source: Path, val_fraction: float, seed: int) -> tuple[list[Listed], list[Listed]]:
    lists, root = source / "ImageSets" / "Main", source / "Annotations"
    listed = {split: _read_list(lists / f"{split}.txt") for split in ("train", "trainval", "val", "test")}
    val = listed["val"] or listed["test"]
    held_out = {name for name, _, _ in val}
    train = listed["train"] or [item for item in listed["trainval"] if item[0] not in held_out]
    if train and val:
        return train, val
    if val:
        problem = "neither train.txt nor trainval.txt has an image"
        raise DataError(f"{lists}: {problem} - add one of them or remove the lists", code="no-train-list")
    if not train:
        files = sorted(file for file in root.rglob("*.xml") if not file.name.startswith("."))
        train = [(file.relative_to(root).with_suffix("").as_posix(), file, 1) for file in files]
    return divide(train, val_fraction, seed, key=lambda item: item[0])


def _read_list(file: Path) -> list[Listed]:
    """Ids of a split list in its order, each once; no file is an empty list."""
    lines = read_lines(file) if file.is_file() else []
    first = {name: number for number, name in reversed([*enumerate(lines, 1)]) if name}
    return [(name, file, number) for name, number in reversed(first.items())]


def _read_tree(xml: Path, image: Path) -> tuple[ElementTree.Element, tuple[int, int]]:
    """The tree of an XML file, and the image's (height, width). Raises RecordError when either is unclear."""
    tree, (height, width) = read_pair(image, xml, parse_xml, "well-formed XML")
    if tree.tag != "annotation":
        fix = "a VOC file has <annotation>; export it as Pascal VOC"
        raise RecordError(xml, 1, f"root node is <{tree.tag}> - {fix}")
    stated = [tree.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    if stated not in (["", ""], ["0", "0"], [str(width), str(height)]):
        problem = f"size says {'x'.join(stated)}, the image is {width}x{height} after EXIF rotation"
        fix = "annotate the image as it is displayed, then correct <size>"
        raise RecordError(xml, _line(tree.find("size")), f"{problem} - {fix}")
    return tree, (height, width)


def _read_object(
    xml: Path, node: ElementTree.Element, size: tuple[int, int], classes: Sequence[str] | None, *, shift: float
) -> Object:
    """An object, `crowd` where it is difficult. Raises RecordError."""
    name = (node.findtext("name") or "").strip()
    if not name:
        raise RecordError(xml, _line(node), "object without <name> - name its class")
    if classes is not None and name not in classes:
        near = difflib.get_close_matches(name, classes, 1)
        hint = f"did you mean {near[0]!r}? else " if near else ""
        raise RecordError(xml, _line(node.find("name")), f"unknown class {quoted(name)} - {hint}add it to classes=")
    edges = []
    line = _line(node)
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        edge = node.find(f"bndbox/{tag}")
        text = (edge.text or "").strip() if edge is not None else ""
        if not text:
            problem = f"object {quoted(name)} without <bndbox><{tag}>"
            raise RecordError(xml, line, f"{problem} - add the four edges of its box")
        line = _line(edge)
        try:
            edges.append(float(text))
        except ValueError as error:
            raise RecordError(xml, line, f"{tag} is {quoted(text)}, not a number - write the edge in pixels") from error
    line = _line(node.find("bndbox"))
    flag = node.findtext("difficult", "0").strip()
    if flag not in ("", "0", "1"):
        raise RecordError(xml, line, f"difficult is {quoted(flag)} - write 0 or 1")
    x1, y1, x2, y2 = edges
    try:
        return make_object(name, (x1 - shift, y1 - shift, x2, y2), size, crowd=flag == "1")
    except ValueError as error:
        raise RecordError(xml, line, str(error)) from error


def _line(node: ElementTree.Element | None) -> int:
    return 1 if node is None else int(node.get(LINE, 1))
