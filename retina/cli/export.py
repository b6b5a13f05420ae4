"""Writes a detector as one file that other runtimes run, and proves that it finds the same there.

python tools/export.py checkpoint=runs/mine
python tools/export.py checkpoint=runs/mine output=mine.onnx score_threshold=0.3
python tools/export.py checkpoint=retinanet_R_50.pkl images=photos/ output=coco.onnx

The file takes uint8 images of any sizes and returns boxes in their pixels: resize, network, thresholds and NMS are in
it. It is run beside the detector on real images, and written only if both find the same; the proof is stored in the
file and beside it, and `retina verify FILE` repeats it without torch. Weights of other programs are taken as they are,
as by `retina import-weights`. docs/export-your-retinanet.md says more.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.build import call
from retina.cli.compose import entry
from retina.cli.data import data_of, drop_nulls, load_split
from retina.cli.import_weights import read_classes
from retina.cli.loaders import progress
from retina.cli.run_folder import read_settings
from retina.cli.sources import find_images
from retina.errors import ConfigError, check, check_choice
from retina.files import make_folder, write_whole
from retina.printing import say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from retina.export.proof import Image
    from retina.export.write import Pictures
    from retina.inference import Detector

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
HUB = "hf"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """configs/export.yaml says what each is."""

    checkpoint: str
    output: str | None
    format: str
    precision: str
    raw: bool
    score_threshold: float | None
    postprocess: dict[str, Any]
    images: str | None
    split: str
    num_images: int
    num_scored: int
    num_calibrated: int
    tolerance: dict[str, float | None]
    overwrite: bool
    license: str | None
    classes: list[str] | str | None
    conventions: dict[str, Any]
    plugins: list[str]
    data: dict[str, Any]
    traceback: bool

    def __post_init__(self) -> None:
        check_choice(self.format, (*SUFFIXES, HUB), "format")
        plain = self.license is None or re.fullmatch(r"[\w.+-]{1,80}", self.license)
        check(bool(plain), "license", self.license, "give a word such as apache-2.0")
        check_choice(self.precision, ("fp32", "fp16", "int8"), "precision")
        if self.precision == "int8" and self.format != "onnx":
            problem = f"is for format=onnx, not {self.format} - leave one of them out"
            raise ConfigError(problem, code="contradiction", key="precision")
        check_choice(self.split, ("train", "val"), "split")
        check(self.num_images >= 1, "num_images", self.num_images, "give 1 or more")
        check(self.num_calibrated >= 1, "num_calibrated", self.num_calibrated, "give 1 or more")
        check(self.num_scored >= 0, "num_scored", self.num_scored, "give 0 or more")
        for name, value in self.tolerance.items():
            names = ("pixels", "score", "unmatched")
            check(name in names, f"tolerance.{name}", value, "there are pixels, score and unmatched")
            check(value is None or value > 0, f"tolerance.{name}", value, "give more than 0")
        if self.output and self.format != HUB and Path(self.output).suffix != SUFFIXES[self.format]:
            problem = f"{self.output} - give a name that ends in {SUFFIXES[self.format]}"
            raise ConfigError(problem, code="bad-name", key="output")

    @property
    def is_foreign(self) -> bool:
        """Whether the weights are another program's."""
        names = (".pkl", ".pickle", ".pth", ".pt", ".bin")
        return self.checkpoint.startswith("torchvision:") or self.checkpoint.endswith(names)


@entry("export", ExportConfig)
def main(config: ExportConfig) -> int:
    output = place_of(config)
    if config.format == HUB:
        from retina.cli.folders import write_hub_folder

        options: dict[str, Any] = {"halved": config.precision == "fp16", "overwrite": config.overwrite}
        say(*write_hub_folder(config.checkpoint, output, license=config.license, **options))
        return 0
    beside = output.with_suffix(".proof.json")
    files = [output.with_suffix(suffix) for suffix in (".bin",) if config.format == "openvino"]
    for file in (output, beside, *files):
        if os.path.lexists(file) and not config.overwrite:
            line = f"{file} is there already - give another name, or overwrite=true"
            raise ConfigError(line, code="output-taken", key="output")

    # torch takes seconds to load, and a wrong setting should not wait for it
    from retina.export import write
    from retina.export.formats import check_packages
    from retina.export.proof import TOLERANCES, digest, summary

    check_packages(config.format)
    reference, subject, notes = load_twice(config)
    pictures = find_pictures(config, reference, output)
    threshold = {"score_threshold": config.score_threshold}
    options = {"format": config.format, "raw": config.raw, "weights": digest(reference.file)}
    description = write.describe(subject, **options | threshold, precision=config.precision)
    say(*notes, f"writing {config.format} ...")
    graph = write.build(subject, description, calibration(config, reference, output))
    tolerance = TOLERANCES[config.precision]._replace(**drop_nulls(config.tolerance))
    proof = write.prove(
        reference,
        graph,
        pictures,
        description,
        tolerance=tolerance,
        num_images=config.num_images,
        num_scored=config.num_scored,
        **threshold,
        progress=lambda items, what: progress(items, what, len(items)),
    )
    contents = graph.sealed(description | {"proof": proof})
    make_folder(output.parent)
    for suffix, content in contents.items():
        write_whole(output.with_suffix(suffix), content)
    parts = {output.with_suffix(suffix).name: sha256(content).hexdigest() for suffix, content in contents.items()}
    record = {"file": output.name, "sha256": parts.pop(output.name), "parts": parts, **proof}
    write_whole(beside, (json.dumps(record) + "\n").encode())
    size = sum(map(len, contents.values())) / 1e6
    say(*summary(proof), f"written: {output} ({size:.1f} MB), {', '.join([*parts, beside.name])}")
    return 0


