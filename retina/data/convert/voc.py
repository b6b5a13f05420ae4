"""Reads Pascal VOC data sets: Annotations/*.xml, JPEGImages/, ImageSets/Main/*.txt.

Layout and meaning of the nodes: The PASCAL Visual Object Classes Challenge 2012 Development Kit, sections 2.4-2.5.
"""

import difflib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from retina.data.convert.records import (
    Object,
    Record,
    RecordError,
    Records,
    around,
    divide,
    header_of,
    make_object,
    parse_labels,
    quoted,
    read_lines,
    read_records,
    warnings_of,
)
from retina.data.image_lists import list_images
from retina.errors import DataError, check_choice

LINE = "line"
"""Attribute under which `parse_xml` keeps the line of an element; VOC itself uses no attributes."""

DIFFICULT = ("keep", "crowd", "drop")
Listed = tuple[str, Path, int]
"""An image id such as `2007_000027` or `sub/0001`, and the file and line that name it."""
_PLACES = ("annotations", "jpegimages", "images")
"""Folders, in any case, that only tell images from labels: they are no part of an id."""


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

    XML and images lie in Annotations/ and JPEGImages/ (or images/), or beside each other, with or without sub-folders.
    The image of an XML file is the one that its `filename` names; where that is not there, the one of its own name.
    A box that CVAT has rotated becomes the upright box around it.

    one_based: boxes are (xmin, ymin, xmax, ymax) as in the XML, as most annotation tools write plain edges. The VOC
        challenge itself counts pixels from 1, the last included, so there (xmin - 1, ymin - 1, xmax, ymax) is meant.
    difficult: VOC's evaluation neither asks for nor punishes such objects, COCO has no such flag. "keep" makes them
        normal objects, "crowd" sets `iscrowd` (nothing is learned there, and detections there are not counted), "drop"
        leaves them out.
    classes: None takes the names met, sorted.

    Splits: the lists train.txt (else trainval.txt without val), val.txt and test.txt, or folders train/, val/ (valid/)
    and test/. Without val, test is val; with only one split, or none (then all XML files), `val_fraction` is drawn for
    val. An image without XML is in no split unless a list names it (a fault).

    Raises DataError when the folder is not a VOC folder, ConfigError for another word for `difficult`.
    """
    check_choice(difficult, DIFFICULT, "difficult")
    xmls = {_id(source, file): file for root in _roots(source) for file in sorted(root.rglob("*")) if _is_xml(file)}
    if not xmls:
        problem = "no XML files - give the folder that holds Annotations/ and JPEGImages/, or XML files beside images"
        raise DataError(f"{source}: {problem}", code="not-voc")
    images = _Images(source)
    faults: list[RecordError] = []

    def read(listed: Listed, faults: list[RecordError]) -> Record:
        name, file, line = listed
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise RecordError(file, line, f"image id {quoted(name)} leaves the data set - use ids such as 'sub/0001'")
        if name not in xmls:
            raise RecordError(file, line, f"no {name}.xml - add the file or remove the line (ids carry no suffix)")
        xml = xmls[name]
        tree = _read_tree(xml)
        image = images.find(name, tree, xml)
        header = header_of(image, xml)
        _check_size(xml, tree, header.size)
        objects = []
        for node in tree.findall("object"):
            try:
                item = _read_object(xml, node, header.size, classes, shift=float(one_based))
                if not (item.crowd and difficult == "drop"):
                    objects.append(item._replace(crowd=item.crowd and difficult == "crowd"))
            except RecordError as fault:
                faults.append(fault)
        place = PurePosixPath(name).with_name(image.name).as_posix()
        return Record(image, place, header.size, tuple(objects), header.turns_unseen)

    *splits, drawn = _splits(source, xmls, images, val_fraction, seed)
    train, val, test = (read_records(split, read, faults) for split in splits)
    everything = (*train, *val, *test)
    names = sorted({item.name for record in everything for item in record.objects})
    names = names if classes is None else list(classes)
    warnings = warnings_of(source, everything, names) + drawn
    if unlabelled := images.count_without(xmls):
        warnings.append(f"{source}: {unlabelled} images have no XML: left out - annotate them, or leave it so")
    if unlisted := len(xmls) - sum(map(len, splits)):
        warnings.append(f"{source}: {unlisted} XML files are in no split list: left out - list them, or leave it so")
    return Records(train, val, tuple(names), tuple(faults), tuple(warnings), test)


def _roots(source: Path) -> list[Path]:
    """The folder itself, and what of the usual folders is a link, which walks do not follow."""
    linked = sorted(source.iterdir()) if source.is_dir() else []
    return [source, *(path for path in linked if path.name.lower() in _PLACES and path.is_symlink() and path.is_dir())]


def _is_xml(file: Path) -> bool:
    return file.suffix.lower() == ".xml" and not file.name.startswith(".") and file.is_file()


def _id(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return "/".join([part for part in parts[:-1] if part.lower() not in _PLACES] + [parts[-1]])


class _Images:
    """The image files of a VOC folder, by the names that an XML file may know them by."""

    def __init__(self, source: Path) -> None:
        self._by_id: dict[str, list[Path]] = {}
        for file in [image for root in _roots(source) for image in list_images(root)]:
            if not file.relative_to(source).parts[0].startswith("Segmentation"):  # masks of the challenge
                self._by_id.setdefault(_id(source, file), []).append(file)
        self._by_name = {f"{name}{file.suffix}": file for name, files in self._by_id.items() for file in files}
        self._used: dict[Path, Path] = {}

    def find(self, name: str, tree: ElementTree.Element, xml: Path) -> Path:
        """The image of an XML file of that id. Raises RecordError if there is none, several, or it is another's."""
        stated = (tree.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
        beside = self._by_id.get(name, [])
        image = self._by_name.get(PurePosixPath(name).with_name(stated).as_posix()) if stated else None
        if image is None and not beside:
            problem = f"missing image {stated or PurePosixPath(name).name + '.jpg'}"
            raise RecordError(xml, 1, f"{problem} - add the image (any usual suffix) or remove both")
        if image is None and len(beside) > 1:
            names = " and ".join(file.name for file in beside)
            raise RecordError(xml, 1, f"{names} are both of that name - write into <filename> which one is meant")
        image = image or beside[0]
        if (other := self._used.setdefault(image, xml)) != xml:
            problem = f"<filename> {image.name} is the image of {other.name} already"
            raise RecordError(xml, _line(tree.find("filename")), f"{problem} - correct one of the two")
        return image

    def of(self, name: str) -> Path | None:
        """The image of that id, as far as ids tell."""
        return next(iter(self._by_id.get(name, [])), None)

    def count_without(self, xmls: Container[str]) -> int:
        """Images that neither an XML file of their name nor one that names them stands for."""
        return sum(file not in self._used for name, files in self._by_id.items() if name not in xmls for file in files)


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


def _splits(
    source: Path, xmls: Mapping[str, Path], images: "_Images", val_fraction: float, seed: int
) -> tuple[list[Listed], list[Listed], list[Listed], list[str]]:
    """Train, val and test, which may be empty, and warnings of how they were drawn."""
    lists = source / "ImageSets" / "Main"
    listed = {split: _read_list(lists / f"{split}.txt") for split in ("train", "trainval", "val", "test")}
    everything = [(name, file, 1) for name, file in xmls.items()]
    if not any(listed.values()):
        places = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
        listed |= {key: [item for item in everything if item[0].split("/")[0] in at] for key, at in places.items()}
    val, test = (listed["val"], listed["test"]) if listed["val"] else (listed["test"], [])
    held_out = {name for name, _, _ in val}
    train = listed["train"] or [item for item in listed["trainval"] if item[0] not in held_out]
    if train and val:
        return train, val, test, []
    if val:
        problem = "neither train.txt nor trainval.txt has an image"
        raise DataError(f"{lists}: {problem} - add one of them or remove the lists", code="no-train-list")
    keys: dict[str, Any] = {"key": lambda item: item[0], "image": lambda item: images.of(item[0])}
    train, val, warnings = divide(train or everything, val_fraction, seed, **keys)
    return train, val, [], warnings


def _read_list(file: Path) -> list[Listed]:
    """Ids of a split list in its order, each once; no file is an empty list."""
    lines = read_lines(file) if file.is_file() else []
    first = {name: number for number, name in reversed([*enumerate(lines, 1)]) if name}
    return [(name, file, number) for name, number in reversed(first.items())]


def _read_tree(xml: Path) -> ElementTree.Element:
    """The tree of an XML file. Raises RecordError."""
    tree = parse_labels(xml, parse_xml, "well-formed XML")
    if tree.tag != "annotation":
        fix = "a VOC file has <annotation>; export it as Pascal VOC"
        raise RecordError(xml, 1, f"root node is <{tree.tag}> - {fix}")
    return tree


def _check_size(xml: Path, tree: ElementTree.Element, size: tuple[int, int]) -> None:
    """Raises RecordError if the XML states another size than the image's (height, width)."""
    height, width = size
    stated = [tree.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    if stated not in (["", ""], ["0", "0"], [str(width), str(height)]):
        problem = f"size says {'x'.join(stated)}, the image is {width}x{height} after EXIF rotation"
        fix = "annotate the image as it is displayed, then correct <size>"
        raise RecordError(xml, _line(tree.find("size")), f"{problem} - {fix}")


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
    box = (x1 - shift, y1 - shift, x2, y2)
    try:
        if rotation := _rotation(node):
            box = around(box, rotation)
        return make_object(name, box, size, crowd=flag == "1")
    except ValueError as error:
        raise RecordError(xml, line, str(error)) from error


def _rotation(node: ElementTree.Element) -> float:
    """Degrees by which CVAT turns the box about its centre. Raises ValueError, as "problem - fix"."""
    for attribute in node.findall("attributes/attribute"):
        if attribute.findtext("name") == "rotation":
            text = attribute.findtext("value", "")
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"rotation is {quoted(text)}, not a number - write degrees, or remove it") from None
    return 0.0


def _line(node: ElementTree.Element | None) -> int:
    return 1 if node is None else int(node.get(LINE, 1))
