"""That an exported file says what the detector says: images, what was expected of them, and what was found. Knows no
torch, because `retina verify` repeats it where there is none.

A detection of the one matches one of the other that has the same label and differs by no more than the tolerance. What
finds no match is excused at an edge, where rounding decides: a score at its threshold or at that of the last place, and
an overlap with a better detection at the limit of non-maximum suppression. Anything else is a fault."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from retina.data.images import read_image
from retina.data.pixels import FULL, PixelFormat
from retina.errors import DataError

Image = UInt8[np.ndarray, "H W C"]
Table = Float[np.ndarray, "D 6"]
"""x1, y1, x2, y2, score, label of each detection, best first."""
Run = Callable[[Sequence[Image]], list[Table]]
"""The detections of each image of a batch."""

_EDGE = 0.01
"""How near an overlap is to the limit that rounding may decide about it."""


class Tolerance(NamedTuple):
    pixels: float
    """Of each corner's coordinates, in pixels of the image."""
    score: float
    unmatched: float = 0.0
    """Share of the detections that may be without a match."""


TOLERANCES = {"fp32": Tolerance(0.25, 0.005), "fp16": Tolerance(2.0, 0.05), "int8": Tolerance(8.0, 0.2, 0.2)}
"""By precision of the file. Most of it is for the resize, which may round a pixel the other way than OpenCV does."""


@dataclass
class Differences:
    """Between the detections expected and those found, over all images looked at so far."""

    matched: int = 0
    edges: int = 0
    """Without a match, and excused."""
    pixels: float = 0.0
    score: float = 0.0
    faults: list[str] = field(default_factory=list)

    def refuses(self, tolerance: Tolerance) -> str:
        """What is wrong if more are without a match than may be; else empty."""
        total = self.matched + len(self.faults)
        if not self.faults or len(self.faults) <= tolerance.unmatched * total:
            return ""
        return f"{len(self.faults)} of {total} detections differ, the first: {self.faults[0]}"

    def line(self) -> str:
        edges = f", {self.edges} at an edge in one of the two only" if self.edges else ""
        edges += f", {len(self.faults)} not matched" if self.faults else ""
        worst = f"boxes differ by at most {self.pixels:.2g} px, scores by {self.score:.2g}"
        return f"{self.matched} detections matched, {worst}{edges}"


def compare(
    name: str, expected: Table, found: Table, differences: Differences, tolerance: Tolerance, settings: dict[str, Any]
) -> None:
    """Adds those of one image. settings: the description of the file."""
    free = list(range(len(found)))
    alone = []
    for row in expected:
        gaps = np.abs(found[free] - row)
        near = (gaps[:, :4].max(axis=1, initial=0) <= tolerance.pixels) & (gaps[:, 4] <= tolerance.score)
        near &= gaps[:, 5] == 0
        if not near.any():
            alone.append((row, expected, "is missing"))
            continue
        best = int(np.where(near, gaps[:, :4].max(axis=1, initial=0), np.inf).argmin())
        differences.matched += 1
        differences.pixels = max(differences.pixels, float(gaps[best, :4].max()))
        differences.score = max(differences.score, float(gaps[best, 4]))
        del free[best]
    alone += [(row, found, "was not expected") for row in found[free]]
    for row, table, problem in alone:
        if at_edge(row, table, (expected, found), tolerance, settings):
            differences.edges += 1
            continue
        other = found if table is expected else expected
        shown = f"{settings['classes'][int(row[5])]} of score {row[4]:.4f} at {np.round(row[:4], 2).tolist()}"
        differences.faults.append(f"{name}: {shown} {problem}{_nearest(row, other)}")


def at_edge(
    row: Float[np.ndarray, "6"],
    table: Table,
    both: tuple[Table, Table],
    tolerance: Tolerance,
    settings: dict[str, Any],
) -> bool:
    """Whether rounding may decide about a detection of `table`."""
    edges = [settings["score_threshold"], settings["thresholds"][int(row[5])]]
    edges += [side[-1, 4] for side in both if len(side) == settings["max_detections"]]
    if any(abs(row[4] - edge) <= tolerance.score for edge in edges):
        return True
    rivals = table[(table[:, 4] >= row[4]) & (table[:, 5] == row[5])]
    if settings["class_agnostic"]:
        rivals = table[table[:, 4] >= row[4]]
    overlaps = overlap(row[None, :4], rivals[:, :4])[0]
    return bool((np.abs(overlaps - settings["nms_iou"]) <= _EDGE).any())


def _nearest(row: Float[np.ndarray, "6"], table: Table) -> str:
    same = table[table[:, 5] == row[5]]
    if not len(same):
        return ""
    gaps = np.abs(same - row)
    best = int(gaps[:, :4].max(axis=1).argmin())
    return f"; the nearest of that class is {gaps[best, :4].max():.3g} px and {gaps[best, 4]:.3g} of score away"