def calibration(config: ExportConfig, detector: "Detector", output: Path) -> "Iterable[Image]":
    """Of the training images, what int8 is measured on; nothing for the others."""
    from retina.export.write import calibration_images

    if config.precision != "int8":
        return []
    pictures = find_pictures(replace(config, split="train"), detector, output)
    return calibration_images(pictures, config.num_calibrated, detector.pixels)


def place_of(config: ExportConfig) -> Path:
    if config.output:
        return Path(config.output)
    checkpoint = Path(config.checkpoint)
    if config.format == HUB:
        return (checkpoint if checkpoint.is_dir() else Path(f"{checkpoint}").with_suffix("")) / "export" / HUB
    name = f"model{SUFFIXES[config.format]}"
    if config.checkpoint.startswith("torchvision:"):
        return Path(f"{config.checkpoint.partition(':')[2]}{SUFFIXES[config.format]}")
    return checkpoint / "export" / name if checkpoint.is_dir() else checkpoint.with_suffix(SUFFIXES[config.format])


def load_twice(config: ExportConfig) -> "tuple[Detector, Detector, list[str]]":
    """The detector in fp32, the one to be written in its precision, and what there is to tell of another program's."""
    from retina.hub import load
    from retina.inference import check_postprocess

    notes: list[str] = []
    if config.is_foreign:
        make, notes = foreign(config)
    else:
        make = partial(load, config.checkpoint, device="cpu", plugins=config.plugins)
    options = drop_nulls(config.postprocess)
    detectors = []
    for precision in ("fp32", "fp32" if config.precision == "int8" else config.precision):
        detector: Detector = make(precision=precision).in_tiles(None)  # who runs the file cuts
        detector.card = replace(detector.card, postprocess=detector.card.postprocess | options)
        detectors.append(detector)
    call(check_postprocess, "postprocess", options=detectors[0].card.postprocess)
    return detectors[0], detectors[1], notes


def foreign(config: ExportConfig) -> tuple[Any, list[str]]:
    """What makes a detector of another program's weights, and lines that say what was recognised."""
    import torch

    from retina.inference import Detector
    from retina.interop.convert import convert_detector
    from retina.interop.read import read_foreign
    from retina.interop.torchvision import PREFIX, fetch_published
    from retina.model.retinanet import retinanet
    from retina.model.weights import load_state

    source = config.checkpoint
    file = fetch_published(source) if source.startswith(PREFIX) else Path(source)
    weights = read_foreign(file)
    if not weights.is_detector:
        raise ConfigError(f"{file} is a plain backbone - give a detector", code="no-detector", key="checkpoint")
    classes = read_classes(config.classes)
    imported = convert_detector(weights, file, classes=classes, conventions=config.conventions, ignore_unknown=False)

    def make(precision: str) -> Detector:
        model = retinanet(**imported.card.model)
        load_state(model, imported.state, file)
        card = replace(imported.card, preprocessing=imported.card.preprocessing | {"precision": precision})
        return Detector(model.eval(), card, device=torch.device("cpu"), file=file)

    return make, list(imported.notes)


def find_pictures(config: ExportConfig, detector: "Detector", output: Path) -> "Pictures":
    """The images of the proof: those that are named, or the split's."""
    from retina.export.write import Pictures

    if config.images:
        root, files = find_images(config.images, output)
        return Pictures(root, [str(file.relative_to(root)) for file in files])
    checkpoint = Path(config.checkpoint)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    settings = read_settings(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    trained = settings.get("data")
    if isinstance(trained, dict) or drop_nulls(config.data):
        data = data_of(trained if isinstance(trained, dict) else {}, config.data, detector.card.preprocessing)
        return Pictures.of(load_split(data, config.split, classes=detector.classes))
    problem = "missing - give images=FOLDER with images to prove the file with, or data=coco data.root=DIR"
    raise ConfigError(problem, code="missing-setting", key="images")
