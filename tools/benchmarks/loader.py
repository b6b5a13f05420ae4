"""Images per second of one loader worker, against nothing but decoding and resizing them in a loop.

Photographs of 640x480 as JPEG, to 1067x800. Ours is the whole of what a worker does, in this process: read, check,
augment with boxes, collate; batches of 8. The bare loop is Pillow's decode to an RGB array and cv2.resize
to the same size with the same interpolation, and keeps nothing. "Colour" changes every image (p=1), where
configs/augment/strong.yaml changes half of them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import albumentations as A
import cv2
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from retina.data.coco import Annotations, read_coco
from retina.data.loader import BatchLoader, train_loader
from retina.data.transforms import ColorJitter, Pipeline, ResizeShortSide
from retina.files import make_folder, open_plain, write_whole
from retina.lab.clock import Bench, Row, Times, speedup

SHORT_SIDE, LONG_SIDE = 800, 1333
OBJECTS = 8
FLIP = {"flip": A.HorizontalFlip(p=0.5)}
COLOR = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05, "p": 1.0}


def run(bench: Bench) -> list[Row]:
    cv2.setNumThreads(0)
    with TemporaryDirectory() as folder:
        return [*small(bench, Path(folder, "small")), *large(bench, Path(folder, "large"))]


def small(bench: Bench, folder: Path) -> list[Row]:
    photos = write_photos(folder, 2 if bench.quick else 32, 480, 640)
    check(photos, mean_difference=0.0)
    times = bench.time(
        {
            "bare": partial(bare_loop, photos, pillow_decode),
            "flip": epoch(loader(photos, FLIP)),
            "color": epoch(loader(photos, {"color": ColorJitter(**COLOR), **FLIP})),
            "albumentations": epoch(loader(photos, {"color": A.ColorJitter(**COLOR), **FLIP})),
            "cv2": partial(bare_loop, photos, cv2_decode),
        }
    )
    return [
        rate("loader, flip", times, "flip", photos, must=0.60, goal=0.90),
        rate("loader, flip and colour", times, "color", photos, must=0.25, goal=0.45),
        rate("loader, flip and albumentations' colour", times, "albumentations", photos),
        rate("bare loop with cv2's decoder, which takes half of a JPEG for a whole", times, "cv2", photos),
    ]


def large(bench: Bench, folder: Path) -> list[Row]:
    """12 megapixels, decoded at half scale, against a bare loop that decodes them whole."""
    photos = write_photos(folder, *(1, 1600, 1600) if bench.quick else (4, 3000, 4000))
    check(photos, mean_difference=2.0)  # what two ways of averaging may differ by
    ways: dict[str, Callable[[], object]] = {"bare": partial(bare_loop, photos, pillow_decode)}
    ways["ours"] = epoch(loader(photos, FLIP))
    return [rate("loader, flip, photographs of 4000x3000", bench.time(ways, warmup=1), "ours", photos)]


def write_photos(folder: Path, num: int, height: int, width: int) -> Annotations:
    """JPEGs of quality 90 with the spectrum of photographs, about 60 kB at 640x480, and `OBJECTS` boxes each."""
    make_folder(folder)
    rng = np.random.default_rng(0)
    document: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "it"}]}
    for index in range(num):
        with open_plain(folder / f"{index}.jpg", "xb") as content:
            Image.fromarray(photo(rng, height, width)).save(content, "JPEG", quality=90)
        document["images"].append({"id": index, "file_name": f"{index}.jpg", "height": height, "width": width})
        sides = rng.uniform(0.05, 0.5, (OBJECTS, 2)) * (width, height)
        for box in np.hstack([rng.uniform(0, 1, (OBJECTS, 2)) * ((width, height) - sides), sides]).tolist():
            document["annotations"].append({"image_id": index, "category_id": 1, "bbox": box})
    write_whole(folder / "instances.json", json.dumps(document).encode())
    return read_coco(folder / "instances.json", folder)


def photo(rng: np.random.Generator, height: int, width: int) -> UInt8[ndarray, "H W 3"]:
    """Noise at several scales, the coarser the stronger."""
    image = np.full((height, width, 3), 120, dtype=np.float32)
    for scale, strength in ((64, 60), (16, 35), (4, 16), (1, 9)):
        noise = rng.standard_normal((height // scale + 1, width // scale + 1, 3)).astype(np.float32)
        image += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 255).astype(np.uint8)


def loader(photos: Annotations, transforms: Mapping[str, Any], batch_size: int = 8) -> BatchLoader:
    pipeline = Pipeline({**transforms, "resize": ResizeShortSide(SHORT_SIDE, LONG_SIDE)})
    return train_loader(photos, pipeline, batch_size=min(batch_size, len(photos)))


def epoch(loader: BatchLoader) -> Callable[[], object]:
    return lambda: [None for _ in loader]


def bare_loop(photos: Annotations, decode: Callable[[Path], UInt8[ndarray, "H W 3"]]) -> None:
    for index in range(len(photos)):
        resized(decode(photos.path(index)))


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


def check(photos: Annotations, *, mean_difference: float) -> None:
    """Without random transforms, our batches hold the bare loop's pixels up to that, and boxes scaled as they are."""
    for batch in loader(photos, {}, batch_size=1):
        index = int(batch.indices[0])
        expected = resized(pillow_decode(photos.path(index)))
        height, width = expected.shape[:2]
        assert batch.sizes.tolist() == [[height, width]]
        scale = np.array([width, height, width, height]) / np.tile(photos.sizes[index, ::-1], 2)
        objects = slice(photos.offsets[index], photos.offsets[index + 1])
        np.testing.assert_allclose(batch.targets.boxes[0], photos.boxes[objects] * scale, atol=1e-3)
        image = batch.images[0].permute(1, 2, 0).numpy()[:height, :width]
        assert np.abs(image.astype(np.int16) - expected).mean() <= mean_difference


def rate(measure: str, times: Mapping[str, Times], way: str, photos: Annotations, **bars: float) -> Row:
    """Images per second of a way in units of those of the bare loop."""
    row = speedup(measure, {"ours": times[way], "reference": times["bare"]}, **bars)
    rate, bare = (len(photos) / times[name].median for name in (way, "bare"))
    return replace(row, ours=rate, reference=bare, unit="images/s")
