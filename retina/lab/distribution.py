"""Where the classification loss of a trained detector comes from, as in Figure 4 of the focal loss paper.

python tools/lab.py distribution checkpoint=runs/shapes
python tools/lab.py distribution checkpoint=runs/mine data=coco data.root=/data/other split=train

One forward pass over the images. Every class of every anchor that is not ignored is one element: positive for the class
of an anchor's object, negative for all others. Their losses under other gamma and alpha follow from the same logits.
Writes distribution.json, cumulative.png (positives and negatives under each gamma, easiest elements first), the same by
class (the rarest) and by pyramid level, and hardest.png (share of the loss on the hardest 1 % and 10 %, by class and
level). Images that cannot be read are left out and listed; the exit code is then 3.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.build import build, call
from retina.cli.compose import Settings, entry
from retina.cli.data import SPLITS, data_of
from retina.cli.loaders import open_split, progress
from retina.cli.run_folder import read_settings
from retina.engine.config import from_mapping
from retina.errors import ConfigError, check_choice
from retina.files import make_folder, write_whole
from retina.lab.figures import draw_cumulative, draw_cumulative_by, draw_hardest, save
from retina.printing import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from retina.lab.elements import Elements

FIGURES: "dict[str, Callable[[Mapping[str, Any]], Figure]]" = {
    "cumulative": draw_cumulative,
    "cumulative_by_class": partial(draw_cumulative_by, by="class"),
    "cumulative_by_level": partial(draw_cumulative_by, by="level"),
    "hardest": draw_hardest,
}


@dataclass(frozen=True, kw_only=True)
class DistributionConfig:
    """configs/lab_distribution.yaml says what each is."""

    checkpoint: str
    output: str
    split: str
    gammas: list[float]
    alphas: list[float]
    figures: str
    batch_size: int | None
    device: str
    precision: str | None
    data: dict[str, Any]
    loss: dict[str, Any]
    plugins: list[str]
    traceback: bool

    def __post_init__(self) -> None:
        check_choice(self.split, SPLITS, "split")
        check_choice(self.figures, ("png", "svg"), "figures")
        if self.batch_size is not None and self.batch_size < 1:
            problem = f"{self.batch_size} is not allowed - give 1 or more, or null"
            raise ConfigError(problem, code="out-of-range", key="batch_size")
        check_numbers("gammas", self.gammas, sys.float_info.max, "finite and at least 0")
        check_numbers("alphas", self.alphas, 1, "from 0 to 1")


def check_numbers(key: str, values: Sequence[float], most: float, allowed: str) -> None:
    """Raises ConfigError for no numbers, one that is not in 0..most, or two that look alike."""
    for value in values:
        if not 0 <= value <= most:
            raise ConfigError(f"{value!r} is not allowed - give numbers {allowed}", code="out-of-range", key=key)
    if not values:
        raise ConfigError("empty - give at least one number", code="missing-setting", key=key)
    texts = [f"{value:g}" for value in values]
    if twice := [text for text in texts if texts.count(text) > 1]:
        problem = f"{twice[0]} is there twice - give numbers that differ in six digits"
        raise ConfigError(problem, code="same-name", key=key)


@entry("lab_distribution")
def main(settings: Settings) -> int:
    """The exit code."""
    config = from_mapping(DistributionConfig, settings)
    checkpoint, output = Path(config.checkpoint), Path(config.output)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    trained = read_settings(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    open_output(output)
    elements, collected = collect(config, trained.get("data") or {}, output)
    note_other_rule(trained.get("loss"), config.loss)

    from retina.lab.elements import describe, summary  # loads torch, as `collect` did

    result = collected | describe(elements, collected["classes"], collected["levels"], config.gammas, config.alphas)
    write_whole(output / "distribution.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    files = {f"{name}.{config.figures}": draw for name, draw in FIGURES.items()}
    for name, draw in files.items():
        save(draw(result), output / name)
    say(*summary(result).splitlines(), "", f"written: {output}/{', '.join(['distribution.json', *files])}")
    say(*(f"skipped: {line}" for line in collected["skipped"]), error=True)
    return 3 if collected["skipped"] else 0


def collect(config: DistributionConfig, trained: Mapping[str, Any], output: Path) -> tuple["Elements", dict[str, Any]]:
    """The elements of all images, and what they are of."""
    # torch takes seconds to load, and a wrong setting should not wait for it
    import torch

    from retina import distributed
    from retina.inference import Detector
    from retina.lab.elements import Elements, assign
    from retina.types import to_device

    device = call(distributed.choose_device, "device", name=config.device)
    assigner = build(config.loss.get("assigner"), "loss.assigner", plugins=config.plugins)
    detector = Detector.load(config.checkpoint, device=str(device), precision=config.precision, plugins=config.plugins)
    data = data_of(trained, config.data, detector.card.preprocessing)
    annotations, loader = open_split(data, config.split, detector, output, batch_size=config.batch_size)
    elements = Elements(len(detector.classes), len(detector.model.strides))
    with torch.no_grad():
        for batch in progress(loader, "looking", len(loader)):
            on_device = to_device(batch, device)
            with torch.autocast(device.type, detector.dtype, enabled=detector.dtype != torch.float32):
                predictions = detector.model(on_device.images, on_device.sizes)
                arguments = {"assigner": assigner, "predictions": predictions, "targets": on_device.targets}
                elements.add(predictions, *call(assign, "loss.assigner", **arguments))
    skipped = sorted({*loader.faults.values()})  # tiles of one image have the same
    return elements, {
        "checkpoint": config.checkpoint,
        "annotations": str(annotations.file),
        "images": len(annotations) - len(skipped),
        "skipped": skipped,
        "assigner": config.loss["assigner"],
        "classes": list(detector.classes),
        "levels": [f"P{stride.bit_length() - 1}" for stride in detector.model.strides],
    }


def note_other_rule(trained: Mapping[str, Any] | None, loss: Mapping[str, Any]) -> None:
    """Settings in a run's folder make no objects, so its assigner must be given; a line says when it was another."""
    before, now = (trained or {}).get("assigner"), loss["assigner"]
    if before and before != now:
        say(f"note: the run was trained with loss.assigner {before}, this uses {now}", error=True)


def open_output(output: Path) -> None:
    """The folder, made if need be. Raises ConfigError for one that holds anything but an earlier distribution."""
    try:
        make_folder(output)
        others = {path.name for path in output.iterdir()} - {"distribution.json", "data_report.json"}
    except OSError as fault:
        problem = f"{output} cannot be written ({fault.strerror}) - choose another folder"
        raise ConfigError(problem, code="not-written", key="output") from None
    if any(not name.startswith((".", *(f"{figure}." for figure in FIGURES))) for name in others):
        raise ConfigError(f"{output} holds other files - choose another folder", code="output-taken", key="output")
