"""Folders that other programs read: Hugging Face's hub, and DeepForest. Beside the road."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retina.cli.analysis import read_json, read_text
from retina.errors import ConfigError
from retina.files import make_folder, write_whole


def write_hub_folder(checkpoint: str, output: Path, *, license: str | None, halved: bool, overwrite: bool) -> list[str]:
    """Weights, description and model card; returns lines that say what was written.

    halved: stores matrices and kernels as float16; they are read as float32 again.

    Raises ConfigError for a file that is there already, CheckpointError for weights that cannot be read."""
    from safetensors.torch import load

    from retina.cli.scoring import folder_of, settings_of
    from retina.export.hub import folder_files
    from retina.hub import located
    from retina.inference import find_weights
    from retina.model.weights import detector_bytes, read_file

    place = located(checkpoint)
    card, content = read_file(find_weights(place))
    if card is None:
        raise ConfigError(f"{place}: bare weights - give a run", code="no-card", key="checkpoint")
    if halved:
        state = {key: value.half() if value.ndim > 1 else value for key, value in load(content).items()}
        content = detector_bytes(output, state, card)
    run = folder_of(place)
    data = settings_of(place).get("data") or {}
    analysis = read_json(read_text(run / "eval" / "analysis.json"))
    analysis = analysis if isinstance(analysis, dict) and {"images", "objects"} <= analysis.keys() else {}
    name = run.resolve().name if place.is_dir() else place.stem
    files = folder_files(content, card, name=name, license=license, data=data, analysis=analysis)
    write_folder(output, files, overwrite=overwrite)
    return [f"written: {output}: {', '.join(files)}"]


def write_deepforest_folder(source: str, output: Path, plugins: list[str], *, overwrite: bool) -> list[str]:
    """A detector of ours as DeepForest takes it. Raises ConfigError for one that it cannot have."""
    import torch

    from retina.hub import located
    from retina.inference import find_weights
    from retina.interop.deepforest import as_deepforest
    from retina.model.weights import load_detector

    model, card = load_detector(find_weights(located(source)), torch.device("cpu"), plugins=plugins)
    thresholds = [one["threshold"] for one in card.operating_point.get("classes", [])]
    write_folder(output, as_deepforest(model.state_dict(), card, thresholds), overwrite=overwrite)
    return [f"in Python: deepforest.main.deepforest(config_args={{'model': {{'name': {str(output)!r}}}}})"]


def write_folder(output: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Raises ConfigError where one of the files is there already."""
    check_free(output, files, overwrite=overwrite)
    make_folder(output)
    for name, content in files.items():
        write_whole(output / name, content)


def check_free(output: Path, names: Any, *, overwrite: bool) -> None:
    taken = [name for name in names if os.path.lexists(output / name)]
    if taken and not overwrite:
        line = f"{output / taken[0]} is there already - give another folder, or overwrite=true"
        raise ConfigError(line, code="output-taken", key="output")
