"""Annotations of 2 million images and 15 million boxes: from the cache into a process, and shared with its workers.

The JSON is a real one of 2 GB, beside a folder with all the files that it names; only its entry in the cache is written
from the arrays that the JSON was written from, since parsing it would take 15 GB of memory. That parsing gives the same
is asserted with a small one.
"""

import gc
import os
import time
from io import TextIOWrapper
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import IO
from unittest.mock import patch

import numpy as np

from retina.data.annotations import Annotations
from retina.data.cache import CACHE_FROM_BYTES, CachedAnnotations, Request, find_entry, store
from retina.data.coco import read_coco
from retina.files import make_folder, open_plain, write_synced
from retina.lab.clock import Bench, Row, absolute

NUM_CLASSES = 80
CHUNK = 100_000
"""Records written at a time."""
FOLDER = 1000
"""Images of a sub-folder."""
WORKERS = 4
NAME = "%04d/%012d.jpg"
IMAGE = '{"id":%d,"file_name":"' + NAME + '","height":%d,"width":%d}'
OBJECT = '{"id":%d,"image_id":%d,"category_id":%d,"bbox":[%.2f,%.2f,%.2f,%.2f],"area":%.4f,"iscrowd":0}'


def run(bench: Bench) -> list[Row]:
    with TemporaryDirectory() as name, patch.dict(os.environ, RETINA_CACHE=""):  # set to nothing: parse
        folder = Path(name)
        annotations = write_annotations(folder / "small", 2000, 15_000)
        parsed = read_coco(annotations.file, annotations.image_root)
        assert parsed.fingerprint() == annotations.fingerprint()
        if not bench.quick:
            annotations = write_annotations(folder / "large", 2_000_000, 15_000_000)
        os.environ["RETINA_CACHE"] = str(folder / "cache")
        return time_cache(annotations, bench.rounds)


def time_cache(annotations: Annotations, rounds: int) -> list[Row]:
    file, image_root, fingerprint = annotations.file, annotations.image_root, annotations.fingerprint()
    entry = find_entry(file, Request(classes=None, allow_outside=False))
    assert entry is not None
    assert store(entry, CachedAnnotations(annotations, [], []), allow_outside=False) is None
    del annotations

    wall, processor = [], []
    for _ in range(rounds):
        gc.collect()
        started, processor_started = time.perf_counter(), time.process_time()
        loaded = read_coco(file, image_root)
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - processor_started)
    assert loaded.fingerprint() == fingerprint
    size = f"{len(loaded):,} images, {loaded.num_objects:,} boxes"
    share = extra_memory(loaded, entry)
    load = "annotations: load from the cache"
    return [
        absolute(f"{load}, {size} (wall time)", median(wall), "s", must=10, goal=2, ratio_of_minima=min(wall)),
        absolute(f"{load}, processor time of all its threads", median(processor), "s", ratio_of_minima=min(processor)),
        absolute("annotations: memory per extra worker, as a share of theirs", share, must=0.05, goal=0.005),
    ]


def extra_memory(annotations: Annotations, entry: Path) -> float:
    """What each of 4 forked workers adds to the memory of all by looking at every image and object, in units of the
    memory of the annotations. Pages that processes share are counted once."""
    context = get_context("fork")
    barrier = context.Barrier(WORKERS + 1, timeout=600)
    workers = [context.Process(target=look_at_all, args=(annotations, barrier), daemon=True) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    pids = [os.getpid(), *(worker.pid for worker in workers)]
    barrier.wait()  # all are there
    before = sum(private_memory(pid, entry) for pid in pids)
    barrier.wait()  # and look
    barrier.wait()  # have looked
    after = sum(private_memory(pid, entry) for pid in pids)
    barrier.wait()
    for worker in workers:
        worker.join()
    arrays = [value for value in vars(annotations).values() if isinstance(value, np.ndarray)]
    return (after - before) / WORKERS / sum(array.nbytes for array in arrays)


def look_at_all(annotations: Annotations, barrier: Barrier) -> None:
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


def private_memory(pid: int | None, entry: Path) -> int:
    """Bytes of a process's anonymous memory and of the entry mapped into it, what it shares by shares (Linux).

    Libraries are left out: other programs that come and go share them."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *words = line.split()
        if "-" in first:
            path = words[4] if len(words) > 4 else ""
            counts = path.startswith(f"{entry}/") or not path.startswith("/")
        elif first == "Pss:" and counts:
            total += int(words[0]) * 1024
    return total


def write_annotations(folder: Path, num_images: int, num_boxes: int) -> Annotations:
    """A JSON large enough for the cache, the image files (hard links to empty ones), and what the JSON says."""
    generator = np.random.default_rng(0)
    ids, numbers = np.arange(num_images), np.arange(num_boxes)
    sizes = np.stack([generator.integers(400, 900, num_images), generator.integers(400, 1400, num_images)], axis=1)
    rows = np.sort(generator.integers(0, num_images, num_boxes))
    labels = generator.integers(0, NUM_CLASSES, num_boxes)
    # in hundredths of a pixel, and no further: the nearest float64 is the same here and in the JSON
    sides = generator.integers(100, 40_000, (num_boxes, 2))
    corners = (generator.random((num_boxes, 2)) * (sizes[rows, ::-1] * 100 - sides)).astype(np.int64) / 100
    areas, lengths = sides.prod(axis=1) / 10_000, sides / 100

    file, image_root = folder / "instances_train.json", folder / "train"
    names = [NAME % (index // FOLDER, index) for index in range(num_images)]
    for first in range(0, num_images, FOLDER):
        make_folder((image_root / names[first]).parent)
        write_synced(image_root / names[first], b"")
        for name in names[first + 1 : first + FOLDER]:
            os.link(image_root / names[first], f"{image_root}/{name}")
    with TextIOWrapper(open_plain(file, "xb")) as stream:
        stream.write(" " * (CACHE_FROM_BYTES if num_boxes < CHUNK else 0) + '{"images":[')
        write_records(stream, IMAGE, ids, ids // FOLDER, ids, sizes)
        stream.write('],"annotations":[')
        write_records(stream, OBJECT, numbers, rows, labels + 1, corners, lengths, areas)
        categories = [f'{{"id":{k + 1},"name":"class {k}"}}' for k in range(NUM_CLASSES)]
        stream.write(f'],"categories":[{",".join(categories)}]}}')
    return Annotations(
        file=file,
        image_root=image_root,
        classes=tuple(f"class {k}" for k in range(NUM_CLASSES)),
        category_ids=tuple(range(1, NUM_CLASSES + 1)),
        image_ids=ids,
        sizes=sizes,
        offsets=np.searchsorted(rows, np.arange(num_images + 1)),
        boxes=np.concatenate([corners, corners + lengths], axis=1),
        labels=labels,
        crowd=np.zeros(num_boxes, dtype=np.bool_),
        areas=areas,
        names=np.frombuffer("".join(names).encode(), np.uint8),
        name_offsets=np.arange(num_images + 1) * len(names[0]),
    )


def write_records(stream: IO[str], template: str, *columns: np.ndarray) -> None:
    """A record for each row of the columns, with a comma between two."""
    for first in range(0, len(columns[0]), CHUNK):
        table = np.column_stack([column[first : first + CHUNK] for column in columns])
        stream.write((",\n" if first else "") + ",\n".join(template % tuple(row) for row in table.tolist()))
