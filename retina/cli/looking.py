"""Looks at the images of tools/infer.py: while the device looks at some, threads read those that follow and draw those
before. Beside the road.

What is under way is bounded by its pixels, and the order is that of the images, whatever is finished first."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from retina.cli.journal import Batch, Done, note, open_journal
from retina.cli.outputs import Times, Writer
from retina.cli.sources import Source, groups_of
from retina.data.prefetch import run_ahead
from retina.errors import DataError
from retina.printing import say

if TYPE_CHECKING:
    from retina.cli.infer import InferConfig
    from retina.inference import Detector

_AHEAD, _IMAGES_AHEAD = 3, 32
"""Groups that are read ahead, or as many as have so many images."""

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
    written: list[Future[tuple[dict[str, Any], list[str]]]]
    """The record of each image that could be read, and what of it could not be written."""
    unread: list[str]


def look(
    detector: "Detector", batches: Sequence[Batch], config: "InferConfig", writer: Writer, rank: int
) -> Iterator[Done]:
    """Looks at the images and writes their pictures. Each batch is noted as done once it is, and then yielded. Raises
    RetinaError when no image is ready for `timeout` seconds."""
    room = config.max_pixels // 2
    drawing: deque[Looked] = deque()
    parts: list[Looked] = []
    with Threads(config.timeout) as threads, open_journal(Path(config.output), rank) as journal:

        def finished(held: int) -> Iterator[Done]:
            """The batches whose last group is drawn, and those that must be until no more than so many pixels are."""
            while drawing and (
                sum(one.group.pixels for one in drawing) > held or all(future.done() for future in drawing[0].written)
            ):
                parts.append(drawing.popleft())
                if parts[-1].group.is_last:
                    yield done_of(parts)
                    parts.clear()

        reading = read_ahead(detector, batches, config, writer.times, threads, room)
        while loaded := threads.in_time(lambda: next(reading, None)):
            drawing.append(detect_group(detector, loaded, config, writer, threads))
            for done in threads.in_time(lambda: [*finished(room)]):
                note(journal, done)
                yield done
        for done in threads.in_time(lambda: [*finished(-1)]):
            note(journal, done)
            yield done


def printing(batches: Iterable[Done], wanted: bool) -> Iterator[Done]:
    """The batches, whose records are printed as lines as they come, if that is wanted."""
    for batch in batches:
        print_lines([batch], wanted)
        yield batch


def print_lines(batches: Iterable[Done], wanted: bool) -> None:
    """A line of JSON on stdout for each record, if that is wanted."""
    say(*(json.dumps(record) for batch in batches for record in batch.records if wanted))


def read_ahead(
    detector: "Detector",
    batches: Sequence[Batch],
    config: "InferConfig",
    times: Times,
    threads: Threads,
    room: int,
) -> Iterator[Loaded]:
    """The images of all batches, group by group, of which as many are read ahead as have `room` pixels."""

    def cut(batch: Batch) -> list[Group]:
        groups = [*groups_of(batch.sources, config.max_pixels, detector.pixels.channels, threads.noted)]
        return [Group(batch, *group, number == len(groups)) for number, group in enumerate(groups, start=1)]

    def read_one(file: Path) -> Any:
        with threads.noted(file):
            return try_read(detector.read, file, config.max_pixels, times)

    def begin(group: Group) -> Future[Loaded]:
        # decoding leaves Python's lock
        read = [threads.submit(read_one, one.file) for one in group.sources]

        def load() -> Loaded:  # waits for what was submitted before it alone
            images = [future.result() for future in read]
            samples = [image for image in images if not isinstance(image, str)]
            return Loaded(group, images, detector.prepare(samples) if samples else None)

        return threads.submit(load)

    groups = chain.from_iterable(run_ahead(lambda batch: threads.submit(cut, batch), batches, 2))
    # more than keep the threads at work would only take memory, for canvases too
    least = room // max(_AHEAD, _IMAGES_AHEAD // config.batch_size)
    return run_ahead(begin, groups, room, lambda group: max(group.pixels, least))


def detect_group(
    detector: "Detector", loaded: Loaded, config: "InferConfig", writer: Writer, threads: Threads
) -> Looked:
    """The images that could be read, of which a thread then writes what there is."""
    pairs = [*zip(loaded.group.sources, loaded.images, strict=True)]
    seen = [(source, image) for source, image in pairs if not isinstance(image, str)]
    rules: Any = {"score_threshold": config.score_threshold, "batch_size": config.batch_size}
    with writer.times.of("detect"):
        detections = detector.find(loaded.prepared, **rules) if seen else []
    writer.times.add("images", len(seen))

    def write(source: Source, image: Any, found: Any) -> tuple[dict[str, Any], list[str]]:
        with threads.noted(source.file):
            return writer.write(source, image, detector.of_image(found))

    written = [
        threads.submit(write, source, image, found) for (source, image), found in zip(seen, detections, strict=True)
    ]
    return Looked(loaded.group, written, [image for _, image in pairs if isinstance(image, str)])


def done_of(parts: Sequence[Looked]) -> Done:
    """A batch, once all there is of its images is written."""
    records: list[dict[str, Any]] = []
    faults: list[str] = []
    for _, written, unread in parts:
        faults += unread
        for record, lines in (future.result() for future in written):
            records.append(record)
            faults += lines
    return Done(parts[0].group.batch.key, records, faults)


def try_read(read: Callable[[Path, int], Any], file: Path, max_pixels: int, times: Times) -> Any:
    """The image, or what is wrong with it."""
    try:
        with times.of("read"):
            return read(file, max_pixels)
    except DataError as fault:
        return str(fault)
