"""Tells how well the anchors of a detector cover the objects of a data set, and fits better ones.

python tools/lab.py anchors                                       # the built-in shapes
python tools/lab.py anchors data=coco data.root=DIR               # your own data: annotations only, no image is read
python tools/lab.py anchors experiment=paper data=coco data.root=DIR output=configs/model/mine.yaml

Settings are those of tools/train.py, and some more: configs/lab_anchors.yaml. Objects are taken at the size that the
configured resize gives them; what crops, turns or rescales after it is not followed. Best IoUs are exact, for each
image alone in its batch, and so are the positive anchors of the images that are matched. The fit keeps the number of
anchors per cell, and is judged by images that it was not made from. Unless it gains more than noise, nothing is written
to `output`. A fit is for a rule that chooses by IoU (experiment=paper); with another, as the default's, coverage is
shown and nothing fitted. Writes anchors.json (all numbers) and anchors.png.
"""

import itertools
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from retina.cli.build import build, call
from retina.cli.compose import Settings, entry
from retina.cli.data import SPLITS, DataConfig, as_seen, load_split, prepare_data, with_tile
from retina.cli.loaders import progress
from retina.cli.train import shapes_by_default
from retina.engine.config import TrainConfig, from_mapping
from retina.errors import ConfigError, DataError, check_choice, plain
from retina.files import make_folder, write_whole
from retina.lab.figures import check_folder, check_format, save
from retina.printing import say

if TYPE_CHECKING:
    from retina.data.annotations import Annotations
    from retina.data.transforms import Pipeline
    from retina.lab.coverage import Objects, Pyramid
    from retina.ops.assigners import Assigner


@dataclass(frozen=True, kw_only=True)
class AnchorsConfig:
    """configs/lab_anchors.yaml says what each is."""

    output: str | None
    figures: str
    split: str
    images: int
    overwrite: bool

    def __post_init__(self) -> None:
        check_choice(self.split, SPLITS, "split")
        if self.images < 1:
            raise ConfigError(f"{self.images} is not allowed - give 1 or more", code="out-of-range", key="images")


def main(argv: Sequence[str]) -> NoReturn:
    @entry("lab_anchors", default=shapes_by_default)
    def anchors(settings: Settings) -> None:
        config = from_mapping(AnchorsConfig, {field.name: settings[field.name] for field in fields(AnchorsConfig)})
        data = from_mapping(DataConfig, settings["data"], "data")
        check_places(config, data)
        run(settings, config, data, plain(f"python tools/lab.py anchors {shlex.join(argv)}"))

    anchors(argv)


def run(settings: Settings, config: AnchorsConfig, data: DataConfig, command: str) -> None:
    import torch

    from retina.lab.anchor_fit import Decision, decide, fit, try_levels
    from retina.lab.anchor_report import describe, draw, model_section, yaml_file
    from retina.lab.coverage import cover, draw_images, rows_of_images, summarize

    seed = from_mapping(TrainConfig, settings["train"], "train").seed
    now = pyramid_of(settings, levels_of(settings["model"]))
    rule, threshold, refusal = rule_of(settings)
    annotations, objects, notes = read(settings, config, data, seed, divisor=data.pad_multiple or max(now.strides))
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_images(objects, config.images, generator)
    sample = objects.of(drawn)
    pyramids, decision, trials = {"now": now}, Decision(now.levels, False, refusal), []
    if not refusal:
        begin = list(starts(settings, now))
        trials = try_levels(sample, now, progress(begin, "fitting", len(begin)), threshold, generator)
        decision = decide(sample, trials, now.levels, threshold)
        pyramids["fitted"] = fit(sample, pyramid_of(settings, decision.levels), threshold, generator)

    images = rows_of_images(objects, drawn)
    result: dict[str, Any] = {
        "command": command,
        "data": {"annotations": str(annotations.file), "images": len(annotations), "objects": len(objects.boxes)},
        "positives_of": repr(rule),
        "threshold": threshold,
        "change": decision.change,
        "verdict": decision.reason,
        "trials": [trial.numbers() for trial in trials],
        "notes": notes,
    }
    coverages = {}
    for name, pyramid in pyramids.items():
        bar = progress(images, f"matching: {name}", len(images))
        coverages[name] = cover(objects, pyramid, rule, threshold, bar)
        numbers = summarize(objects, coverages[name], threshold, pyramid.levels, annotations.classes)
        result[name] = {"model": model_section(pyramid), "coverage": numbers}
    folder = Path(config.figures)
    make_folder(folder)
    write_whole(folder / "anchors.json", (json.dumps(result, indent=2) + "\n").encode())
    save(draw(objects, pyramids, coverages), folder / "anchors.png")
    say(*describe(result).splitlines(), f"all numbers and a picture: {folder}")
    if config.output and decision.change:
        file = Path(config.output)
        make_folder(file.parent)
        write_whole(file, yaml_file(settings["model"], result, file.stem).encode())
        say(f"written: {file} - use it as model={file.stem}")
    elif config.output:
        say(f"not written: {config.output}")


