"""What a data set looks like in numbers, drawn: sizes, shapes and places of its objects. Beside the road."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retina.data.advice import resized_boxes
from retina.data.annotations import Annotations
from retina.errors import plain
from retina.files import make_folder, open_plain, write_whole

MAKER = "retina doctor"
"""Stands in the file, so that only our own is ever overwritten."""
_CLASSES = 25
"""Bars of the most frequent classes."""


def draw_plots(file: Path, splits: Mapping[str, Annotations], short_side: int, long_side: int) -> None:
    """Writes a PNG with a row of panels for each split: object sizes after the resize of evaluation, aspect ratios,
    places of the centres in their images, and objects per class. Raises OSError."""
    from matplotlib.figure import Figure  # slow to import, and without its own windows and global state

    figure = Figure(figsize=(15, 3.4 * len(splits)), layout="constrained")
    for (name, split), (sizes, ratios, places, classes) in zip(
        splits.items(), figure.subplots(len(splits), 4, squeeze=False), strict=True
    ):
        boxes = resized_boxes(split, short_side, long_side)
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        sizes.hist(np.sqrt(width * height), bins=np.geomspace(1, max(long_side, 2), 41))
        for edge in (32, 96):  # where COCO's small ends and large begins
            sizes.axvline(edge, color="black", linewidth=0.8, linestyle=":")
        sizes.set(xscale="log", title=f"{name}: sizes at {short_side} x {long_side}", xlabel="pixels", ylabel="objects")
        ratios.hist(width / height, bins=np.geomspace(1 / 16, 16, 41))
        ratios.set(xscale="log", title=f"{name}: aspect ratios", xlabel="width / height")
        rows = np.repeat(np.arange(len(split)), np.diff(split.offsets))
        centres = (split.boxes[:, :2] + split.boxes[:, 2:]) / 2 / split.sizes[rows, ::-1]
        x, y = centres[~split.crowd].T
        places.hist2d(x, y, bins=32, range=[[0, 1], [0, 1]], cmap="viridis")
        places.invert_yaxis()
        places.set(title=f"{name}: centres", xlabel="of the image's width", ylabel="of its height")
        counts = split.class_counts()
        shown = np.argsort(-counts, kind="stable")[:_CLASSES][::-1]
        classes.barh(range(len(shown)), counts[shown])
        names = [plain(split.classes[label])[:24] for label in shown]
        classes.set_yticks(range(len(shown)), labels=names, parse_math=False)
        more = f" (the first {_CLASSES} of {len(counts)})" if len(counts) > _CLASSES else ""
        classes.set(title=f"{name}: objects per class{more}")
        classes.tick_params(axis="y", labelsize=7)
    content = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # a letter that the font lacks
        figure.savefig(content, format="png", dpi=100, metadata={"Software": MAKER})
    make_folder(file.parent)
    write_whole(file, content.getvalue())


def is_ours(file: Path) -> bool:
    """Whether it was written by `draw_plots`."""
    try:
        with open_plain(file, "rb") as stream:
            return MAKER.encode() in stream.read(1 << 12)
    except OSError:
        return False
