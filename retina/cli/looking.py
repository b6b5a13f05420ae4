"""Looks at the images of tools/infer.py: while the device looks at some, threads read those that follow and draw those
before. Beside the road.

What is under way is bounded by its pixels, and the order is that of the images, whatever is finished first."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from retina.cli.journal import Batch, Done, note, open_journal, put
from retina.cli.sources import FORMATS, Source, groups_of
from retina.data.prefetch import run_ahead
from retina.errors import DataError, plain

if TYPE_CHECKING:
    from retina.cli.infer import InferConfig
    from retina.inference import Detector

T = TypeVar("T")


class Threads:
    """Threads that read and draw, and keep no process alive when a disk does not answer them any more."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._at_work = timeout, list[Path]()
        self._pool = ThreadPool(min(32, (os.cpu_count() or 1) + 4))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        future = Future[T]()
        future.set_running_or_notify_cancel()  # what is cancelled could not take its result
        self._pool.apply_async(work, arguments, callback=future.set_result, error_callback=future.set_exception)
        return future

    @contextmanager
    def noted(self, file: Path) -> Iterator[None]:
        """Around what a thread does with this image."""
        self._at_work.append(file)
        try:
            yield
        finally:
            self._at_work.remove(file)

    def in_time(self, wait: Callable[[], T]) -> T:
        """What `wait` returns. Raises RetinaError, naming the images at work, when that takes too long."""
        from retina.data.workers import patiently, too_late

        return patiently(wait, lambda: 0, self._timeout, lambda: too_late(self._timeout, lambda: self._at_work))


class Group(NamedTuple):
    """Images of a batch that are in memory together."""

    batch: Batch
    sources: list[Source]
    pixels: int
    is_last: bool
    """Of its batch."""


class Loaded(NamedTuple):
    """A group in memory."""

    group: Group
    images: list[Any]
    """A sample of each source, or what is wrong with its file."""
    prepared: Any
    """What `Detector.find` takes, of those that could be read; None where there is none."""


class Looked(NamedTuple):
    """A group that the detector has looked at."""

    group: Group
    records: list[dict[str, Any]]
    faults: list[str]
    pictures: list[tuple[str, Future[str | None]]]
    """One for each record, if pictures are wanted: its name, and what is wrong with it, once it is written."""


def look(detector: "Detector", batches: Sequence[Batch], config: "InferConfig", rank: int) -> Iterator[Done]:
    """Looks at the images and writes their pictures. Each batch is noted as done once it is, and then yielded. Raises
    RetinaError when no image is ready for `timeout` seconds."""
    room = config.max_pixels // 2
    drawing: deque[Looked] = deque()
    parts: list[Looked] = []
    with Threads(config.timeout) as threads, open_journal(Path(config.output), rank) as journal:

        def finished(held: int) -> Iterator[Done]:
            """The batches whose last group is drawn, and those that must be until no more than so many pixels are."""
            while drawing and (
                sum(one.group.pixels for one in drawing) > held
                or all(future.done() for _, future in drawing[0].pictures)
            ):
                parts.append(drawing.popleft())
                if parts[-1].group.is_last:
                    yield done_of(parts)
                    parts.clear()

        reading = read_ahead(detector, batches, config, threads, room)
        while loaded := threads.in_time(lambda: next(reading, None)):
            drawing.append(detect_group(detector, loaded, config, threads))
            for done in threads.in_time(lambda: [*finished(room)]):
                note(journal, done)
                yield done
        for done in threads.in_time(lambda: [*finished(-1)]):
            note(journal, done)
            yield done


def read_ahead(
    detector: "Detector", batches: Sequence[Batch], config: "InferConfig", threads: Threads, room: int
) -> Iterator[Loaded]:
    """The images of all batches, group by group, of which as many are read ahead as have `room` pixels."""

    def cut(batch: Batch) -> list[Group]:
        groups = [*groups_of(batch.sources, config.max_pixels, detector.pixels.channels, threads.noted)]
        return [Group(batch, *group, number == len(groups)) for number, group in enumerate(groups, start=1)]

    def read_one(file: Path) -> Any:
        with threads.noted(file):
            return try_read(detector.read, file, config.max_pixels)

    def begin(group: Group) -> Future[Loaded]:
        # decoding leaves Python's lock
        read = [threads.submit(read_one, one.file) for one in group.sources]

        def load() -> Loaded:  # waits for what was submitted before it alone
            images = [future.result() for future in read]
            samples = [image for image in images if not isinstance(image, str)]
            return Loaded(group, images, detector.prepare(samples) if samples else None)

        return threads.submit(load)

    groups = chain.from_iterable(run_ahead(lambda batch: threads.submit(cut, batch), batches, 2))
    return run_ahead(begin, groups, room, lambda group: group.pixels)


def detect_group(detector: "Detector", loaded: Loaded, config: "InferConfig", threads: Threads) -> Looked:
    """A record for each image that could be read, whose picture is then being drawn."""
    pairs = [*zip(loaded.group.sources, loaded.images, strict=True)]
    seen = [(source, image) for source, image in pairs if not isinstance(image, str)]
    rules: Any = {"score_threshold": config.score_threshold, "batch_size": config.batch_size}
    detections = detector.find(loaded.prepared, **rules) if seen else []
    records: list[dict[str, Any]] = [
        {
            "file_name": source.name,
            "width": image.original_size[1],
            "height": image.original_size[0],
            "boxes": boxes.tolist(),
            "scores": scores.tolist(),
            "classes": [detector.classes[label] for label in labels.tolist()],
        }
        for (source, image), (boxes, scores, labels) in zip(seen, detections, strict=True)
    ]

    def draw_one(source: Source, image: Any, found: Any) -> str | None:
        with threads.noted(source.file):
            return draw(config, detector, source, image, found)

    pictures = [
        (source.picture, threads.submit(draw_one, source, image, found))
        for (source, image), found in zip(seen, detections if config.pictures else [], strict=False)
    ]
    return Looked(loaded.group, records, [image for _, image in pairs if isinstance(image, str)], pictures)


def done_of(parts: Sequence[Looked]) -> Done:
    """A batch, once all its pictures are drawn."""
    records: list[dict[str, Any]] = []
    faults: list[str] = []
    for _, part, unread, pictures in parts:
        drawn = [(name, future.result()) for name, future in pictures]
        for record, (name, fault) in zip(part, drawn, strict=False):
            record |= {"picture": name} if fault is None else {}
        records += part
        faults += [*unread, *(fault for _, fault in drawn if fault is not None)]
    return Done(parts[0].group.batch.key, records, faults)


def try_read(read: Callable[[Path, int], Any], file: Path, max_pixels: int) -> Any:
    """The image, or what is wrong with it."""
    try:
        return read(file, max_pixels)
    except DataError as fault:
        return str(fault)


def draw(config: "InferConfig", detector: "Detector", source: Source, sample: Any, detections: Any) -> str | None:
    """Writes the picture of an image; returns what is wrong where its format cannot hold it."""
    from PIL import Image

    from retina.data.images import read_image
    from retina.data.regions import Regions
    from retina.visualize import draw_detections

    image = sample.image
    if isinstance(image, Regions):
        image, factor = image.shrunk(config.max_pixels)
        detections = detections._replace(boxes=detections.boxes / factor)
    elif image.shape[:2] != sample.original_size:  # a JPEG, decoded smaller because the detector needs no more
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
