"""Detectors from wherever they are kept: runs, files, folders of Hugging Face and DeepForest, and weights that come
with this package. Beside the road."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from retina.distributed import choose_device
from retina.inference import Detector
from retina.model.retinanet import retinanet
from retina.model.weights import load_state

FILE = "model.safetensors"
PUBLISHED = Path(__file__).parent / "weights"
"""Folders of weights that are installed with the package; README.md in each says what they are."""


def load(
    checkpoint: str | Path, *, device: str = "auto", precision: str | None = None, plugins: Sequence[str] = ()
) -> Detector:
    """The detector of a run folder, a `.safetensors` file, a folder with `config.json` and `model.safetensors` that
    `retina export format=hf` or DeepForest wrote, or, where there is nothing of that name, of `shapes`: tiny weights to
    try things out, which know the shapes of `write_shapes` and nothing else.

    Arguments and errors are those of `Detector.load`."""
    place = located(checkpoint)
    if place.is_dir() and (place / FILE).is_file() and not (place / "best.safetensors").is_file():
        return _deepforest(place, choose_device(device), precision)
    return Detector.load(place, device=device, precision=precision, plugins=plugins)


def located(checkpoint: str | Path) -> Path:
    """The run folder, file or folder of DeepForest that `load` takes."""
    place = Path(checkpoint).expanduser()
    if not place.exists() and len(place.parts) == 1 and (PUBLISHED / place).is_dir():
        return PUBLISHED / place / FILE
    if place.is_dir() and not (place / "best.safetensors").is_file() and (place / FILE).is_file():
        from retina.interop.deepforest import is_deepforest  # takes torchvision's models, which others need not

        return place if is_deepforest(place) else place / FILE
    return place


def _deepforest(folder: Path, device: torch.device, precision: str | None) -> Detector:
    from retina.interop.deepforest import read_deepforest

    imported = read_deepforest(folder)
    model = retinanet(**imported.card.model)
    load_state(model, imported.state, folder / FILE)
    preprocessing = imported.card.preprocessing | ({"precision": precision} if precision else {})
    card = replace(imported.card, preprocessing=preprocessing)
    return Detector(model.eval(), card, device=device, file=folder / FILE)
