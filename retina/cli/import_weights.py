"""Makes weights of other programs ours: detectors, ready for inference and fine-tuning, and ImageNet backbones.

python tools/import_weights.py source=FILE output=FILE.safetensors
python tools/import_weights.py source=torchvision:retinanet_resnet50_fpn_v2 output=FILE.safetensors
python tools/import_weights.py source=RUN output=FILE.safetensors to=torchvision
python tools/import_weights.py source=RUN output=FOLDER to=deepforest

Reads RetinaNets of torchvision, detectron2 (.pkl and .pth), mmdetection and yhenon, DeepForest's folders, and ImageNet
ResNets of torchvision, timm and detectron2, each recognised by the names of its tensors. Nothing in a file is executed.
With `to=torchvision` a detector of ours is written under torchvision's names, with `to=deepforest` as its folder.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retina.cli.build import call
from retina.cli.compose import entry
from retina.cli.folders import write_deepforest_folder
from retina.errors import ConfigError, check_choice
from retina.files import make_folder, write_whole
from retina.printing import say


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """configs/import_weights.yaml says what each is."""

    source: str
    output: str
    to: str
    overwrite: bool
    ignore_unknown: bool
    classes: list[str] | str | None
    conventions: dict[str, Any]
    plugins: list[str]
    traceback: bool

    def __post_init__(self) -> None:
        check_choice(self.to, ("retina", "torchvision", "deepforest"), "to")
        if self.to != "deepforest" and Path(self.output).suffix != ".safetensors":
            raise ConfigError(f"{self.output} - give a name that ends in .safetensors", code="bad-name", key="output")
        if self.to != "retina":
            others = {f"conventions.{name}": value for name, value in self.conventions.items()}
            others |= {"classes": self.classes, "ignore_unknown": self.ignore_unknown or None}
            if key := next((name for name, value in others.items() if value is not None), ""):
                line = f"is for weights of others, not for to={self.to} - leave it out"
                raise ConfigError(line, code="contradiction", key=key)


@entry("import_weights", ImportConfig)
def main(config: ImportConfig) -> int:
    output = Path(config.output)
    if config.to == "deepforest":
        say(*write_deepforest_folder(config.source, output, config.plugins, overwrite=config.overwrite))
        return 0
    if os.path.lexists(output) and not config.overwrite:
        line = f"{output} is there already - give another name, or overwrite=true"
        raise ConfigError(line, code="output-taken", key="output")
    make_folder(output.parent)
    lines = export(config, output) if config.to == "torchvision" else bring_in(config, output)
    say(*lines, f"written: {output}")
    return 0


def bring_in(config: ImportConfig, output: Path) -> list[str]:
    """Writes what another program's file holds, and returns lines that say what was done."""
    # torch takes seconds to load, and a wrong setting should not wait for it
    from retina.inference import check_postprocess
    from retina.interop.convert import convert_backbone, convert_detector
    from retina.interop.deepforest import is_deepforest, read_deepforest
    from retina.interop.read import read_foreign
    from retina.interop.torchvision import PREFIX, fetch_published
    from retina.interop.transfer import overrides
    from retina.model.weights import save_detector, serialize

    if is_deepforest(Path(config.source)):
        imported = read_deepforest(Path(config.source))
        save_detector(output, imported.state, imported.card)
        return imported.notes
    classes = read_classes(config.classes)
    file = fetch_published(config.source) if config.source.startswith(PREFIX) else Path(config.source)
    foreign = read_foreign(file)
    options: dict[str, Any] = {"conventions": config.conventions, "ignore_unknown": config.ignore_unknown}
    if not foreign.is_detector:
        if classes is not None:
            line = f"mean nothing to {file}, a plain backbone - leave them out"
            raise ConfigError(line, code="contradiction", key="classes")
        state, model, lines = convert_backbone(foreign, file, **options)
        write_whole(output, serialize(state))
        return [*lines, f"train with it: python tools/train.py {overrides(model | {'weights': str(output)})}"]
    imported = convert_detector(foreign, file, classes=classes, **options)
    call(check_postprocess, "conventions", options=imported.card.postprocess)
    save_detector(output, imported.state, imported.card)
    tune = "python tools/train.py experiment=paper data=coco data.root=DIR"
    tune = f"{tune} init_from={output} {overrides(unusual(imported.card.model))}"
    return [*imported.notes, f"detect: python tools/infer.py checkpoint={output} source=photos/", f"fine-tune: {tune}"]


def export(config: ImportConfig, output: Path) -> list[str]:
    """Writes a detector of ours under torchvision's names, and returns lines that say how to load it."""
    import torch

    from retina.inference import find_weights
    from retina.interop.torchvision import check_export, describe_export, to_torchvision
    from retina.model.weights import load_detector, serialize

    model, card = load_detector(find_weights(Path(config.source)), torch.device("cpu"), plugins=config.plugins)
    check_export(card.model, card.postprocess)
    metadata = {"classes": json.dumps(card.classes)}
    write_whole(output, serialize(to_torchvision(model.state_dict()), metadata))
    return describe_export(model, card.preprocessing, card.postprocess, output)


def read_classes(classes: list[str] | str | None) -> list[str] | None:
    """Names from the command line, or from a text file with one per line."""
    if isinstance(classes, str):
        try:
            text = Path(classes).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = ""
        classes = [line.strip() for line in text.splitlines() if line.strip()]
    if classes is not None and not (classes and all(map(str.strip, classes))):
        line = "no list of names - give [cat,dog], or a text file with one per line"
        raise ConfigError(line, code="wrong-type", key="classes")
    return classes


def unusual(model: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `retinanet` that are not its defaults, except the number of classes."""
    import inspect

    from retina.model.retinanet import retinanet

    parameters = inspect.signature(retinanet).parameters
    defaults = {n: list(p.default) if isinstance(p.default, tuple) else p.default for n, p in parameters.items()}
    return {name: value for name, value in model.items() if name != "num_classes" and value != defaults[name]}
