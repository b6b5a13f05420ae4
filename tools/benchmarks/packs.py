"""Images per second of one loader worker that reads a pack, against one that reads the files it was made of.

The same photographs, pipeline and batches as the measure `loader`; both give the same bits. `bytes` is the reading
alone: files are opened, read and closed; of the pack each image is one read. The SHA-256 of an image is compared the
first time that a process reads it, which is in the warm-up."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2

from benchmarks.loader import FLIP, epoch, loader, write_photos
from retina.data.annotations import Annotations
from retina.data.metered import MeteredFile
from retina.data.pack_writer import plan, write_index, write_shard
from retina.data.packs import find_stored
from retina.files import make_folder
from retina.lab.clock import Bench, Row, speedup


def run(bench: Bench) -> list[Row]:
    cv2.setNumThreads(0)
    with TemporaryDirectory() as place:
        files = write_photos(Path(place, "files"), 2 if bench.quick else 64, 480, 640)
        packed = replace(files, image_root=Path(place, "packed"))
        make_folder(packed.image_root)
        shards = plan(files.image_root, [files.file_name(row) for row in range(len(files))], 1_000_000)
        for shard in shards:
            write_shard(packed.image_root, files.image_root, shard)
        write_index(packed.image_root, shards)
        for one, other in zip(loader(files, FLIP), loader(packed, FLIP), strict=True):
            assert one.images.equal(other.images)
        ways: dict[str, Callable[[], object]] = {
            "files": epoch(loader(files, FLIP)),
            "packed": epoch(loader(packed, FLIP)),
            "bytes of files": partial(read_all, files),
            "bytes of packed": partial(read_all, packed),
        }
        times = bench.time(ways)
    loading = {"ours": times["packed"], "reference": times["files"]}
    reading = {"ours": times["bytes of packed"], "reference": times["bytes of files"]}
    rows = [
        speedup("loader, flip, from a pack / from files", loading, must=0.98, goal=1.0),
        speedup("bytes of images, from a pack / from files", reading),
    ]
    return [in_images(row, len(files)) for row in rows]


def in_images(row: Row, num: int) -> Row:
    assert row.reference
    return replace(row, ours=1000 * num / row.ours, reference=1000 * num / row.reference, unit="images/s")


def read_all(photos: Annotations) -> int:
    total = 0
    for row in range(len(photos)):
        path = photos.path(row)
        stored = None if path.exists() else find_stored(path)
        with MeteredFile(path, 10**8, stored.open(whole=True) if stored else None) as file:
            total += len(file.read())
    return total
