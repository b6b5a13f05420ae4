"""A film as the source of tools/infer.py: what is found in its frames, and the film with it drawn in. Beside the road.

First the frames are looked at, and noted batch by batch, so that a kill loses one batch; then, from these notes, the
film is drawn. PyAV reads and writes films (`pip install 'retina-detect[film]'`), of the formats in `_FORMATS` only, and
opens nothing but the file itself."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retina.cli.journal import STATE, finish, open_output
from retina.cli.outputs import csv_of
from retina.data.packs import version_of
from retina.errors import DataError
from retina.files import Appender, open_plain, read_plain, sync_folder, write_whole
from retina.printing import say
from retina.schema import parse_json

if TYPE_CHECKING:
    from retina.cli.infer import InferConfig
    from retina.inference import Detector
    from retina.visualize import DrawStyle

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
FRAMES, COUNTS, FILM = "detections.jsonl", "counts.csv", "film.mp4"
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_UNIT = Fraction(1, 10_000)
"""Of the times in what is written, in seconds; the codec knows no finer ones than 1 / 65535."""
_SPEED = 30
"""Frames per second, where a film does not say."""


class Frame(NamedTuple):
    """A picture of a film."""

    number: int
    """From 0, whether looked at or not."""
    seconds: float
    image: np.ndarray
    """uint8 [H W 3], upright."""


def is_film(source: str) -> bool:
    return Path(source).suffix.lower() in SUFFIXES and Path(source).is_file()


def look_at_film(
    config: "InferConfig", output: Path, detector: "Detector", settings: Mapping[str, Any], style: "DrawStyle"
) -> int:
    """Looks at the frames that have not been looked at yet, and writes all there is; the exit code."""
    film, names = Path(config.source), [FRAMES, *([FILM] if config.pictures else [])]
    with open_output(output, names):
        identity = [settings, version_of(film), config.every, config.batch_size]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        journal = output / STATE / "film.jsonl"
        records = _records(journal, key, config.batch_size)
        lines = [json.dumps({"key": key}), *map(json.dumps, records)]
        write_whole(journal, "".join(f"{line}\n" for line in lines).encode())
        with closing(Appender(journal, within=output)) as appender:
            for batch in _batches(config, len(records)):
                found = detector.predict(
                    [frame.image for frame in batch],
                    score_threshold=config.score_threshold,
                    batch_size=config.batch_size,
                )
                new = [_record(*pair, detector.classes) for pair in zip(batch, found, strict=True)]
                appender.write("".join(f"{json.dumps(record)}\n" for record in new).encode())
                appender.sync()
                records += new
        if not records:
            raise _fault(film, "has no frames", "copy it again, or give another")
        if config.pictures:
            _write_film(config, output, {record["frame"]: record for record in records}, detector.classes, style)
        rows = [[r["frame"], r["seconds"], *(r["classes"].count(c) for c in detector.classes)] for r in records]
        content = "".join(f"{json.dumps(record)}\n" for record in records).encode()
        files = [(FRAMES, content), (COUNTS, csv_of(["frame", "seconds", *detector.classes], rows))]
        finish(output, files, {"settings": dict(settings), "classes": [*detector.classes], "film": str(film)}, [])
    say(f"{len(records)} frames, {sum(len(record['boxes']) for record in records)} objects: {output}")
    return 0


def _records(journal: Path, key: str, batch_size: int) -> list[dict[str, Any]]:
    """What an interrupted look at the same film has noted, in whole batches: numbers depend on the batch a little."""
    try:
        first, *lines = read_plain(journal).split(b"\n")
        if parse_json(first) != {"key": key}:
            return []
    except (OSError, ValueError):
        return []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = parse_json(line)
        except (ValueError, RecursionError):  # cut off by a kill, or empty
            break
        if not isinstance(record, dict) or not {"frame", "seconds", "boxes", "scores", "classes"} <= record.keys():
            break
        records.append(record)
    return records[: len(records) // batch_size * batch_size]


def _record(frame: Frame, detections: Any, classes: Sequence[str]) -> dict[str, Any]:
    boxes, scores, labels = (values.tolist() for values in detections.tensors)
    names = [classes[label] for label in labels]
    return {"frame": frame.number, "seconds": frame.seconds, "boxes": boxes, "scores": scores, "classes": names}


def _batches(config: "InferConfig", done: int) -> Iterator[list[Frame]]:
    """The frames to look at behind the first `done` of them."""
    chosen = (frame for frame in frames_of(Path(config.source), config.max_pixels) if not frame.number % config.every)
    rest = islice(chosen, done, None)
    while batch := list(islice(rest, config.batch_size)):
        yield batch


def frames_of(film: Path, max_pixels: int) -> Iterator[Frame]:
    """All frames in the order in which they are shown. Raises DataError for what is no film, or damaged."""
    with _opened(film) as container:
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            problem = f"has {stream.width}x{stream.height} pixels, more than max_pixels={max_pixels} allows"
            raise _fault(film, problem, "make it smaller, or raise that limit", code="too-many-pixels")
        speed = stream.average_rate or _SPEED
        for number, frame in enumerate(container.decode(stream)):
            # FFmpeg tells by how much a display turns it, counterclockwise
            image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
            seconds = float(number / speed) if frame.time is None else float(frame.time)
            yield Frame(number, round(seconds, 6), np.ascontiguousarray(image))


@contextmanager
def _opened(film: Path) -> Iterator[Any]:
    try:
        import av  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        fix = "pip install 'retina-detect[film]'"
        raise _fault(film, "is a film, and PyAV is not installed", fix, code="missing-package") from error
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    try:
        with open_plain(film, "rb", follow=True) as file, av.open(file, "r", container_options=options) as container:
            if not container.streams.video:
                raise _fault(film, "holds no moving pictures", "give another film")
            yield container
    except (av.FFmpegError, OSError) as error:
        problem = f"cannot be decoded ({getattr(error, 'strerror', None) or error})"
        raise _fault(film, problem, "copy or download it again") from error


def _write_film(
    config: "InferConfig",
    output: Path,
    records: Mapping[int, Mapping[str, Any]],
    classes: Sequence[str],
    style: "DrawStyle",
) -> None:
    """The frames that were looked at, each shown when it was in the film. Raises OSError."""
    import av

    from retina.visualize import draw_boxes

    temporary = output / STATE / "film.tmp"
    temporary.unlink(missing_ok=True)
    with open_plain(temporary, "xb") as file, av.open(file, "w", format="mp4") as container:
        stream: Any = None
        for frame in frames_of(Path(config.source), config.max_pixels):
            if frame.number not in records:
                continue
            record = records[frame.number]
            boxes = np.array(record["boxes"], dtype=np.float32).reshape(-1, 4)
            labels = np.array([classes.index(name) for name in record["classes"]], dtype=np.int64)
            scores = np.array(record["scores"], dtype=np.float32)
            picture = draw_boxes(frame.image, boxes, labels, classes, scores=scores, style=style)
            height, width = (side - side % 2 for side in picture.shape[:2])  # as the format has it
            if stream is None:
                stream = container.add_stream("mpeg4", rate=_SPEED)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = _UNIT
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            shown.pts, shown.time_base = round(frame.seconds / _UNIT), _UNIT
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    temporary.replace(output / FILM)
    sync_folder(output)


def _fault(film: Path, problem: str, fix: str, *, code: str = "bad-film") -> DataError:
    return DataError(f"{film}: {problem} - {fix}", code=code)
