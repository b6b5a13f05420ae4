"""Reads Pascal VOC data sets: Annotations/*.xml, JPEGImages/, ImageSets/Main/*.txt.

Layout and meaning of the nodes: The PASCAL Visual Object Classes Challenge 2012 Development Kit, sections 2.4-2.5.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from retina.data.convert.records import Fault, Object, Record, Records, check_box, divide, read_text, shown
from retina.data.images import image_size, list_images
from retina.errors import DataError

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

    Boxes are (xmin, ymin, xmax, ymax) as in the XML. The VOC challenge itself counts pixels from 1, the last included,
    so there (xmin - 1, ymin - 1, xmax, ymax) is meant: `one_based` subtracts. It is off by default because most
    annotation tools write plain edges (an object at the border has xmin = 0 or xmax = width).

    `difficult`: VOC's evaluation neither asks for nor punishes such objects, COCO has no such flag. "keep" makes them
    normal objects, "crowd" sets `iscrowd` (nothing is learned there, and detections there are not counted), "drop"
    leaves them out.

    Splits: train.txt (else trainval.txt without val) and val.txt (else test.txt). With only one list, or none (then all
    XML files), `val_fraction` is drawn for val. An image without XML is in no split unless a list names it (a fault).

    Without `classes` they are the names met, sorted. Raises DataError when the folder is not a VOC folder.
    """
    if difficult not in DIFFICULT:
        raise ValueError(f"difficult must be one of {DIFFICULT}, not {difficult!r}")
    images = _images(source)
    train, val = _splits(source, val_fraction, seed)
    faults: list[Fault] = []

    def read(listed: Listed) -> Record | None:
        name, file, line = listed
        xml = source / "Annotations" / f"{name}.xml"
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            faults.append(
                Fault(file, line, f"image id {shown(name)} leaves the data set", "use ids such as 'sub/0001'")
            )
        elif not xml.is_file():
            faults.append(Fault(file, line, f"no {xml}", "add the file or remove the line (ids carry no suffix)"))
        elif name not in images:
            missing = source / "JPEGImages" / f"{name}.jpg"
            faults.append(Fault(xml, 1, f"missing image {missing}", "add the image (any usual suffix) or remove both"))
        else:
            return _read_record(xml, images[name], source / "JPEGImages", classes, one_based, difficult, faults)
        return None

    splits = [tuple(record for record in map(read, split) if record is not None) for split in (train, val)]
    names = sorted({item.name for split in splits for record in split for item in record.objects})
    return Records(splits[0], splits[1], tuple(names if classes is None else classes), tuple(faults))


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


def _images(source: Path) -> dict[str, Path]:
    """Image files by id (path below JPEGImages without suffix)."""
    for folder in ("Annotations", "JPEGImages"):
        if not (source / folder).is_dir():
            fix = "give the folder that holds Annotations/ and JPEGImages/"
            raise DataError(f"{source}: no folder {folder}/ - {fix}", code="not-voc")
    root = source / "JPEGImages"
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in list_images(root)}


def _splits(source: Path, val_fraction: float, seed: int) -> tuple[list[Listed], list[Listed]]:
    lists = source / "ImageSets" / "Main"
    given = {split: _read_list(lists / f"{split}.txt") for split in ("train", "trainval", "val", "test")}
    val = given["val"] or given["test"]
    held_out = {name for name, _, _ in val}
    train = given["train"] or [listed for listed in given["trainval"] if listed[0] not in held_out]
    if train and val:
        return train, val
    if val:
        problem = "neither train.txt nor trainval.txt has an image"
        raise DataError(f"{lists}: {problem} - add one of them or remove the lists", code="no-train-list")
    root = source / "Annotations"
    files = sorted(file for file in root.rglob("*.xml") if not file.name.startswith("."))
    listed = train or [(file.relative_to(root).with_suffix("").as_posix(), file, 1) for file in files]
    return divide(listed, val_fraction, seed, key=lambda item: item[0])