def overlap(boxes: Float[np.ndarray, "N 4"], others: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "N M"]:
    """IoU of every pair."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    areas, other_areas = ((side[:, 2:] - side[:, :2]).prod(axis=1) for side in (boxes, others))
    return shared / np.maximum(areas[:, None] + other_areas - shared, 1e-12)


def pack(images: Sequence[Image]) -> dict[str, np.ndarray]:
    """The inputs of an exported file: images [B H W C] at the top left of one canvas, and their sizes [B 2]."""
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    canvas = np.zeros((len(images), *sizes.max(axis=0), images[0].shape[2]), dtype=np.uint8)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return {"images": canvas, "sizes": sizes}


def unpack(first: np.ndarray, second: np.ndarray, settings: dict[str, Any]) -> list[Table]:
    """The outputs of an exported file as the detections of each image."""
    if settings["raw"]:
        return [choose(boxes, scores, settings) for boxes, scores in zip(first, second, strict=True)]
    return [table[:count].astype(np.float64) for table, count in zip(first, second.tolist(), strict=True)]


def choose(boxes: Float32[np.ndarray, "A 4"], scores: Float32[np.ndarray, "A K"], settings: dict[str, Any]) -> Table:
    """What is to be done with the outputs of a file without postprocess: threshold, NMS, and the best that are left.
    (The limit on candidates per level is left out.)"""
    anchors, labels = np.nonzero(scores > settings["score_threshold"])
    values = scores[anchors, labels]
    order = np.argsort(-values, kind="stable")
    table = np.column_stack([boxes[anchors], values, labels]).astype(np.float64)[order]
    kept: list[Any] = []
    while len(table) and len(kept) < settings["max_detections"]:
        best = table[0]
        kept.append(best)
        rival = settings["class_agnostic"] | (table[:, 5] == best[5])
        rival &= overlap(best[None, :4], table[:, :4])[0] > settings["nms_iou"]
        rival[0] = True
        table = table[~rival]
    chosen = np.array(kept).reshape(-1, 6)
    return chosen[chosen[:, 4] >= np.array(settings["thresholds"])[chosen[:, 5].astype(int)]]


class Entry(NamedTuple):
    """An image of a proof, and what the detector found in it."""

    name: str
    """Relative to the folder of all images."""
    sha256: str
    """Of the file."""
    size: list[int]
    """(height, width) of the part at the top left that was looked at, so that sizes differ."""
    detections: list[list[float]]


def read_entry(folder: Path, name: str, sha256: str, size: Sequence[int], pixels: PixelFormat) -> Image:
    """The part of an image that a proof looks at. Raises DataError for another file than then."""
    file = folder / name
    if digest(file) != sha256:
        problem = "is not the image that the proof was made with - give images=, the folder with those"
        raise DataError(f"{file}: {problem}", code="other-image")
    image = read_image(file, pixels=pixels)
    return np.ascontiguousarray(image[: size[0], : size[1]])


def digest(file: Path) -> str:
    """SHA-256 of a file. Raises DataError where there is none."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as fault:
        problem = f"{fault.strerror} - give images=, the folder with the images of the proof"
        raise DataError(f"{file}: {problem}", code="no-file") from None


def batches(count: int) -> list[list[int]]:
    """Every image alone, then together with 1, 2 and 3 others."""
    together: list[list[int]] = []
    start = 0
    while start < count:
        length = 2 + len(together) % 3
        together.append(list(range(start, min(start + length, count))))
        start += length
    return [[number] for number in range(count)] + [group for group in together if len(group) > 1]


class Times(NamedTuple):
    """Milliseconds for one image."""

    median: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        return cls(*(round(1000 * float(np.quantile(seconds, q)), 3) for q in (0.5, 0.95)))

    def line(self) -> str:
        return f"{self.median:.1f} ms (95 %: {self.p95:.1f})"


def timed(run: Callable[[Any], Any], items: Iterable[Any]) -> tuple[list[Any], list[float]]:
    """What `run` returns of each, and the seconds it took."""
    results, seconds = [], []
    for item in items:
        begin = time.perf_counter()
        results.append(run(item))
        seconds.append(time.perf_counter() - begin)
    return results, seconds


def look_again(
    entries: Sequence[Entry], images: Sequence[Image], run: Run, tolerance: Tolerance, settings: dict[str, Any]
) -> tuple[Differences, Times]:
    """What the file finds in the images, alone and together, against what was expected."""
    differences = Differences()
    groups = batches(len(images))
    run([images[0]])  # the first call is slower
    results, seconds = timed(lambda group: run([images[number] for number in group]), groups)
    for group, tables in zip(groups, results, strict=True):
        for number, table in zip(group, tables, strict=True):
            entry = entries[number]
            name = entry.name if len(group) == 1 else f"{entry.name} in a batch of {len(group)}"
            expected = np.array(entry.detections, dtype=np.float64).reshape(-1, 6)
            compare(name, expected, table, differences, tolerance, settings)
    return differences, Times.of(seconds[: len(images)])


def as_values(differences: Differences) -> dict[str, Any]:
    values = asdict(differences)
    return values | {"faults": len(values["faults"])}


def pixels_of(settings: dict[str, Any]) -> PixelFormat:
    """How images are read for a file of this description."""
    low, high = settings["preprocessing"].get("value_range") or FULL
    return PixelFormat((low, high), channels=settings["channels"])


def summary(proof: dict[str, Any]) -> list[str]:
    """What a proof comes to, in lines."""
    differences = Differences(*(proof[name] for name in ("matched", "edges", "pixels", "score")))
    differences.faults += [""] * proof["faults"]
    count = len(proof["images"])
    result = [f"{proof['runtime']}: {count} images, alone and in batches: {differences.line()}"]
    if scores := proof["ap"]:
        pairs = [f"{name} {_shown(scores['file'][name])} ({_shown(scores['retina'][name])})" for name in scores["file"]]
        result.append(f"of the file (of the detector) on {scores['images']} images: {', '.join(pairs)}")
    times = {name: Times(**value).line() for name, value in proof["milliseconds"].items()}
    return [*result, f"one image: file {times['file']}, detector {times['retina']}"]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
