"""Where the files of a data set lie. Beside the road."""

from pathlib import Path

from retina.data.document import listing
from retina.errors import DataError

ROBOFLOW = "_annotations.coco.json"
_NAMES = {"yolo": "YOLO's text files", "voc": "XML as of Pascal VOC", "csv": "CSV tables"}


def locate_split(root: Path, split: str) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of a split ("train", "val") of a data set in COCO's layout.

    `annotations/instances_{split}.json` and `{split}/`, or the names of the 2017 release, `annotations/
    instances_{split}2017.json` and `{split}2017/`, or Roboflow's `{split}/_annotations.coco.json` (`valid/` for val).
    DataError names what was expected and how to point elsewhere, or the command that converts what is there.
    """
    *files, first, second = annotation_files(root, split)
    if roboflow := next((file for file in (first, second) if file.is_file()), None):
        return roboflow, roboflow.parent
    folders = [root / f"{split}{year}" for year in ("", "2017")]
    file = next((f for f in files if f.is_file()), None)
    folder = next((f for f in folders if f.is_dir()), None)
    if file and folder:
        return file, folder
    problem = f"expected the images in {folders[0]}/ or {folders[1]}/{listing(root)}"
    if file is None:
        where = listing(files[0].parent if files[0].parent.is_dir() else root)
        problem = f"expected {files[0]} or {files[1]} (with images in {split}/ or {split}2017/){where}"
    fix = f"put them there, or name them: data.{split}.annotations=<file.json> data.{split}.images=<folder>"
    if file is None and (kind := foreign_format(root)):
        problem = f"its labels are {_NAMES[kind]}, not COCO's JSON"
        fix = f"python tools/convert.py format={kind} source={root} output={root}_coco, then data.root={root}_coco"
    raise DataError(f"{root}: split {split!r}: {problem} - {fix}", code="no-such-split")


def annotation_files(root: Path, split: str) -> list[Path]:
    """Where `locate_split` looks for the annotation file: two places of COCO's, and two of Roboflow's."""
    files = [root / "annotations" / f"instances_{split}{year}.json" for year in ("", "2017")]
    return files + [root / folder / ROBOFLOW for folder in (split, "valid" if split == "val" else split)]


def foreign_format(root: Path) -> str | None:
    """The `format` by which tools/convert.py is likely to read a folder, by the files up to two folders below it."""
    files = [path for depth in ("*", "*/*", "*/*/*") for path in root.glob(depth) if not path.name.startswith(".")]
    names = {path.name.lower() for path in files}
    suffixes = {path.suffix.lower() for path in files}
    if names & {"data.yaml", "data.yml", "dataset.yaml", "labels", "obj.names"} or suffixes & {".names"}:
        return "yolo"
    return next((kind for suffix, kind in ((".xml", "voc"), (".csv", "csv")) if suffix in suffixes), None)
