"""Runs a trained detector over images: annotated pictures in a mirrored tree, and `detections.json`.

python tools/infer.py checkpoint=runs/mine source=photos/ output=out/
python tools/infer.py checkpoint=runs/mine source='photos/**/*.jpg' output=out/ score_threshold=0.5
torchrun --nproc_per_node=8 tools/infer.py checkpoint=runs/mine source=photos/ output=out/

A file that cannot be read is reported, on stderr and in `failed.txt`, and skipped; the exit code is then 3.
The same command after a kill goes on where it was and ends with the same files.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.build import call
from retina.cli.compose import entry
from retina.cli.data import progress
from retina.cli.journal import Batch, Done, cut_batches, finish, note, open_journal, open_output, put, read_done
from retina.cli.sources import FORMATS, Source, find_images, groups_of, left_out, name_sources
from retina.data.checks import some
from retina.data.windows import Tiling, changed
from retina.errors import DataError, check, plain
from retina.printing import say

if TYPE_CHECKING:
    from retina.inference import Detector


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """configs/infer.yaml says what each is."""

    checkpoint: str
    source: str
    output: str
    score_threshold: float | None
    batch_size: int
    max_pixels: int
    device: str
    precision: str | None
    pictures: bool
    tile: list[int] | bool | None
    tile_overlap: float | None
    tile_whole: bool | None
    plugins: list[str]
    traceback: bool

    def __post_init__(self) -> None:
        sound = self.score_threshold is None or 0 <= self.score_threshold < 1
        check(sound, "score_threshold", self.score_threshold, "give 0 or more, below 1, or null")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "give 1 or more")
        check(self.max_pixels >= 1, "max_pixels", self.max_pixels, "give 1 or more")
        check(self.tile is not True, "tile", self.tile, "give [height, width], false or null")
        if tiling := self.tiling(None):
            tiling.check()

    def tiling(self, trained: Tiling | None) -> Tiling | None:
        """That of the command, or where it leaves it open, of the weights."""
        tile = self.tile if isinstance(self.tile, list) else None
        return changed(None if self.tile is False else trained, tile, self.tile_overlap, self.tile_whole)


@entry("infer", InferConfig)
def main(config: InferConfig) -> int:
    output = Path(config.output)
    sources = name_sources(*find_images(config.source, output))

    # torch takes seconds to load, and a wrong setting should not wait for it
    from retina import distributed
    from retina.inference import Detector

    device = call(distributed.choose_device, "device", name=config.device)
    with ExitStack() as stack:
        stack.enter_context(distributed.process_group(device))
        checkpoint, precision = config.checkpoint, config.precision
        detector = Detector.load(checkpoint, device=str(device), precision=precision, plugins=config.plugins)
        detector = detector.in_tiles(config.tiling(detector.tiling))
        if config.score_threshold is None and not detector.thresholds:
            config = replace(config, score_threshold=0.3)
        batches: list[Batch] = []
        done: dict[str, Done] = {}

        def prepare() -> list[Any]:
            """The batches that are left, as JSON knows them, since ranks tell each other nothing else."""
            pictures = [source.picture for source in sources] if config.pictures else []
            stack.enter_context(open_output(output, pictures))
            batches.extend(cut_batches(sources, config.batch_size, detection_settings(config, detector)))
            done.update(read_done(output))
            left = [batch for batch in batches if batch.key not in done]
            return [(batch.key, [(str(file), *names) for file, *names in batch.sources]) for batch in left]

        shares = distributed.on_main(prepare)[distributed.rank() :: distributed.world_size()]
        share = [Batch(key, [Source(Path(file), *names) for file, *names in part]) for key, part in shares]
        finished = distributed.on_all(lambda: detect(detector, share, config))
        for part in distributed.gather_objects(finished):
            done |= {batch[0]: Done(*batch) for batch in part}

        def conclude() -> int:
            records = [record for batch in batches for record in done[batch.key].records]
            faults = [fault for batch in batches for fault in done[batch.key].faults]
            finish(output, records, faults)
            objects = sum(len(record["boxes"]) for record in records)
            limit = config.score_threshold
            above = "at the weights' operating point" if limit is None else f"of score {limit:g} or more"
            say(f"{len(records)} images, {objects} objects {above}: {output}")
            if others := left_out(config.source, output):
                say(f"no images: left out {some(others)}", error=True)
            say(*(f"skipped: {fault}" for fault in faults), error=True)
            return 3 if faults else 0

        return distributed.on_main(conclude)


def detection_settings(config: InferConfig, detector: "Detector") -> dict[str, Any]:
    """All that detections and pictures depend on, apart from the images."""
    with detector.file.open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    settings = {key: getattr(config, key) for key in ("score_threshold", "max_pixels", "pictures")}
    settings |= {"tiling": [*detector.tiling]} if detector.tiling else {}
    return settings | {"weights": digest, "dtype": str(detector.dtype), "device": detector.device.type}


def detect(detector: "Detector", batches: Sequence[Batch], config: InferConfig) -> list[Done]:
    """Looks at the images, writes their pictures, and notes each batch as done."""
    from retina import distributed

    done = []
    with ThreadPoolExecutor() as threads, open_journal(Path(config.output), distributed.rank()) as journal:
        for batch in progress(batches, "detecting", len(batches)):
            groups = groups_of(batch.sources, config.max_pixels, detector.pixels.channels)
            parts = [detect_group(detector, group, config, threads) for group in groups]
            records, faults = (list(chain.from_iterable(column)) for column in zip(*parts, strict=True))
            done.append(Done(batch.key, records, faults))
            note(journal, done[-1])
    return done


def detect_group(
    detector: "Detector", group: Sequence[Source], config: InferConfig, threads: Executor
) -> tuple[list[dict[str, Any]], list[str]]:
    """A record for each image, whose picture is then written, and what is wrong with the files that are none."""
    # decoding and encoding leave Python's lock
    loaded = list(threads.map(lambda source: try_read(detector.read, source.file, config.max_pixels), group))
    faults = [image for image in loaded if isinstance(image, str)]
    sources = [source for source, image in zip(group, loaded, strict=True) if not isinstance(image, str)]
    images = [image for image in loaded if not isinstance(image, str)]
    detections = detector.predict(images, score_threshold=config.score_threshold, batch_size=config.batch_size)
    records: list[dict[str, Any]] = [
        {
            "file_name": source.name,
            "width": image.original_size[1],
            "height": image.original_size[0],
            "boxes": boxes.tolist(),
            "scores": scores.tolist(),
            "classes": [detector.classes[label] for label in labels.tolist()],
        }
        for source, image, (boxes, scores, labels) in zip(sources, images, detections, strict=True)
    ]
    if config.pictures:
        drawn = threads.map(partial(draw, config, detector), sources, images, detections)
        for source, record, fault in zip(sources, records, drawn, strict=True):
            if fault is None:
                record["picture"] = source.picture
            else:
                faults.append(fault)
    return records, faults


def try_read(read: Callable[[Path, int], Any], file: Path, max_pixels: int) -> Any:
    """The image, or what is wrong with it."""
    try:
        return read(file, max_pixels)
    except DataError as fault:
        return str(fault)


def draw(config: InferConfig, detector: "Detector", source: Source, sample: Any, detections: Any) -> str | None:
    """Writes the picture of an image; returns what is wrong where its format cannot hold it."""
    from PIL import Image

    from retina.data.images import read_image
    from retina.data.regions import Regions
    from retina.visualize import draw_detections

    image = sample.image
    if isinstance(image, Regions):
        image, factor = image.shrunk(config.max_pixels)
        detections = detections._replace(boxes=detections.boxes / factor)
    if (
        not isinstance(sample.image, Regions) and image.shape[:2] != sample.original_size
    ):  # a JPEG, decoded smaller because the detector needs no more
        reading: Any = {"max_pixels": config.max_pixels, "pixels": detector.pixels}
        image = try_read(lambda file, _: read_image(file, **reading), source.file, config.max_pixels)
        if isinstance(image, str):
            return image
    picture = Image.fromarray(draw_detections(image, detections, detector.classes, score_threshold=0.0))
    suffix = Path(source.picture).suffix
    content = io.BytesIO()
    try:
        picture.save(content, FORMATS[suffix.lower()], quality=92)
    except Exception as fault:  # sides that are too long, for one; each format has its own way to say so
        return plain(f"{source.file}: no picture of it as {suffix} ({fault}) - give pictures=false, or another format")
    put(Path(config.output), source.picture, content.getvalue())
    return None
