"""The built-in data set: drawn shapes of five classes, so that training starts with no download.

It is made to be a small object-detection problem rather than a toy: textured backgrounds, overlapping and cropped
tilted shapes from about 12 pixels up, a long tail of classes, images of several sizes, images without objects.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw

from retina.errors import ConfigError, DataError
from retina.files import make_folder, open_plain, read_plain, write_synced
from retina.schema import parse_json

_VERSION = 2  # of the pictures: raise it with any change that draws them differently
_STAMP = "shapes.json"
_SUPERSAMPLING = 4  # masks are drawn four times as large: smooth edges, and boxes exact to a quarter of a pixel
_MIN_VISIBLE = 0.8  # share of a shape left by the frame and by later shapes; below it a class is hard to tell
_MIN_SIDE = 10.0  # of a box inside the frame, in pixels
_EMPTY = 0.08  # share of images without objects
_CROPPED = 0.25  # share of shapes that may stick out of the frame
_MAX_OBJECTS = 10


def write_shapes(
    root: str | Path,
    *,
    num_train: int = 2000,
    num_val: int = 200,
    image_size: Sequence[int] = (128, 160),
    seed: int = 0,
) -> None:
    """Write the shapes data set in COCO's layout: `{train,val}/*.jpg`, `annotations/instances_{train,val}.json`.

    `image_size` is (short side, long side): half of the images are landscape, a quarter portrait, a quarter square with
    the short side. Boxes are tight around what is seen of a shape, inside the frame and between later shapes; `area` is
    that of the box. Every image depends on (seed, split, its number) alone: the same arguments give the same bytes
    (with the same numpy and pillow), and a larger set begins with the smaller one.

    The folder appears in one step, whole; several processes may call this at once. A set made with the same arguments
    is left as it is. Raises ConfigError for fewer than one image, or a size that is too small or not (short, long);
    DataError if `root` holds something else, or shapes of other arguments.
    """
    root = Path(root)
    if num_train < 1 or num_val < 1:
        problem = f"{num_train} and num_val {num_val}: no images - give at least 1 of each"
        raise ConfigError(problem, code="shapes", key="num_train")
    if len(image_size) != 2 or not 64 <= image_size[0] <= image_size[1]:
        problem = f"{[*image_size]} are not a short and a long side from 64 up - give [256, 320], say"
        raise ConfigError(problem, code="shapes", key="image_size")
    short, long = image_size
    stamp = {"version": _VERSION, "num_train": num_train, "num_val": num_val, "image_size": [short, long], "seed": seed}
    if _is_complete(root, stamp):
        return
    make_folder(root.parent)
    temporary = root.parent / f".{root.name}.{uuid.uuid4().hex}.tmp"
    try:
        for number, (split, num_images) in enumerate({"train": num_train, "val": num_val}.items()):
            _write_split(temporary, split, num_images, (short, long), (seed, number))
        write_synced(temporary / _STAMP, json.dumps(stamp).encode())
        try:
            os.rename(temporary, root)
        except OSError:  # another process was faster: its set must be the one asked for
            if not _is_complete(root, stamp):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_complete(root: Path, stamp: dict[str, Any]) -> bool:
    """Whether `root` holds the set asked for: False where nothing is yet, DataError where something else is."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        present = parse_json(read_plain(root / _STAMP))
    except (OSError, ValueError, RecursionError):
        problem = "holds something that is not a shapes data set - choose another folder"
        raise DataError(f"{root}: {problem}", code="not-shapes") from None
    if present != stamp:
        problem = f"holds shapes made with {present}, not {stamp} - choose another folder, or delete this one"
        raise DataError(f"{root}: {problem}", code="other-shapes")
    for split in ("train", "val"):
        if len([*(root / split).glob("*.jpg")]) != (num := stamp[f"num_{split}"]):
            problem = f"some of {num} images are gone - delete {root}"
            raise DataError(f"{root / split}: {problem}", code="incomplete-shapes")
    return True


