"""Pictures of targets and detections: boxes in one colour per class, labels that stay readable at any image size."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from retina.errors import plain
from retina.types import Batch, Detections

LONG_SIDE = 768
"""Pixels. Smaller images are enlarged to this before anything is drawn, so that text does not hide the objects."""
BACKGROUND = (32, 33, 36)
CROWD_COLOUR = (230, 230, 230)

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""x1 y1 x2 y2 in whole pixels, both corners inside."""
Limits = float | Sequence[float]
"""The score from which on detections are drawn, or that of each label."""


@dataclass(frozen=True, kw_only=True)
class DrawStyle:
    """How boxes are drawn. Sizes are pixels of the picture; None: they grow with the picture, and shrink with the
    object, so that its label does not hide it."""

    label: str = "name_score"
    """One of LABELS."""
    font: str | None = None
    """A TrueType or OpenType file; None is DejaVu Sans, which has Latin, Greek and Cyrillic letters."""
    font_size: int | None = None
    line_width: int | None = None

    def sizes(self, side: int, box: Rectangle) -> tuple[int, int]:
        """Line width and font size at a box, in a picture whose longer side is `side`."""
        x1, y1, x2, y2 = box
        small = math.sqrt(max(x2 - x1, 1) * max(y2 - y1, 1))
        line = min(max(3, round(side / 300)), max(2, round(small / 16)))
        font = min(max(13, round(side / 58)), max(11, round(small / 4)))
        return self.line_width or line, self.font_size or font

    def words(self, name: str, score: float | None) -> str:
        parts = {"name": name, "score": "" if score is None else f"{score:.2f}"}
        return " ".join(parts[key] for key in LABELS[self.label] if parts[key])


LABELS = {"name_score": ("name", "score"), "name": ("name",), "score": ("score",), "none": ()}
"""What may stand at a box."""
AS_IT_FITS = DrawStyle()


def class_colour(label: int) -> Colour:
    """RGB of a class: the same in every picture; neighbouring labels lie far apart (hue turns by the golden angle)."""
    hue = (0.58 + label * 0.61803398875) % 1.0
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.9, 0.8))[label // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: UInt8[np.ndarray, "H W C"],
    boxes: Float[np.ndarray, "M 4"],
    labels: Int[np.ndarray, "M"],
    classes: Sequence[str],
    *,
    scores: Float[np.ndarray, "M"] | None = None,
    crowd: Bool[np.ndarray, "M"] | None = None,
    scale: float | None = None,
    style: DrawStyle = AS_IT_FITS,
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """A copy of the image with boxes (xyxy in its pixels) and their class names, and scores as "0.87" where given.

    Crowd regions are dashed and light grey. Higher scores lie over lower ones. Lines and text grow with the image, and
    are smaller at small objects.

    scale: the copy is so many times as large. None enlarges an image whose longer side is under 768 px to that."""
    scale = max(1.0, LONG_SIDE / max(image.shape[:2])) if scale is None else scale
    picture = Image.fromarray(shown_channels(image))
    if scale != 1:
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    # Best first for placing labels (they get the free places), best last for drawing (they lie on top).
    order = np.argsort(-scores, kind="stable") if scores is not None else np.arange(len(boxes))
    dashed = np.zeros(len(boxes), bool) if crowd is None else crowd
    items: list[tuple[Rectangle, Colour, bool, int]] = []
    tags: list[tuple[Rectangle, Colour, str, ImageFont.FreeTypeFont]] = []
    for row in order:
        label = int(labels[row])
        rectangle = _inside(boxes[row] * scale, picture.size)
        colour = CROWD_COLOUR if dashed[row] else class_colour(label)
        thickness, font_size = style.sizes(max(picture.size), rectangle)
        items.append((rectangle, colour, bool(dashed[row]), thickness))
        name = plain(classes[label]) + (" (crowd)" if dashed[row] else "")
        text = style.words(name, None if scores is None else float(scores[row]))
        if text:
            font = _font(font_size, style.font)
            size = math.ceil(font.getlength(text) + font.size * 0.5), math.ceil(font.size * 1.3)
            place = _place(rectangle, size, picture.size, thickness, [tag for tag, *_ in tags])
            tags.append((place, colour, text, font))
    for rectangle, colour, is_crowd, thickness in reversed(items):
        if is_crowd:
            _dashed(draw, rectangle, colour, thickness)
        else:
            # A dark edge keeps bright colours visible on bright ground.
            x1, y1, x2, y2 = rectangle
            draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=BACKGROUND, width=thickness + 2)
            draw.rectangle(rectangle, outline=colour, width=thickness)
    for tag, colour, text, font in reversed(tags):
        draw.rectangle(tag, fill=colour)
        middle = ((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2)
        draw.text(middle, text, fill=_contrast(colour), font=font, anchor="mm")
    return np.asarray(picture).copy()


def shown_channels(image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W 3"]:
    """What a picture shows of an image of any channels: the first three, or the first in grey."""
    return np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2))


