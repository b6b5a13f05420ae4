"""Runs a trained detector over images: annotated pictures in a mirrored tree, and `detections.json`.

python tools/infer.py checkpoint=runs/mine source=photos/ output=out/
python tools/infer.py checkpoint=runs/mine source='photos/**/*.jpg' output=out/ score_threshold=0.5
torchrun --nproc_per_node=8 tools/infer.py checkpoint=runs/mine source=photos/ output=out/

A file that cannot be read is reported and skipped, and the exit code is then 3.
"""

import glob
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _compose import Settings, call, entry, typed

from retina.errors import ConfigError, DataError

if TYPE_CHECKING:
    from retina.inference import Detector


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """configs/infer.yaml says what each is."""

    checkpoint: str
    source: str
    output: str
    score_threshold: float
    batch_size: int
    device: str
    precision: str | None
    pictures: bool
    traceback: bool

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold < 1:
            raise ConfigError(f"score_threshold: {self.score_threshold} is not allowed - give 0 or more, below 1")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size} is not allowed - give 1 or more")


@entry("infer")
def main(settings: Settings) -> int:
    config = typed(InferConfig, settings)
    output = Path(config.output)
    root, files = find_images(config.source, output)

    # torch takes seconds to load, and a wrong setting should not wait for it
    from retina import distributed
    from retina.inference import Detector

    device = call(distributed.choose_device, "device", name=config.device)
    with distributed.process_group(device):
        detector = Detector.load(config.checkpoint, device=str(device), precision=config.precision)
        pictures = [picture_name(file.relative_to(root)) for file in files] if config.pictures else []
        distributed.on_main(lambda: open_output(output, pictures))  # before anybody writes
        own = files[distributed.rank() :: distributed.world_size()]
        results = distributed.gather_objects(detect(detector, own, root, config, show=distributed.is_main()))
        records = sorted((record for part, _ in results for record in part), key=lambda record: record["file_name"])
        faults = sorted(fault for _, part in results for fault in part)
        if distributed.is_main():
            write_records(output / "detections.json", records)
            objects = sum(len(record["boxes"]) for record in records)
            print(f"{len(records)} images, {objects} objects of score {config.score_threshold:g} or more: {output}")
            for fault in faults:
                print(f"skipped: {fault}", file=sys.stderr)
    return 3 if faults else 0


def detect(
    detector: "Detector", files: Sequence[Path], root: Path, config: InferConfig, *, show: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """A record for each image, whose picture is written at once, and what is wrong with the files that are none."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    firsts = range(0, len(files), config.batch_size)
    hidden = not (show and console.is_terminal)
    records: list[dict[str, Any]] = []
    faults: list[str] = []
    with ThreadPoolExecutor() as threads:  # decoding and encoding leave Python's lock
        for first in track(firsts, "detecting", console=console, transient=True, disable=hidden):
            batch = files[first : first + config.batch_size]
            loaded = dict(zip(batch, threads.map(try_read, batch), strict=True))
            faults += [image for image in loaded.values() if isinstance(image, str)]
            images = {file.relative_to(root): image for file, image in loaded.items() if not isinstance(image, str)}
            found = detector.predict(
                list(images.values()), score_threshold=config.score_threshold, batch_size=config.batch_size
            )
            triples = list(zip(images, images.values(), found, strict=True))
            records += [describe(*triple, detector.classes) for triple in triples]
            if config.pictures:
                written = [threads.submit(write_picture, config.output, *one, detector.classes) for one in triples]
                for picture in written:
                    picture.result()
    return records, faults


def find_images(source: str, output: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the images of a folder with its sub-folders, a glob or a single path.

    What lies under an `output` inside that folder does not count. Raises DataError when there is nothing."""
    from retina.data.images import list_images

    path = Path(source)
    if path.is_dir():
        root, files = path, list_images(path)
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        files = sorted(Path(name) for name in glob.glob(source, recursive=True) if os.path.isfile(name))
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path
    inside = output.resolve()
    if root.resolve() in inside.parents:
        files = [file for file in files if not file.resolve().is_relative_to(inside)]
    if not files:
        raise DataError(f"{source}: no images there - give a folder, an image or a glob such as 'photos/*.jpg'")
    return root, files


def picture_name(name: Path) -> Path:
    """The name of an image's annotated picture: its own, unless that is no format to write pictures in."""
    from PIL import Image

    Image.init()
    writable = Image.registered_extensions().get(name.suffix.lower()) in Image.SAVE
    return name if writable else name.with_name(f"{name.name}.jpg")


def open_output(output: Path, pictures: Sequence[Path]) -> None:
    """Makes the folder. Raises ConfigError for one that holds anything but an earlier inference, or something in the
    way of a picture that this earlier inference did not write."""
    advice = "choose another folder"
    try:
        output.mkdir(parents=True, exist_ok=True)
        earlier = read_names(output / "detections.json")
        if earlier is None and any(output.iterdir()):
            raise ConfigError(f"output: {output} holds other files - {advice}")
    except OSError as fault:
        raise ConfigError(f"output: {output} cannot be written ({fault.strerror}) - {advice}") from None
    for picture in pictures:
        if picture not in (earlier or ()) and os.path.lexists(output / picture):
            raise ConfigError(f"output: {output / picture} is there already and would be overwritten - {advice}")


def read_names(detections: Path) -> set[Path] | None:
    """Pictures of an earlier inference as its `detections.json` lists them; None when that is no such file."""
    try:
        return {picture_name(Path(record["file_name"])) for record in json.loads(detections.read_bytes())}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def try_read(file: Path) -> Any:
    """The image, or what is wrong with it."""
    from retina.data.images import read_image

    try:
        return read_image(file)
    except DataError as fault:
        return str(fault)


def describe(name: Path, image: Any, detections: Any, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "file_name": name.as_posix(),
        "width": image.shape[1],
        "height": image.shape[0],
        "boxes": detections.boxes.tolist(),
        "scores": detections.scores.tolist(),
        "classes": [classes[label] for label in detections.labels.tolist()],
    }


def write_picture(output: str, name: Path, image: Any, detections: Any, classes: Sequence[str]) -> None:
    from PIL import Image

    from retina.visualize import draw_detections

    file = Path(output) / picture_name(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_detections(image, detections, classes, score_threshold=0.0)).save(file, quality=92)


def write_records(file: Path, records: list[dict[str, Any]]) -> None:
    """A JSON list with a line for each image; the file appears in one step."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n", encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    main()