def _read_list(file: Path) -> list[Listed]:
    """Ids of a split list in its order, each once; no file is an empty list."""
    if not file.is_file():
        return []
    lines = read_text(file).split("\n")
    names = {line.strip(): number for number, line in reversed(list(enumerate(lines, 1))) if line.strip()}
    return [(name, file, number) for name, number in reversed(names.items())]


def _read_record(
    xml: Path,
    image: Path,
    root: Path,
    classes: Sequence[str] | None,
    one_based: bool,
    difficult: str,
    faults: list[Fault],
) -> Record | None:
    """The record of one XML file; faults go to `faults`. None when nothing sure can be said about the image."""
    try:
        size = image_size(image)
        tree = parse_xml(xml.read_bytes())
    except DataError as error:
        problem, _, fix = str(error).rpartition(" - ")
        faults.append(Fault(xml, 1, problem, fix))
        return None
    except (expat.ExpatError, ValueError, LookupError) as error:
        line = getattr(error, "lineno", 1)
        faults.append(Fault(xml, line, f"not well-formed XML ({error})", "export the file again or remove it"))
        return None
    if tree.tag != "annotation":
        faults.append(
            Fault(xml, 1, f"root node is <{tree.tag}>", "a VOC file has <annotation>; export it as Pascal VOC")
        )
        return None
    stated = tree.findtext("size/width", "").strip(), tree.findtext("size/height", "").strip()
    if stated not in {("", ""), ("0", "0"), (str(size[1]), str(size[0]))}:
        line = int(tree.find("size").get(LINE, 1))  # type: ignore[union-attr] # a stated size has its node
        problem = f"size says {'x'.join(stated)}, the image is {size[1]}x{size[0]} after EXIF rotation"
        faults.append(Fault(xml, line, problem, "annotate the image as it is displayed, then correct <size>"))
        return None
    objects = []
    for node in tree.findall("object"):
        item = _read_object(node, size, classes, one_based, difficult)
        if isinstance(item, Object):
            objects.append(item)
        elif item is not None:
            faults.append(Fault(xml, *item))
    return Record(image, image.relative_to(root).as_posix(), size, tuple(objects))


def _read_object(
    node: ElementTree.Element, size: tuple[int, int], classes: Sequence[str] | None, one_based: bool, difficult: str
) -> Object | tuple[int, str, str] | None:
    """An object, or (line, problem, fix), or None for one to leave out."""
    line = int(node.get(LINE, 1))
    name = (node.findtext("name") or "").strip()
    if not name:
        return line, "object without <name>", "name its class"
    if classes is not None and name not in classes:
        near = difflib.get_close_matches(name, classes, 1)
        hint = f"did you mean {near[0]!r}? else " if near else ""
        return int(node.find("name").get(LINE, line)), f"unknown class {shown(name)}", f"{hint}add it to classes="  # type: ignore[union-attr] # it has a name
    edges = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        edge = node.find(f"bndbox/{tag}")
        text = (edge.text or "").strip() if edge is not None else ""
        if edge is None or not text:
            return line, f"object {shown(name)} without <bndbox><{tag}>", "add the four edges of its box"
        line = int(edge.get(LINE, line))
        try:
            edges.append(float(text))
        except ValueError:
            return line, f"{tag} is {shown(text)}, not a number", "write the edge in pixels"
    line = int(node.find("bndbox").get(LINE, line))  # type: ignore[union-attr] # it has edges
    flag = node.findtext("difficult", "0").strip()
    if flag not in {"", "0", "1"}:
        return line, f"difficult is {shown(flag)}", "write 0 or 1"
    shift = 1.0 if one_based else 0.0
    box = check_box((edges[0] - shift, edges[1] - shift, edges[2], edges[3]), size)
    if isinstance(box, str):
        return line, f"{box} (class {shown(name)})", "correct or remove the object"
    if flag == "1" and difficult == "drop":
        return None
    return Object(name, box, crowd=flag == "1" and difficult == "crowd")
