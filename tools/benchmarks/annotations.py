"""Annotations of 2 million images and 15 million boxes: from the cache into a process, and shared with its workers.

The JSON is a real one of 2 GB, beside a folder with all the files that it names; only its entry in the cache is written
from the arrays that the JSON was written from, since parsing it would take 15 GB of memory. That parsing gives the same
is asserted with a small one.
"""

import gc
import os
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from retina.data.annotations import Annotations
from retina.data.cache import CACHE_FROM_BYTES, CachedAnnotations, Request, find_entry, store
from retina.data.coco import read_coco
from retina.lab.clock import Bench, Row, absolute

NUM_CLASSES = 80
CHUNK = 100_000
"""Records written at a time."""
FOLDER = 1000
"""Images of a sub-folder."""
WORKERS = 4


def run(bench: Bench) -> list[Row]:
    before = os.environ.get("RETINA_CACHE")
    try:
        with TemporaryDirectory() as folder:
            return _run(bench, Path(folder))
    finally:
        os.environ.pop("RETINA_CACHE")
        if before is not None:
            os.environ["RETINA_CACHE"] = before


def _run(bench: Bench, folder: Path) -> list[Row]:
    os.environ["RETINA_CACHE"] = ""  # parse
    known = _made(folder / "small", 2000, 15_000)
    assert read_coco(known.file, known.image_root).fingerprint() == known.fingerprint()
    if not bench.quick:
        known = _made(folder / "large", 2_000_000, 15_000_000)

    os.environ["RETINA_CACHE"] = str(folder / "cache")
    file, image_root, fingerprint = known.file, known.image_root, known.fingerprint()
    entry = find_entry(file, Request(classes=None, allow_outside=False))
    assert entry is not None
    assert store(entry, CachedAnnotations(known, [], []), allow_outside=False) is None
    del known

    seconds, processor_seconds = [], []
    for _ in range(bench.rounds):
        gc.collect()
        started, processor_started = time.perf_counter(), time.process_time()
        annotations = read_coco(file, image_root)
        seconds.append(time.perf_counter() - started)
        processor_seconds.append(time.process_time() - processor_started)
    assert annotations.fingerprint() == fingerprint
    size = f"{len(annotations):,} images, {annotations.num_objects:,} boxes"
    share = _extra_memory(annotations, entry)
    load = "annotations: load from the cache"
    wall, processor = median(seconds), median(processor_seconds)
    return [
        absolute(f"{load}, {size} (wall time)", wall, "s", must=10, goal=2, ratio_of_minima=min(seconds)),
        absolute(f"{load}, processor time of all its threads", processor, "s", ratio_of_minima=min(processor_seconds)),
        absolute("annotations: memory per extra worker, as a share of theirs", share, must=0.05, goal=0.005),
    ]