def check_places(config: AnchorsConfig, data: DataConfig) -> None:
    """Raises ConfigError for places among the data or not to be written, and for files that are not the lab's own."""
    folder, output = Path(config.figures), Path(config.output) if config.output else None
    places = {"figures": folder} | ({"output": output} if output else {})
    for (key, place), source in itertools.product(places.items(), data.own_folders):
        if place.resolve().is_relative_to(Path(source).resolve()):
            problem = f"{place} lies in {source}, the data set's own - choose another place"
            raise ConfigError(problem, code="output-in-data", key=key)
    check_format(folder / "anchors.png", "figures")
    if (folder / "anchors.json").exists() and not (folder / "anchors.png").exists():
        problem = f"{folder / 'anchors.json'} is there already and not the lab's - choose another folder"
        raise ConfigError(problem, code="output-taken", key="figures")
    if output and output.suffix != ".yaml":
        raise ConfigError(f"{output} is no config file - end it in .yaml", code="wrong-value", key="output")
    if output and os.path.lexists(output) and not config.overwrite:
        problem = f"{output} is there already - choose another file, or give overwrite=true"
        raise ConfigError(problem, code="output-taken", key="output")
    check_folder(folder, "figures")
    if output:
        check_folder(output.parent, "output")


def levels_of(model: Settings) -> list[int]:
    """Raises ConfigError where the settings leave them open."""
    levels = model.get("levels")
    if not isinstance(levels, list):
        problem = "missing - give a list, as in model.levels=[3,4,5,6,7]"
        raise ConfigError(problem, code="missing-setting", key="model.levels")
    return levels


def pyramid_of(settings: Settings, levels: Sequence[int]) -> "Pyramid":
    """The anchors of the model that these settings make, on these levels. Raises ConfigError where it cannot be made.

    Levels that the settings have no size for get half the next one's."""
    import torch

    from retina.lab.coverage import Pyramid
    from retina.model.retinanet import retinanet

    model = settings["model"] | {"levels": list(levels), "weights": None}
    sizes = model.get("anchor_sizes")
    if sizes and levels != settings["model"]["levels"]:
        known = dict(zip(settings["model"]["levels"], sizes, strict=False))
        model["anchor_sizes"] = [float(known.get(level, sizes[0] / 2)) for level in levels]
    with torch.device("meta"):  # shapes alone
        detector = call(retinanet, "model", **model, num_classes=1, plugins=settings["plugins"])
    return Pyramid(detector.anchors, detector.strides)


def rule_of(settings: Settings) -> tuple["Assigner", float, str]:
    """The rule whose positives are counted, the IoU of its recall, and why nothing is fitted for the rule, if so.
    A rule that looks at predictions cannot be counted: the paper's is in its place."""
    from retina.ops.assigners import ATSS, MaxIoU

    assigner = getattr(build(settings["loss"], "loss", plugins=settings["plugins"]), "assigner", None)
    if isinstance(assigner, MaxIoU):
        return assigner, assigner.positive_iou, ""
    name = type(assigner).__name__
    refusal = f"no change: {name} has no fixed IoU for anchors to reach - give experiment=paper for a fit"
    if isinstance(assigner, ATSS):
        return assigner, 0.5, refusal
    return MaxIoU(), 0.5, f"{refusal}. Positives are not {name}'s, which need predictions, but the paper's"


def read(
    settings: Settings, config: AnchorsConfig, data: DataConfig, seed: int, divisor: int
) -> tuple["Annotations", "Objects", list[str]]:
    """The data set, its objects after the resize, and what there is to say about that."""
    from retina.lab.coverage import resized_objects

    prepare_data(data, settings["plugins"])
    pipeline, notes = resize_of(settings, data)
    annotations = load_split(data, config.split, needs="sizes")
    data = with_tile(data, annotations)
    if data.tiling and annotations.num_objects:
        notes.append(f"objects are seen in tiles of {data.tile}, as an evaluation cuts them")
        annotations = as_seen(data, annotations, with_objects=True)
    images = progress(range(len(annotations)), "resizing", len(annotations))
    objects = resized_objects(annotations, pipeline, seed=seed, divisor=divisor, images=images)
    if not len(objects.boxes):
        problem = f"{annotations.file}: no objects in it - nothing can be said about anchors"
        raise DataError(problem, code="no-objects")
    return annotations, objects, notes


def resize_of(settings: Settings, data: DataConfig) -> tuple["Pipeline", list[str]]:
    """The resize among the augmentations, or else that of evaluation; and what else moves boxes, which is left out."""
    from retina.data.adapters import adapt
    from retina.data.transforms import Pipeline, ResizeShortSide

    make = partial(build, plugins=settings["plugins"])
    transforms = {name: make(section, f"augment.{name}") for name, section in settings["augment"].items()}
    resizes = {name: one for name, one in transforms.items() if isinstance(one, ResizeShortSide)}
    name, resize = next(iter(resizes.items()), ("resize", ResizeShortSide(data.short_side, data.long_side)))
    left_out = [key for key, one in transforms.items() if key != name and not adapt(one, key).keeps_sizes]
    notes = [f"not followed: augment.{key}" for key in left_out]
    if not resizes:
        notes.append("no ResizeShortSide in augment: objects are of the size that evaluation gives them")
    return Pipeline({name: resize}, min_size=data.min_size, min_visibility=data.min_visibility), notes


def starts(settings: Settings, now: "Pyramid") -> Iterator["Pyramid"]:
    """The levels as they are, then with one more below and with one less, where there is such a model."""
    yield now
    for levels in ([now.levels[0] - 1, *now.levels], now.levels[1:]):
        with suppress(ConfigError):
            yield pyramid_of(settings, levels)
