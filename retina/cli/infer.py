"""Runs a trained detector over images: annotated pictures in a mirrored tree, and `detections.json`.

python tools/infer.py checkpoint=runs/mine source=photos/ output=out/
python tools/infer.py checkpoint=runs/mine source='photos/**/*.jpg' output=out/ score_threshold=0.5
torchrun --nproc_per_node=8 tools/infer.py checkpoint=runs/mine source=photos/ output=out/

A file that cannot be read is reported, on stderr and in `failed.txt`, and skipped; the exit code is then 3.
The same command after a kill goes on where it was and ends with the same files.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.build import call
from retina.cli.compose import entry
from retina.cli.film import is_film, look_at_film
from retina.cli.journal import Batch, Done, already_done, cut_batches, finish, open_output
from retina.cli.loaders import progress
from retina.cli.looking import look, print_lines, printing
from retina.cli.outputs import PRELABELS, Times, Wanted, Writer, about, draw_style, final_files
from retina.cli.sources import Source, find_images, left_out, name_sources
from retina.data.checks import some
from retina.data.windows import Tiling, changed
from retina.errors import check, check_choice
from retina.printing import say

if TYPE_CHECKING:
    from retina.inference import Detector


ADJUSTED = ("short_side", "long_side", "nms_iou", "class_agnostic", "classes")
DRAWN = ("pictures", "label", "font", "font_size", "line_width", "crops")


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """configs/infer.yaml says what each is."""

    checkpoint: str
    source: str
    output: str
    score_threshold: float | None
    batch_size: int
    max_pixels: int
    timeout: float
    device: str
    precision: str | None
    short_side: int | None
    long_side: int | None
    nms_iou: float | None
    class_agnostic: bool | None
    classes: list[str] | None
    pictures: bool
    label: str
    font: str | None
    font_size: int | None
    line_width: int | None
    crops: bool
    prelabels: list[str]
    json_lines: bool
    every: int
    tile: list[int] | bool | None
    tile_overlap: float | None
    tile_whole: bool | None
    plugins: list[str]
    traceback: bool

    def __post_init__(self) -> None:
        sound = self.score_threshold is None or 0 <= self.score_threshold < 1
        check(sound, "score_threshold", self.score_threshold, "give 0 or more, below 1, or null")
        for key in ("batch_size", "max_pixels", "font_size", "line_width", "every"):
            value = getattr(self, key)
            check(value is None or value >= 1, key, value, "give 1 or more")
        check_choice(self.label, ("name_score", "name", "score", "none"), "label")
        for kind in self.prelabels:
            check_choice(kind, PRELABELS, "prelabels")
        check(0 < self.timeout < 1e9, "timeout", self.timeout, "give seconds above 0, below 10^9")
        check(self.tile is not True, "tile", self.tile, "give [height, width], false or null")
        if tiling := self.tiling(None):
            tiling.check()

    def tiling(self, trained: Tiling | None) -> Tiling | None:
        """That of the command, or where it leaves it open, of the weights."""
        tile = self.tile if isinstance(self.tile, list) else None
        return changed(None if self.tile is False else trained, tile, self.tile_overlap, self.tile_whole)

    @property
    def wanted(self) -> Wanted:
        return Wanted(pictures=self.pictures, crops=self.crops, prelabels=self.prelabels)


@entry("infer", InferConfig)
def main(config: InferConfig) -> int:
    output = Path(config.output)
    film = is_film(config.source)
    sources = [] if film else name_sources(*find_images(config.source, output))
    claims = config.wanted.claims(sources)

    # torch takes seconds to load, and a wrong setting should not wait for it
    from retina import distributed
    from retina.hub import load

    device = call(distributed.choose_device, "device", name=config.device)
    with ExitStack() as stack:
        stack.enter_context(distributed.process_group(device))
        checkpoint, precision = config.checkpoint, config.precision
        detector = load(checkpoint, device=str(device), precision=precision, plugins=config.plugins)
        detector = detector.adjusted(**{key: getattr(config, key) for key in ADJUSTED})
        detector = detector.in_tiles(config.tiling(detector.tiling))
        style = draw_style(config.label, config.font, config.font_size, config.line_width)
        writer = Writer(output, config.wanted, style, config.max_pixels)
        if config.score_threshold is None and not detector.thresholds:
            config = replace(config, score_threshold=0.3)
        settings = detection_settings(config, detector)
        if film:
            return distributed.on_main(lambda: look_at_film(config, output, detector, settings, style))
        batches: list[Batch] = []
        done: dict[str, Done] = {}

        def prepare() -> list[Any]:
            """The batches that are left, as JSON knows them, since ranks tell each other nothing else."""
            stack.enter_context(open_output(output, claims))
            batches.extend(cut_batches(sources, config.batch_size, settings))
            done.update(already_done(batches, output, len(detector.classes)))
            print_lines(done.values(), config.json_lines)
            left = [batch for batch in batches if batch.key not in done]
            return [(batch.key, [(str(file), *names) for file, *names in batch.sources]) for batch in left]

        shares = distributed.on_main(prepare)[distributed.rank() :: distributed.world_size()]
        share = [Batch(key, [Source(Path(file), *names) for file, *names in part]) for key, part in shares]
        finished = distributed.on_all(lambda: detect(detector, share, config, writer))
        parts = distributed.gather_objects(finished)
        for part, _ in parts:
            done |= {batch[0]: Done(*batch) for batch in part}

        def conclude() -> int:
            ids = {source.name: number for number, source in enumerate(sources, start=1)}
            records = [
                {"id": ids[record["file_name"]], **record} for batch in batches for record in done[batch.key].records
            ]
            faults = [fault for batch in batches for fault in done[batch.key].faults]
            classes, categories = detector.classes, detector.card.category_ids
            files = final_files(records, classes, categories, config.prelabels)
            finish(output, files, about(settings, classes, records), faults)
            tell = partial(say, error=config.json_lines)
            tell(*Times.lines([times for _, times in parts]))
            objects = sum(len(record["boxes"]) for record in records)
            limit = config.score_threshold
            above = "at the weights' operating point" if limit is None else f"of score {limit:g} or more"
            tell(f"{len(records)} images, {objects} objects {above}: {output}")
            if others := left_out(config.source, output):
                say(f"no images: left out {some(others)}", error=True)
            say(*(f"skipped: {fault}" for fault in faults), error=True)
            return 3 if faults else 0

        return distributed.on_main(conclude)


def detection_settings(config: InferConfig, detector: "Detector") -> dict[str, Any]:
    """All that detections and pictures depend on, apart from the images."""
    with detector.file.open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    settings = {key: getattr(config, key) for key in ("score_threshold", "max_pixels", *ADJUSTED, *DRAWN)}
    settings |= {"tiling": [*detector.tiling]} if detector.tiling else {}
    return settings | {"weights": digest, "dtype": str(detector.dtype), "device": detector.device.type}


def detect(
    detector: "Detector", batches: Sequence[Batch], config: InferConfig, writer: Writer
) -> tuple[list[Done], dict[str, float]]:
    """Looks at the images, writes their pictures, and notes each batch as done. With the seconds of each stage."""
    from retina import distributed

    looked = printing(look(detector, batches, config, writer, distributed.rank()), config.json_lines)
    return [*progress(looked, "detecting", len(batches))], writer.times.seconds
