"""The images with most mistakes, with hits, misses and false alarms told apart by colour, dashes and words."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from retina.data.images import MAX_PIXELS, read_image
from retina.errors import DataError
from retina.evaluation.analysis import Analysis, mistakes_per_image
from retina.evaluation.error_types import KINDS
from retina.report.html import Markup, join, tag
from retina.visualize import shown_channels

SIDE, QUALITY = 480, 72
MOST_BOXES = 80
"""Detections of an image that the page holds, those of highest score."""
LEAST_SCORE = 0.05


class Mark(NamedTuple):
    """A box of a picture, and when it is there: at thresholds up to the score, or (misses) above it."""

    kind: str
    """hit, miss or false."""
    label: int
    box: list[float]
    score: float | None
    """Of a miss: that of the detection that finds the object at lower thresholds; None where there is none."""
    error: str = ""
    """Of a false alarm, one of KINDS."""

    def is_there(self, threshold: float) -> bool:
        if self.kind == "miss":
            return self.score is None or self.score < threshold
        return self.score is not None and self.score >= threshold


def marks_of(analysis: Analysis, image: int) -> list[Mark]:
    """Of one image, whatever the threshold; boxes in its pixels."""
    outcomes = analysis.outcomes
    annotations = outcomes.annotations
    rows = np.flatnonzero((outcomes.images == image) & (outcomes.scores >= LEAST_SCORE) & ~outcomes.ignored())
    rows = rows[np.argsort(-outcomes.scores[rows], kind="stable")][:MOST_BOXES]
    hits, marks, found = outcomes.hits(), list[Mark](), dict[int, float]()
    for row in rows.tolist():
        label, score = int(outcomes.labels[row]), float(outcomes.scores[row])
        if hits[row]:
            found[int(outcomes.objects[row, 0])] = score
        error = "" if hits[row] else KINDS[analysis.errors.kinds[row]]
        marks.append(Mark("hit" if hits[row] else "false", label, outcomes.boxes[row].tolist(), score, error))
    for place in range(*annotations.offsets[image : image + 2]):
        if not annotations.crowd[place]:
            label = int(annotations.labels[place])
            marks.append(Mark("miss", label, annotations.boxes[place].tolist(), found.get(place)))
    return marks


def worst_images(analysis: Analysis, limit: int) -> list[int]:
    """Those with most mistakes at the thresholds, then those that come first; none without any."""
    missed, false = mistakes_per_image(analysis)
    order = np.argsort(-(missed + false), kind="stable")[:limit]
    return [int(image) for image in order if missed[image] + false[image] > 0]


def figures(
    analysis: Analysis, *, images: Sequence[int], max_bytes: int, max_pixels: int = MAX_PIXELS
) -> Iterator[Markup]:
    """Pictures of these images, until their bytes reach the limit. What cannot be read is left out."""
    used = 0
    for image in images:
        annotations = analysis.outcomes.annotations
        name = PurePosixPath(annotations.file_name(image))
        if name.is_absolute() or ".." in name.parts:  # results are scored whatever the names; pictures are not shown
            continue
        try:
            pixels = read_image(annotations.path(image), max_pixels=max_pixels, pixels=annotations.pixels)
        except DataError:
            continue
        content = jpeg(shown_channels(pixels))
        used += len(content)
        if used > max_bytes:
            return
        yield _figure(analysis, image, content, (pixels.shape[0], pixels.shape[1]))


def jpeg(pixels: Any) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    return base64.b64encode(content.getvalue()).decode()


def _figure(analysis: Analysis, image: int, content: str, size: tuple[int, int]) -> Markup:
    annotations, thresholds = analysis.outcomes.annotations, analysis.thresholds
    height, width = size
    marks = marks_of(analysis, image)
    there = [mark.is_there(float(thresholds[mark.label])) for mark in marks]
    counts = [
        sum(on and mark.kind == kind for on, mark in zip(there, marks, strict=True))
        for kind in ("hit", "miss", "false")
    ]
    tally = f"{counts[0]} found, {counts[1]} missed, {counts[2]} false"
    name = annotations.file_name(image)
    drawn = [
        _drawn(mark, annotations.classes[mark.label], max(width, height), on=on)
        for on, mark in zip(there, marks, strict=True)
    ]
    words = f"{name}: {tally}"
    frame = f"0 0 {width} {height}"
    over = tag("svg", *drawn, viewBox=frame, preserveAspectRatio="none", role="img", aria_label=words)
    shot = tag("div", tag("img", src=f"data:image/jpeg;base64,{content}", alt="", loading="lazy"), over, class_="shot")
    return tag("figure", shot, tag("figcaption", name, tag("br"), tag("span", tally, class_="tally soft")))


def _drawn(mark: Mark, name: str, side: int, *, on: bool) -> Markup:
    x1, y1, x2, y2 = mark.box
    place = {"x": f"{x1:.1f}", "y": f"{y1:.1f}", "width": f"{max(x2 - x1, 1):.1f}", "height": f"{max(y2 - y1, 1):.1f}"}
    score = "" if mark.score is None or mark.kind == "miss" else f" {mark.score:.2f}"
    words = {"hit": name, "miss": f"missed {name}", "false": f"false {name}"}[mark.kind] + score
    title = tag("title", f"{words}{f': {mark.error}' if mark.error else ''}")
    inner = [title, tag("rect", class_="under", **place), tag("rect", class_="box", **place)]
    if mark.kind == "false":  # a cross in the corner, a triangle for misses
        arm = side / 45
        inner.append(
            tag(
                "path", class_="box sign", d=f"M{x1:.1f} {y1:.1f}l{arm:.1f} {arm:.1f}m0 -{arm:.1f}l-{arm:.1f} {arm:.1f}"
            )
        )
    elif mark.kind == "miss":
        arm = side / 30
        inner.append(tag("path", class_="box sign", d=f"M{x1:.1f} {y1:.1f}h{arm:.1f}L{x1:.1f} {y1 + arm:.1f}Z"))
    options = {"data_score": mark.score, "data_error": mark.error or None}
    return tag("g", *inner, class_=mark.kind, data_kind=mark.kind, data_label=mark.label, hidden=not on, **options)


KEY = join(
    tag(
        "span",
        tag("svg", tag("rect", class_="box", x=3, y=2, width=28, height=12), class_=kind, viewBox="0 0 34 16"),
        words,
    )
    for kind, words in (
        ("hit", "found (solid)"),
        ("miss", "missed (dashed, triangle)"),
        ("false", "false alarm (dotted, cross)"),
    )
)