def _write_split(root: Path, split: str, num_images: int, image_size: tuple[int, int], seed: tuple[int, int]) -> None:
    make_folder(root / split)
    make_folder(root / "annotations")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        image, labels, boxes = _draw_image(np.random.default_rng([*seed, index]), image_size)
        name = f"{index:06d}.jpg"
        with open_plain(root / split / name, "xb") as content:
            Image.fromarray(image).save(content, "JPEG", quality=92)
        images.append({"id": index + 1, "file_name": name, "width": image.shape[1], "height": image.shape[0]})
        for label, (x1, y1, x2, y2) in zip(labels, boxes, strict=True):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            ids = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": _CATEGORY_IDS[label]}
            annotations.append(ids | box)
    categories = [{"id": i, "name": name} for i, name in zip(_CATEGORY_IDS, _CLASSES, strict=True)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    write_synced(root / "annotations" / f"instances_{split}.json", json.dumps(document).encode())


def _draw_image(
    rng: Generator, image_size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "H W 3"], list[int], list[tuple[float, ...]]]:
    """One image (uint8 HWC) with the labels and xyxy boxes of its shapes."""
    short, long = image_size
    height, width = [(short, long), (short, long), (long, short), (short, short)][rng.integers(4)]
    image = _draw_background(rng, height, width)
    owner = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), dtype=np.int8)  # which shape is seen: 1, 2, ...
    labels: list[int] = []
    full: list[int] = []  # pixels of every whole shape, and how many of them are visible
    visible: list[int] = []
    views = []  # the part of `owner` around every shape, and where that begins
    num_objects = 0 if rng.random() < _EMPTY else int(rng.integers(1, _MAX_OBJECTS + 1))
    for label in rng.choice(len(_CLASSES), size=num_objects, p=_SHARES).tolist():
        for _ in range(20):  # places until one fits; a crowded image ends up with fewer shapes
            mask, top, left = _draw_mask(rng, label, short, height, width)
            y, x = max(top, 0), max(left, 0)
            inside = mask[y - top : max(owner.shape[0] - top, 0), x - left : max(owner.shape[1] - left, 0)]
            under = owner[y : y + inside.shape[0], x : x + inside.shape[1]]
            hidden = np.bincount(under[inside], minlength=len(visible) + 1)[1:]
            area, area_inside = int(np.count_nonzero(mask)), int(np.count_nonzero(inside))
            y1, x1, y2, x2 = _extent(inside)
            if (
                area_inside >= _MIN_VISIBLE * area
                and min(y2 - y1, x2 - x1) >= _MIN_SIDE * _SUPERSAMPLING
                and all(s - h >= _MIN_VISIBLE * f for s, h, f in zip(visible, hidden, full, strict=True))
            ):
                visible = [s - int(h) for s, h in zip(visible, hidden, strict=True)] + [area_inside]
                full.append(area)
                views.append((under, y, x))
                labels.append(label)
                under[inside] = len(visible)
                _paint(rng, image, inside, y // _SUPERSAMPLING, x // _SUPERSAMPLING)
                break
    boxes = []
    for number, (view, y, x) in enumerate(views, start=1):
        y1, x1, y2, x2 = _extent(view == number)
        boxes.append(tuple(side / _SUPERSAMPLING for side in (x + x1, y + y1, x + x2, y + y2)))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(1, 2, 0), labels, boxes


def _draw_background(rng: Generator, height: int, width: int) -> Float32[np.ndarray, "3 H W"]:
    """A gradient between two colours, with soft blobs of two more, faint stripes and noise."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    colours = rng.uniform(20, 235, size=(4, 3, 1, 1)).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.clip((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle) + 0.5, 0, 1)
    image = colours[0] + (colours[1] - colours[0]) * ramp
    for colour in colours[2:]:
        cells = Image.fromarray(rng.integers(0, 256, size=rng.integers(3, 9, size=2), dtype=np.uint8))
        blobs = np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        image += (colour - image) * blobs * np.float32(rng.uniform(0.1, 0.6) / 255)
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.02, 0.2)
    stripes = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
    image += stripes * rng.uniform(-14, 14, size=(3, 1, 1)).astype(np.float32)
    image += rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(2, 7))
    return image


def _draw_mask(
    rng: Generator, label: int, short: int, height: int, width: int
) -> tuple[Bool[np.ndarray, "h w"], int, int]:
    """A shape of random size, form, rotation and place, supersampled, with its top and left edge in the image.

    The edges are whole pixels of the image, and may lie outside it.
    """
    size = rng.uniform(14, 0.4 * short)
    outlines = _outlines(_CLASSES[label], rng)
    angle = rng.uniform(-0.5, 0.5)  # like most things in photographs, shapes stand more or less upright
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    reach = size * (0.2 if rng.random() < _CROPPED else -0.5)
    centre = rng.uniform([-reach, -reach], [width + reach, height + reach])
    outlines = [outline @ rotation * (size / 2) + centre for outline in outlines]
    left, top = np.floor(outlines[0].min(axis=0)).astype(int)
    right, bottom = np.ceil(outlines[0].max(axis=0)).astype(int)
    canvas = Image.new("L", (int(right - left) * _SUPERSAMPLING, int(bottom - top) * _SUPERSAMPLING))
    for number, outline in enumerate(outlines):
        points = (outline - (left, top)) * _SUPERSAMPLING - 0.5  # pillow counts from the centre of the first pixel
        ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=1 - number)  # the second is a hole
    return np.asarray(canvas, dtype=np.bool_), int(top) * _SUPERSAMPLING, int(left) * _SUPERSAMPLING


def _paint(rng: Generator, image: Float32[np.ndarray, "3 H W"], mask: Bool[np.ndarray, "h w"], y: int, x: int) -> None:
    """Blend a shape into the image in place: a colour unlike what it covers, shaded, striped and grainy."""
    height, width = (side // _SUPERSAMPLING for side in mask.shape)
    patch = image[:, y : y + height, x : x + width]
    coverage = Image.fromarray(mask.astype(np.uint8) * 255).reduce(_SUPERSAMPLING)
    alpha = np.asarray(coverage, dtype=np.float32) / 255
    covered = (patch * alpha).sum(axis=(1, 2)) / alpha.sum()
    colours = rng.uniform(15, 240, size=(16, 3)).astype(np.float32)
    distances = np.linalg.norm(colours - covered, axis=1)
    colour = colours[np.argmax(distances > 120) if (distances > 120).any() else np.argmax(distances)]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period, shade = rng.uniform(0, math.pi), rng.uniform(4, 12), rng.uniform(0, 2 * math.pi)
    stripes = np.sin((columns * math.cos(angle) + rows * math.sin(angle)) * (2 * math.pi / period))
    ramp = (columns / width - 0.5) * math.cos(shade) + (rows / height - 0.5) * math.sin(shade)
    grain = rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(1, 6))
    texture = colour[:, None, None] + stripes * rng.uniform(-18, 18, size=(3, 1, 1)).astype(np.float32)
    texture += ramp * 40 + grain
    patch += (texture - patch) * alpha


def _extent(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """First and last + 1 row and column with a set pixel, as (top, left, bottom, right); zeros where there is none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


_CLASSES = ("circle", "rectangle", "triangle", "star", "ring")
_CATEGORY_IDS = (3, 7, 11, 20, 42)  # sparse, as those of real data sets are
_SHARES = (0.36, 0.28, 0.20, 0.13, 0.03)


def _outlines(name: str, rng: Generator) -> list[Float[np.ndarray, "P 2"]]:
    """The outline of a shape, in a circle of radius 1 around the origin; a second one is a hole."""
    circle = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    if name == "rectangle":
        diagonal = math.atan(rng.uniform(0.45, 1.0))
        return [_polar(np.array([diagonal, math.pi - diagonal, math.pi + diagonal, -diagonal]))]
    if name == "triangle":
        return [_polar(np.arange(3) * (2 * math.pi / 3) + rng.uniform(-0.25, 0.25, size=3))]
    if name == "star":
        return [_polar(np.arange(10) * (math.pi / 5), np.where(np.arange(10) % 2, rng.uniform(0.4, 0.5), 1.0))]
    return [_polar(circle), _polar(circle, rng.uniform(0.5, 0.65))] if name == "ring" else [_polar(circle)]


def _polar(angles: Float[np.ndarray, "P"], radii: Float[np.ndarray, "P"] | float = 1.0) -> Float[np.ndarray, "P 2"]:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radii, (-1, 1))
