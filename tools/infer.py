"""Runs a trained detector over images: annotated pictures in a mirrored tree, and `detections.json`.

    python tools/infer.py checkpoint=runs/mine source=photos/ output=out/
    torchrun --nproc_per_node=8 tools/infer.py checkpoint=runs/mine source=photos/ output=out/

A file that cannot be read is reported and skipped, and the exit code is then 3.
"""

import glob
import json
import sys
from pathlib import Path
from typing import Any

from _compose import Settings, call, entry

from retina.errors import ConfigError, DataError


@entry("infer")
def main(settings: Settings) -> int:
    source, output = settings["source"], Path(settings["output"])

    # torch takes seconds to load, and a wrong setting should not wait for it
    import numpy as np
    from PIL import Image
    from rich.progress import track

    from retina import distributed
    from retina.data.images import read_image
    from retina.inference import Detector
    from retina.visualize import draw_detections

    root, files = find_images(source, output)
    device = call(distributed.choose_device, "device", name=settings["device"])
    with distributed.process_group(device):
        open_output(output) if distributed.is_main() else None
        detector = Detector.load(settings["checkpoint"], device=str(device), precision=settings["precision"])
        own = files[distributed.rank() :: distributed.world_size()]
        size = settings["batch_size"]
        records: list[dict[str, Any]] = []
        failed: list[str] = []
        for first in track(range(0, len(own), size), "detecting", disable=not distributed.is_main()):
            readable: list[tuple[Path, np.ndarray]] = []
            for file in own[first : first + size]:
                try:
                    readable.append((file, read_image(file)))
                except DataError as fault:
                    failed.append(str(fault))
            images = [image for _, image in readable]
            found = detector.predict(images, score_threshold=settings["score_threshold"], batch_size=size)
            for (file, image), detections in zip(readable, found, strict=True):
                name = file.relative_to(root)
                records.append(
                    {
                        "file_name": name.as_posix(),
                        "width": image.shape[1],
                        "height": image.shape[0],
                        "boxes": detections.boxes.tolist(),
                        "scores": detections.scores.tolist(),
                        "classes": [detector.classes[label] for label in detections.labels.tolist()],
                    }
                )
                if settings["pictures"]:
                    (output / name).parent.mkdir(parents=True, exist_ok=True)
                    picture = draw_detections(image, detections, detector.classes, score_threshold=0.0)
                    Image.fromarray(picture).save(output / name, quality=92)
        all_records = sorted(sum(distributed.gather_objects(records), []), key=lambda record: record["file_name"])
        all_failed = sorted(sum(distributed.gather_objects(failed), []))
        if distributed.is_main():
            (output / "detections.json").write_text(json.dumps(all_records, indent=1), encoding="utf-8")
            objects = sum(len(record["boxes"]) for record in all_records)
            print(
                f"{len(all_records)} images, {objects} objects from a score of {settings['score_threshold']}: {output}"
            )
            for line in all_failed:
                print(f"skipped: {line}", file=sys.stderr)
    return 3 if all_failed else 0


def find_images(source: str, output: Path) -> tuple[Path, list[Path]]:
    """The images of a folder (sub-folders included), a glob or a single path, and the folder their names are relative to.

    What lies under `output` does not count. Raises DataError when there is nothing, ConfigError when `output` would
    overwrite images of the source."""
    from retina.data.images import list_images

    path = Path(source)
    if path.is_dir():
        root, files = path, list_images(path)
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        files = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        root = Path(glob.escape(source)).parent if not files else common_folder(files)
    inside = output.resolve()
    files = [file for file in files if not file.resolve().is_relative_to(inside)]
    if root.resolve() == inside:
        raise ConfigError(
            f"output: {output} is the folder of the source, whose images it would overwrite - choose another"
        )
    if not files:
        raise DataError(f"{source}: no images there - give a folder, an image or a glob such as 'photos/*.jpg'")
    return root, files


def common_folder(files: list[Path]) -> Path:
    folder = files[0].parent
    while not all(file.is_relative_to(folder) for file in files):
        folder = folder.parent
    return folder


def open_output(output: Path) -> None:
    """Raises ConfigError for a folder that holds anything but an earlier inference."""
    if output.is_dir() and any(output.iterdir()) and not (output / "detections.json").is_file():
        raise ConfigError(f"output: {output} holds other files - choose another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(f"output: {output} cannot be made ({fault.strerror}) - choose another folder") from None


if __name__ == "__main__":
    main()