def draw_detections(
    image: UInt8[np.ndarray, "H W C"],
    detections: Detections,
    classes: Sequence[str],
    *,
    score_threshold: Limits = 0.3,
    style: DrawStyle = AS_IT_FITS,
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """`draw_boxes` of the detections with score >= threshold; their boxes are in pixels of this image."""
    boxes, scores, labels = (values.detach().cpu().numpy() for values in detections)
    rows = _reach(scores, labels, score_threshold)
    return draw_boxes(image, boxes[rows], labels[rows], classes, scores=scores[rows], style=style)


def side_by_side(
    image: UInt8[np.ndarray, "H W C"],
    boxes: Float[np.ndarray, "M 4"],
    labels: Int[np.ndarray, "M"],
    detections: Detections,
    classes: Sequence[str],
    *,
    crowd: Bool[np.ndarray, "M"] | None = None,
    score_threshold: Limits = 0.3,
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The ground truth (boxes, labels, crowd) on the left and the detections on the right, each under its caption."""
    truth = draw_boxes(image, boxes, labels, classes, crowd=crowd)
    predicted = draw_detections(image, detections, classes, score_threshold=score_threshold)
    count = int(_reach(detections.scores.cpu().numpy(), detections.labels.cpu().numpy(), score_threshold).sum())
    limit = (
        f"with score ≥ {score_threshold:g}" if isinstance(score_threshold, (int, float)) else "at the operating point"
    )
    left = _captioned(truth, f"ground truth: {len(boxes)}")
    right = _captioned(predicted, f"detections {limit}: {count}")
    gap = np.full((left.shape[0], max(4, left.shape[1] // 100), 3), BACKGROUND, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _reach(scores: Float[np.ndarray, "D"], labels: Int[np.ndarray, "D"], limits: Limits) -> Bool[np.ndarray, "D"]:
    return scores >= (limits if isinstance(limits, (int, float)) else np.asarray(limits)[labels])


def grid(images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures of any sizes, row by row, centred in the cells of the grid that is nearest to a square of those without
    an empty cell; up to three stand side by side. Raises ValueError for none."""
    if not images:
        raise ValueError("a grid needs at least one image")
    rows = max(n for n in range(1, math.isqrt(len(images)) + 1) if len(images) % n == 0)
    columns = len(images) // rows
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    gap = max(2, max(height, width) // 128)
    canvas = np.empty((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    for position, image in enumerate(images):
        top = (position // columns) * (height + gap) + (height - image.shape[0]) // 2
        left = (position % columns) * (width + gap) + (width - image.shape[1]) // 2
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def batch_pictures(batch: Batch, classes: Sequence[str], max_images: int) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """The first images of a batch as the model sees them, without padding, with their targets; 768 px long."""
    pictures = []
    for position in range(min(max_images, len(batch.images))):
        height, width = batch.sizes[position].tolist()
        image = batch.images[position, :, :height, :width].permute(1, 2, 0).cpu().numpy()
        boxes, labels, valid, crowd = (values[position].cpu().numpy() for values in batch.targets)
        real = valid | crowd
        scale = LONG_SIDE / max(height, width)
        pictures.append(draw_boxes(image, boxes[real], labels[real], classes, crowd=crowd[real], scale=scale))
    return pictures


@lru_cache(maxsize=64)
def _font(size: int, file: str | None = None) -> ImageFont.FreeTypeFont:
    if file is not None:
        return ImageFont.truetype(file, size)
    # DejaVu Sans comes with matplotlib and has Cyrillic, Greek and Vietnamese letters, unlike Pillow's own font.
    # Imported here because it takes half a second, which only those who draw should pay.
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _inside(box: Float[np.ndarray, "4"], size: tuple[int, int]) -> Rectangle:
    """Clip whole edges into the picture, so that a box that leaves it shows as one that ends at its border."""
    x1, y1, x2, y2 = np.clip(np.round(box), 0, np.array(size * 2) - 1).astype(int).tolist()
    return x1, y1, max(x2, x1), max(y2, y1)


def _place(
    box: Rectangle, tag: tuple[int, int], size: tuple[int, int], thickness: int, taken: Sequence[Rectangle]
) -> Rectangle:
    """The place at a box where its label hides least of the labels placed before: above left if nothing is there."""
    width, height = tag
    x1, y1, x2, y2 = box
    left, right = x1, x2 - width + 1
    above, below, top, bottom = y1 - height - 1, y2 + 1, y1 + thickness, y2 - height - thickness
    places: list[Rectangle] = []
    for x, y in ((left, above), (left, below), (right, above), (right, below), (left, top), (left, bottom)):
        if not places or 0 <= y <= size[1] - 1 - height:  # the first is moved into the picture
            x, y = min(max(x, 0), max(size[0] - 1 - width, 0)), min(max(y, 0), max(size[1] - 1 - height, 0))
            places.append((x, y, x + width, y + height))

    def hidden(place: Rectangle) -> int:
        return sum(_overlap(place, label) for label in taken)

    return next((place for place in places if not hidden(place)), None) or min(places, key=hidden)


def _overlap(a: Rectangle, b: Rectangle) -> int:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _dashed(draw: ImageDraw.ImageDraw, rectangle: Rectangle, colour: Colour, thickness: int) -> None:
    x1, y1, x2, y2 = rectangle
    dash, step, inner = 4 * thickness, 7 * thickness, thickness - 1
    draw.rectangle(rectangle, outline=BACKGROUND, width=thickness)
    horizontal = [(x, y, min(x + dash, x2), max(y, y + inner)) for x in range(x1, x2, step) for y in (y1, y2 - inner)]
    vertical = [(x, y, max(x, x + inner), min(y + dash, y2)) for y in range(y1, y2, step) for x in (x1, x2 - inner)]
    for piece in horizontal + vertical:
        draw.rectangle(piece, fill=colour)


def _contrast(colour: Colour) -> Colour:
    """Black or white, whichever is easier to read on the colour (relative luminance of WCAG 2, without its gamma)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 120 else (255, 255, 255)


def _captioned(picture: UInt8[np.ndarray, "H W 3"], caption: str) -> UInt8[np.ndarray, "H2 W 3"]:
    size = max(14, round(max(picture.shape) / 45))
    while size > 6 and _font(size).getlength(caption) > picture.shape[1]:
        size -= 1
    bar = Image.new("RGB", (picture.shape[1], round(1.8 * size)), BACKGROUND)
    ImageDraw.Draw(bar).text((size // 2, bar.height / 2), caption, fill=(255, 255, 255), font=_font(size), anchor="lm")
    return np.concatenate([np.asarray(bar), picture])
