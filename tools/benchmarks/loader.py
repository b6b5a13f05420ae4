"""Images per second of one loader worker, against nothing but decoding and resizing them in a loop.

Photographs of 640x480 as JPEG, to 1067x800. Ours is the whole of what a worker does, in this process: read, check,
augment with boxes, collate; batches of 8. The bare loop is Pillow's decode to an RGB array and cv2.resize
to the same size with the same interpolation, and keeps nothing. "Colour" changes every image (p=1), where
configs/augment/strong.yaml changes half of them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import albumentations as A
import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from retina.data.coco import Annotations, read_coco
from retina.data.loader import BatchLoader, train_loader
from retina.data.transforms import ColorJitter, Pipeline, ResizeShortSide
from retina.lab.clock import Bench, Row, Times

SHORT_SIDE, LONG_SIDE = 800, 1333
OBJECTS = 8
COLOR = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05}


def run(bench: Bench) -> list[Row]:
    cv2.setNumThreads(0)
    with TemporaryDirectory() as folder:
        return [*small(bench, Path(folder, "small")), *large(bench, Path(folder, "large"))]


def small(bench: Bench, folder: Path) -> list[Row]:
    num = 2 if bench.quick else 32
    photos = write_photos(folder, num, 480, 640)
    check_equal(photos)
    flip = {"flip": A.HorizontalFlip(p=0.5)}
    times = bench.time(
        {
            "bare": bare_loop(photos, pillow_decode),
            "flip": epoch(loader(photos, flip)),
            "color": epoch(loader(photos, {"color": ColorJitter(**COLOR, p=1.0), **flip})),
            "albumentations": epoch(loader(photos, {"color": A.ColorJitter(**COLOR, p=1.0), **flip})),
            "cv2": bare_loop(photos, cv2_decode),
        }
    )
    rate = partial(rate_row, num=num, times=times)
    return [
        rate("loader, flip", ours="flip", must=0.60, goal=0.90),
        rate("loader, flip and colour", ours="color", must=0.25, goal=0.45),
        rate("loader, flip and albumentations' colour", ours="albumentations"),
        rate("bare loop with cv2's decoder, which takes half of a JPEG for a whole", ours="cv2"),
    ]


def large(bench: Bench, folder: Path) -> list[Row]:
    """12 megapixels, decoded at half scale, against a bare loop that decodes them whole."""
    num, size = (1, (1600, 1600)) if bench.quick else (4, (3000, 4000))
    photos = write_photos(folder, num, *size)
    check_close(photos)
    flip = {"flip": A.HorizontalFlip(p=0.5)}
    times = bench.time({"bare": bare_loop(photos, pillow_decode), "ours": epoch(loader(photos, flip))}, warmup=1)
    return [rate_row("loader, flip, photographs of 4000x3000", num=num, times=times, ours="ours")]


def write_photos(folder: Path, num: int, height: int, width: int) -> Annotations:
    """JPEGs of quality 90 with the spectrum of photographs, about 60 kB at 640x480, and `OBJECTS` boxes each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index in range(num):
        name = f"{index}.jpg"
        Image.fromarray(photo(rng, height, width)).save(folder / name, quality=90)
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for x, y, w, h in boxes(rng, height, width).tolist():
            box = {"bbox": [x, y, w, h], "area": w * h, "category_id": 1, "iscrowd": 0}
            objects.append(box | {"id": len(objects) + 1, "image_id": index + 1})
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "it"}]}))
    return read_coco(file, folder)


def photo(rng: np.random.Generator, height: int, width: int) -> UInt8[ndarray, "H W 3"]:
    """Noise at several scales, the coarser the stronger."""
    image = np.full((height, width, 3), 120, dtype=np.float32)
    for scale, strength in ((64, 60), (16, 35), (4, 16), (1, 9)):
        noise = rng.standard_normal((height // scale + 1, width // scale + 1, 3)).astype(np.float32)
        image += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 255).astype(np.uint8)


def boxes(rng: np.random.Generator, height: int, width: int) -> Float[ndarray, "M 4"]:
    """xywh, inside the image."""
    sides = rng.uniform(0.05, 0.5, (OBJECTS, 2)) * (width, height)
    return np.hstack((rng.uniform(0, 1, (OBJECTS, 2)) * ((width, height) - sides), sides))


def loader(photos: Annotations, transforms: Mapping[str, Any], batch_size: int = 8) -> BatchLoader:
    pipeline = Pipeline({**transforms, "resize": ResizeShortSide(SHORT_SIDE, LONG_SIDE)})
    return train_loader(photos, pipeline, batch_size=min(batch_size, len(photos)))


def epoch(loader: BatchLoader) -> Callable[[], None]:
    def way() -> None:
        for _ in loader:
            pass

    return way


def bare_loop(photos: Annotations, decode: Callable[[Path], UInt8[ndarray, "H W 3"]]) -> Callable[[], None]:
    paths = [photos.path(index) for index in range(len(photos))]

    def way() -> None:
        for path in paths:
            resized(decode(path))

    return way


def pillow_decode(path: Path) -> UInt8[ndarray, "H W 3"]:
    with Image.open(path) as image:
        return np.asarray(image)


def cv2_decode(path: Path) -> UInt8[ndarray, "H W 3"]:
    return np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB))


def resized(image: UInt8[ndarray, "H W 3"]) -> UInt8[ndarray, "h w 3"]:
    height, width = image.shape[:2]
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=how)


def check_equal(photos: Annotations) -> None:
    """Without random transforms, our batches hold the bare loop's pixels, and boxes scaled as they are."""
    for found, expected in images_of_both(photos):
        np.testing.assert_array_equal(found, expected)


def check_close(photos: Annotations) -> None:
    """Decoded at half scale, within what two ways of averaging may differ by."""
    for found, expected in images_of_both(photos):
        assert np.abs(found.astype(np.int16) - expected).mean() < 2


def images_of_both(photos: Annotations) -> Iterator[tuple[UInt8[ndarray, "h w 3"], UInt8[ndarray, "h w 3"]]]:
    for batch in loader(photos, {}, batch_size=1):
        index = int(batch.indices[0])
        expected = resized(pillow_decode(photos.path(index)))
        height, width = expected.shape[:2]
        assert batch.sizes.tolist() == [[height, width]]
        scale = np.array([width, height, width, height]) / np.tile(photos.sizes[index, ::-1], 2)
        objects = slice(photos.offsets[index], photos.offsets[index + 1])
        np.testing.assert_allclose(batch.targets.boxes[0], photos.boxes[objects] * scale, atol=1e-3)
        yield batch.images[0].permute(1, 2, 0).numpy()[:height, :width], expected


def rate_row(
    measure: str,
    *,
    num: int,
    times: Mapping[str, Times],
    ours: str,
    must: float | None = None,
    goal: float | None = None,
) -> Row:
    """Images per second of a way in units of those of the bare loop."""
    found, bare = times[ours], times["bare"]
    return Row(
        measure=measure,
        ours=num / found.median,
        reference=num / bare.median,
        unit="images/s",
        ratio=bare.median / found.median,
        ratio_of_minima=bare.minimum / found.minimum,
        must=must,
        goal=goal,
    )