def _extra_memory(annotations: Annotations, entry: Path) -> float:
    """What each of 4 forked workers adds to the memory of all by looking at every image and object, in units of the
    memory of the annotations. Pages that processes share are counted once."""
    context = get_context("fork")
    barrier = context.Barrier(WORKERS + 1, timeout=600)
    workers = [context.Process(target=_look_at_all, args=(annotations, barrier), daemon=True) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    pids = [os.getpid(), *(worker.pid for worker in workers)]
    barrier.wait()  # all are there
    before = sum(_own_memory(pid, entry) for pid in pids)
    barrier.wait()  # and look
    barrier.wait()  # have looked
    after = sum(_own_memory(pid, entry) for pid in pids)
    barrier.wait()
    for worker in workers:
        worker.join()
    arrays = [value for value in vars(annotations).values() if isinstance(value, np.ndarray)]
    return (after - before) / WORKERS / sum(array.nbytes for array in arrays)


def _look_at_all(annotations: Annotations, barrier: Barrier) -> None:
    barrier.wait()
    barrier.wait()
    for index in range(len(annotations)):
        annotations.file_name(index)
        rows = slice(annotations.offsets[index], annotations.offsets[index + 1])
        annotations.boxes[rows].astype(np.float32)
        annotations.labels[rows].copy()
        annotations.crowd[rows].copy()
    barrier.wait()
    barrier.wait()


def _own_memory(pid: int | None, entry: Path) -> int:
    """Bytes of a process's anonymous memory and of the entry mapped into it, what it shares by shares (Linux).

    Libraries are left out: other programs that come and go share them."""
    total, counts = 0, False
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            first, *words = line.split()
            if "-" in first:
                path = words[4] if len(words) > 4 else ""
                counts = path.startswith(f"{entry}/") or not path.startswith("/")
            elif first == "Pss:" and counts:
                total += int(words[0]) * 1024
    return total


def _made(folder: Path, num_images: int, num_boxes: int) -> Annotations:
    """A JSON large enough for the cache, the image files (hard links to empty ones), and what the JSON says."""
    generator = np.random.default_rng(0)
    ids = np.arange(num_images)
    sizes = np.stack([generator.integers(400, 900, num_images), generator.integers(400, 1400, num_images)], axis=1)
    rows = np.sort(generator.integers(0, num_images, num_boxes))
    labels = generator.integers(0, NUM_CLASSES, num_boxes)
    # hundredths of a pixel
    sides = generator.integers(100, 40_000, (num_boxes, 2), dtype=np.int32)
    corners = (generator.random((num_boxes, 2), dtype=np.float32) * (sizes[rows, ::-1] * 100 - sides)).astype(np.int32)
    areas = sides.astype(np.int64).prod(axis=1)

    names = np.concatenate(
        [_digits(ids // FOLDER, 4, b"0"), _text(b"/", num_images), _digits(ids, 12, b"0"), _text(b".jpg", num_images)],
        axis=1,
    )
    file = folder / "instances_train.json"
    image_root = folder / "train"
    _write_files(image_root, num_images)
    with file.open("wb") as stream:
        stream.write(b" " * (CACHE_FROM_BYTES if num_boxes < CHUNK else 0) + b'{"images":[')
        for first in range(0, num_images, CHUNK):
            some = slice(first, min(first + CHUNK, num_images))
            parts: list[bytes | np.ndarray] = [b'{"id":', _digits(ids[some], 7), b',"file_name":"', names[some]]
            parts += [b'","height":', _digits(sizes[some, 0], 4), b',"width":', _digits(sizes[some, 1], 4), b"}"]
            stream.write(_records(parts)[0 if first else 2 :])
        stream.write(b'],"annotations":[')
        for first in range(0, num_boxes, CHUNK):
            some = slice(first, min(first + CHUNK, num_boxes))
            parts = [b'{"id":', _digits(np.arange(some.start, some.stop), 8), b',"image_id":', _digits(rows[some], 7)]
            parts += [b',"category_id":', _digits(labels[some] + 1, 2), b',"bbox":[', _decimal(corners[some, 0], 2)]
            parts += [b",", _decimal(corners[some, 1], 2), b",", _decimal(sides[some, 0], 2)]
            parts += [b",", _decimal(sides[some, 1], 2), b'],"area":', _decimal(areas[some], 4), b',"iscrowd":0}']
            stream.write(_records(parts)[0 if first else 2 :])
        categories = [f'{{"id":{k + 1},"name":"class {k}"}}' for k in range(NUM_CLASSES)]
        stream.write(b'],"categories":[' + ",".join(categories).encode() + b"]}")
    corner = corners / 100
    return Annotations(
        file=file,
        image_root=image_root,
        classes=tuple(f"class {k}" for k in range(NUM_CLASSES)),
        category_ids=tuple(range(1, NUM_CLASSES + 1)),
        image_ids=ids,
        sizes=sizes,
        offsets=np.searchsorted(rows, np.arange(num_images + 1)),
        boxes=np.concatenate([corner, corner + sides / 100], axis=1),
        labels=labels,
        crowd=np.zeros(num_boxes, dtype=np.bool_),
        areas=areas / 10_000,
        names=names.reshape(-1),
        name_offsets=np.arange(num_images + 1) * names.shape[1],
    )


def _write_files(root: Path, num_images: int) -> None:
    for first in range(0, num_images, FOLDER):
        folder = root / f"{first // FOLDER:04}"
        folder.mkdir(parents=True)
        (folder / f"{first:012}.jpg").touch()
        for index in range(first + 1, min(first + FOLDER, num_images)):
            os.link(folder / f"{first:012}.jpg", f"{folder}/{index:012}.jpg")


def _records(parts: Sequence[bytes | np.ndarray]) -> bytes:
    """Records of equal length, a row of every part each, a comma and a new line before each."""
    num = next(len(part) for part in parts if isinstance(part, np.ndarray))
    columns = [_text(part, num) if isinstance(part, bytes) else part for part in [b",\n", *parts]]
    return np.concatenate(columns, axis=1).tobytes()


def _text(text: bytes, num: int) -> np.ndarray:
    return np.broadcast_to(np.frombuffer(text, np.uint8), (num, len(text)))


def _digits(values: np.ndarray, width: int, fill: bytes = b" ") -> np.ndarray:
    """Whole numbers in decimal, one row of ASCII each."""
    powers = 10 ** np.arange(width - 1, -1, -1)
    blank = (values[:, None] < powers) & (powers > 1)
    return np.where(blank, ord(fill), values[:, None] // powers % 10 + ord("0")).astype(np.uint8)


def _decimal(values: np.ndarray, places: int) -> np.ndarray:
    """Numbers in units of the last of their decimal places."""
    whole, rest = np.divmod(values, 10**places)
    return np.concatenate([_digits(whole, 6), _text(b".", len(values)), _digits(rest, places, b"0")], axis=1)
