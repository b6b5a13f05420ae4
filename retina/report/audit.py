"""`audit.html`: labels that are likely wrong, worst first, each with a picture of the place."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from retina.data.annotations import Annotations
from retina.data.images import MAX_PIXELS, read_image
from retina.errors import DataError
from retina.evaluation.audit import Suspect
from retina.report.gallery import jpeg
from retina.report.html import Markup, join, page, tag
from retina.report.look import SCRIPT, STYLE
from retina.visualize import shown_channels

MAX_BYTES = 4_000_000
_AROUND = 1.0
"""Of a box's longer side: so much is shown on each side of it."""
_LEAST = 0.15
"""Of the image's longer side: no less is shown."""
TITLES = {
    "unlabelled": "image without labels",
    "missing": "label may be missing",
    "class": "class may be wrong",
    "place": "box may be misplaced",
    "duplicate": "object may be labelled twice",
    "spurious": "label may be of nothing",
}
_KEY = (("miss", "suspect label (dashed)"), ("false", "what the detector sees (dotted)"), ("hit", "other labels"))


def build_audit(
    annotations: Annotations, suspects: Sequence[Suspect], *, judged: str, max_pixels: int = MAX_PIXELS
) -> bytes:
    """judged: by what, in a few words."""
    lead = f"{len(suspects)} suspects among {annotations.num_objects} labels of {len(annotations)} images; {judged}."
    figures, used = list[Markup](), 0
    for rank, suspect in enumerate(suspects, start=1):
        figure = _figure(annotations, suspect, rank, max_pixels if used < MAX_BYTES else 0)
        used += len(figure)
        figures.append(figure)
    sections = [
        tag("h1", f"Audit of {annotations.file.name}"),
        tag("p", lead, class_="lead"),
        tag("p", "The score tells how sure the suspicion is: correct the first ones, and audit again.", class_="soft"),
        tag("p", *_key(), class_="key"),
        tag("div", *figures, class_="gallery") if figures else tag("p", "Nothing is suspicious."),
    ]
    return page("Audit", tag("main", *sections), style=STYLE, script=SCRIPT)


def _key() -> Iterator[Markup]:
    for kind, words in _KEY:
        line = tag("rect", class_="box", x=3, y=2, width=28, height=12)
        yield tag("span", tag("svg", line, class_=kind, viewBox="0 0 34 16"), words)


def _figure(annotations: Annotations, suspect: Suspect, rank: int, max_pixels: int) -> Markup:
    """max_pixels: 0 leaves the picture out."""
    name = annotations.file_name(suspect.image)
    words = f"{rank}. {TITLES[suspect.kind]}: {suspect.reason}"
    caption = tag("figcaption", tag("strong", words), tag("br"), f"{name}, score {suspect.score:.2f}")
    shot = _shot(annotations, suspect, words, max_pixels) if max_pixels else None
    return tag("figure", *([shot] if shot else []), caption, data_kind=suspect.kind)


def _shot(annotations: Annotations, suspect: Suspect, words: str, max_pixels: int) -> Markup | None:
    name = PurePosixPath(annotations.file_name(suspect.image))
    if name.is_absolute() or ".." in name.parts:
        return None
    try:
        pixels = read_image(annotations.path(suspect.image), max_pixels=max_pixels, pixels=annotations.pixels)
    except DataError:
        return None
    x1, y1, x2, y2 = _window(suspect, pixels.shape[1], pixels.shape[0])
    content = jpeg(shown_channels(np.ascontiguousarray(pixels[y1:y2, x1:x2])))
    rows = range(*annotations.offsets[suspect.image : suspect.image + 2].tolist())
    others = [_box("hit", annotations.boxes[row].tolist()) for row in rows if row != suspect.object]
    seen = [_box("false", suspect.better)] if suspect.better else []
    own = [_box("miss", suspect.box)] if suspect.object is not None else []
    frame = f"{x1} {y1} {x2 - x1} {y2 - y1}"
    marks = join([*others, *seen, *own])
    over = tag("svg", marks, viewBox=frame, preserveAspectRatio="none", role="img", aria_label=words)
    image = tag("img", src=f"data:image/jpeg;base64,{content}", alt="", loading="lazy")
    return tag("div", image, over, class_="shot")


def _window(suspect: Suspect, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of the image that is shown: all of it where there are no labels."""
    if suspect.kind == "unlabelled":
        return 0, 0, width, height
    boxes = np.array([suspect.box, suspect.better or suspect.box])
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    side = max(_AROUND * float((high - low).max()), _LEAST * max(width, height))
    x1, y1 = np.clip(np.floor(low - side), 0, [width - 1, height - 1]).astype(int).tolist()
    x2, y2 = np.clip(np.ceil(high + side), [x1 + 1, y1 + 1], [width, height]).astype(int).tolist()
    return x1, y1, x2, y2


def _box(kind: str, box: Sequence[float]) -> Markup:
    x1, y1, x2, y2 = box
    place = {"x": f"{x1:.1f}", "y": f"{y1:.1f}", "width": f"{max(x2 - x1, 1):.1f}", "height": f"{max(y2 - y1, 1):.1f}"}
    return tag("g", tag("rect", class_="under", **place), tag("rect", class_="box", **place), class_=kind)
