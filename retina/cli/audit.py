"""Labels that are likely wrong, worst first: a page with pictures, a table, and a file for annotation tools.

python tools/audit.py data=coco data.root=data/mine                                  # trainings judge each other's
python tools/audit.py data=coco data.root=data/mine checkpoint=runs/other split=val  # a detector that never saw them

A detector learns wrong labels too, so it may only judge images that it was not trained on. Without a checkpoint the
images are cut into folds, and a short training on all but one judges that one. Nothing of the data set is changed.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.compose import entry
from retina.cli.data import data_of, load_split
from retina.cli.loaders import progress
from retina.errors import ConfigError, RetinaError, check, check_choice, plain
from retina.files import make_folder, write_whole
from retina.printing import say

if TYPE_CHECKING:
    from retina.data.annotations import Annotations
    from retina.evaluation.audit import Suspect
    from retina.evaluation.metrics import DetectionArrays

PAGE, TABLE, LABELS, FOLDS = "audit.html", "suspects.csv", "suspects.json", "folds"
NEVER = "train.eval_every=1000000000"
"""A training is scored at its end alone, so that no weights are chosen by the images that they judge."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """configs/audit.yaml says what each is."""

    checkpoint: str | None
    output: str
    split: str
    folds: int
    training: list[str]
    limit: int
    seed: int
    device: str
    plugins: list[str]
    data: dict[str, Any]
    traceback: bool

    def __post_init__(self) -> None:
        check_choice(self.split, ("train", "val"), "split")
        check(self.folds >= 2, "folds", self.folds, "give 2 or more")
        check(self.limit >= 1, "limit", self.limit, "give 1 or more")


@entry("audit", AuditConfig)
def main(config: AuditConfig) -> int:
    output = Path(config.output)
    data = data_of({}, config.data, {})
    annotations = load_split(data, config.split)
    check(len(annotations) >= config.folds, "folds", config.folds, f"give at most {len(annotations)}, one for an image")
    open_folder(output)

    from retina.evaluation.audit import find_suspects
    from retina.report.audit import build_audit

    if config.checkpoint:
        detections = detect([(config.checkpoint, range(len(annotations)))], annotations, config)
        judged = f"judged by {config.checkpoint}, which must not have been trained on these labels"
    else:
        detections = detect(train_folds(annotations, config, output), annotations, config)
        judged = f"each image judged by a training on {config.folds - 1} of {config.folds} parts of the others"
    suspects = find_suspects(annotations, detections)[: config.limit]
    write_whole(output / TABLE, as_table(annotations, suspects))
    write_whole(output / LABELS, as_coco(annotations, suspects))
    write_whole(output / PAGE, build_audit(annotations, suspects, judged=judged, max_pixels=data.max_pixels))
    kinds = {kind: sum(one.kind == kind for one in suspects) for kind in dict.fromkeys(one.kind for one in suspects)}
    say(f"{len(suspects)} suspects: {', '.join(f'{count} {kind}' for kind, count in kinds.items()) or 'none'}")
    say(f"report: {output / PAGE}   |   table: {output / TABLE}   |   for annotation tools: {output / LABELS}")
    return 0


def open_folder(output: Path) -> None:
    """Makes it. Raises ConfigError for one that holds anything but an earlier audit."""
    make_folder(output)
    if any(entry.name not in (PAGE, TABLE, LABELS, FOLDS) for entry in output.iterdir()):
        raise ConfigError(f"{output} holds other files - choose another folder", code="output-taken", key="output")


def train_folds(annotations: "Annotations", config: AuditConfig, output: Path) -> list[tuple[str, Any]]:
    """A short training for each fold, on the images of the others; the weights, and the images that they judge. A
    training that finished before is not repeated."""
    import numpy as np

    from retina.cli.sweep import launch
    from retina.cli.train import main as training

    order = np.random.default_rng(config.seed).permutation(len(annotations))
    parts = [np.sort(part) for part in np.array_split(order, config.folds)]
    jobs, judges = [], list[tuple[str, Any]]()
    for number, part in enumerate(parts):
        folder = output / FOLDS
        make_folder(folder)
        words = {"runs": str(folder), "name": f"fold{number}", "train.device": config.device}
        for name, images in (("train", np.setdiff1d(order, part)), ("val", part)):
            file = folder / f"fold{number}_{name}.json"
            write_whole(file, json.dumps(subset(annotations, images.tolist())).encode())
            words |= {f"data.{name}.annotations": str(file), f"data.{name}.images": str(annotations.image_root)}
        typed = [f"{key}={quoted(value)}" for key, value in words.items()]
        jobs.append(["data=coco", "train.pictures=0", *config.training, *typed, NEVER])
        judges.append((str(folder / f"fold{number}"), part.tolist()))
    for outcome in launch(training, jobs):
        if outcome.fault:
            raise RetinaError(f"a training on a fold failed: {outcome.fault}", code="failed-fold")
    return judges


def quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def subset(annotations: "Annotations", images: list[int]) -> dict[str, Any]:
    """These images and their objects, as an annotation file."""
    ids = [number if category is None else category for number, category in enumerate(annotations.category_ids)]
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": id_, "name": name} for id_, name in zip(ids, annotations.classes, strict=True)]
    for image in images:
        height, width = annotations.sizes[image].tolist()
        content["images"].append(
            {"id": image, "file_name": annotations.file_name(image), "width": width, "height": height}
        )
        for row in range(*annotations.offsets[image : image + 2].tolist()):
            x1, y1, x2, y2 = annotations.boxes[row].tolist()
            content["annotations"].append(
                {
                    "id": row + 1,
                    "image_id": image,
                    "category_id": ids[annotations.labels[row]],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(annotations.areas[row]),
                    "iscrowd": int(annotations.crowd[row]),
                }
            )
    return content


def detect(judges: list[tuple[str, Any]], annotations: "Annotations", config: AuditConfig) -> "DetectionArrays":
    """What each judge finds in its images, of the classes of the data set."""
    import numpy as np

    from retina.data.checks import RecordsError
    from retina.evaluation.metrics import DetectionArrays
    from retina.inference import Detector

    columns: list[list[np.ndarray]] = [[], [], [], []]
    for checkpoint, images in judges:
        detector = Detector.load(checkpoint, device=config.device, plugins=config.plugins)
        if unknown := [name for name in annotations.classes if name not in detector.classes]:
            lines = [f"{checkpoint}: class {name!r}: is not among those of the weights" for name in unknown]
            raise RecordsError([f"{line} - give weights of these classes, or none" for line in lines])
        own = np.array([annotations.classes.index(n) if n in annotations.classes else -1 for n in detector.classes])
        for image in progress(list(images), "auditing", len(images)):
            (found,) = detector.predict(annotations.path(image), score_threshold=0.02)
            labels = own[found.labels.numpy()]
            kept = labels >= 0
            parts = (np.full(kept.sum(), image), found.boxes.numpy()[kept], found.scores.numpy()[kept], labels[kept])
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
    indices, boxes, scores, labels = (np.concatenate(column) for column in columns)
    return DetectionArrays(indices.astype(np.int64), boxes.astype(np.float64), scores.astype(np.float64), labels)


def as_table(annotations: "Annotations", suspects: "list[Suspect]") -> bytes:
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(["rank", "kind", "score", "image", "class", "x1", "y1", "x2", "y2", "reason"])
    for rank, one in enumerate(suspects, start=1):
        name, label = annotations.file_name(one.image), annotations.classes[one.label]
        writer.writerow([rank, one.kind, f"{one.score:.4f}", name, label, *one.box, plain(one.reason)])
    return content.getvalue().encode(errors="backslashreplace")


def as_coco(annotations: "Annotations", suspects: "list[Suspect]") -> bytes:
    """The labels of the images with suspects, and the suspects among them: `suspect` says of what kind, `score` how
    much. Of a label that may be missing, the box is that of the detection."""
    images = sorted({one.image for one in suspects})
    content = subset(annotations, images)
    kinds = {one.object: one for one in reversed(suspects) if one.object is not None}
    for record in content["annotations"]:
        if one := kinds.get(record["id"] - 1):
            record |= {"suspect": one.kind, "score": round(one.score, 4), "reason": one.reason}
    ids = [category["id"] for category in content["categories"]]
    next_id = len(annotations.labels) + 1
    for number, one in enumerate((one for one in suspects if one.object is None), start=next_id):
        x1, y1, x2, y2 = one.box
        about = {"id": number, "image_id": one.image, "category_id": ids[one.label], "iscrowd": 0}
        about |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        content["annotations"].append(about | {"suspect": one.kind, "score": round(one.score, 4), "reason": one.reason})
    return json.dumps(content).encode()
