"""Where the files of a data set lie. Beside the road."""

from pathlib import Path

from retina.data.document import listing
from retina.errors import DataError


def locate_split(root: Path, split: str) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of a split ("train", "val") of a data set in COCO's layout.

    `annotations/instances_{split}.json` and `{split}/`, or the names of the 2017 release, `annotations/
    instances_{split}2017.json` and `{split}2017/`; DataError names what was expected and how to point elsewhere.
    """
    files = [root / "annotations" / f"instances_{split}{year}.json" for year in ("", "2017")]
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
    raise DataError(f"{root}: split {split!r}: {problem} - {fix}", code="no-such-split")
