"""After an evaluation in which next to nothing was found: what is to be seen, and the likeliest cause."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retina.data.images import read_image
from retina.errors import DataError
from retina.files import read_plain
from retina.schema import parse_json

if TYPE_CHECKING:
    from torch import nn

    from retina.data.annotations import Annotations
    from retina.engine.checkpointer import Checkpointer
    from retina.evaluation.evaluate import Evaluation

_IMAGES = 8
"""That are looked at."""


def explain(
    checkpointer: "Checkpointer",
    model: "nn.Module",
    train: "Annotations",
    val: "Annotations",
    evaluation: "Evaluation",
) -> str:
    """A warning where AP is near zero after an epoch and the cause is plain; else empty."""
    from retina.evaluation.near_zero import NEAR_ZERO, Evidence, describe, likely_causes

    state, card = checkpointer.state, checkpointer.card
    value, step = evaluation.metrics["AP"], state.progress.step
    early = step * state.config.batch_size < len(train)
    if early or value is None or value >= NEAR_ZERO or card is None or checkpointer.folder is None:
        return ""
    origin: Any = model.anchors([(1, 1)] * len(model.strides), model.strides, "cpu")  # type: ignore[operator,arg-type]
    anchors = np.concatenate([(level[:, 2:] - level[:, :2]).double().numpy() for level in origin])
    records = _records(checkpointer.folder / "metrics.jsonl")
    evidence = Evidence(
        train=train,
        val=val,
        detections=evaluation.detections,
        anchors=anchors,
        sides=(card.preprocessing["short_side"], card.preprocessing["long_side"]),
        inputs=normalised(train, model),
        history=[record for record in records if record.get("kind") == "train"],
    )
    findings = likely_causes(evidence)
    return describe(findings, value, step) if findings else ""


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        lines = read_plain(file).splitlines()
    except OSError:
        return []
    return [parse_json(line) for line in lines if line.endswith(b"}")]


def normalised(split: "Annotations", model: "nn.Module") -> tuple[float, float]:
    """Mean and standard deviation of some images as the model sees them, of the channel where they are oddest."""
    values = []
    for index in np.unique(np.linspace(0, len(split) - 1, _IMAGES).round().astype(int)).tolist():
        try:
            image = read_image(split.path(index), pixels=split.pixels)
        except DataError:
            continue
        values.append(image.reshape(-1, image.shape[-1])[:: max(1, image.size // 300_000)].astype(np.float64))
    if not values:
        return 0.0, 1.0
    pixels = np.concatenate(values)
    mean, std = (getattr(model, name).double().cpu().numpy().reshape(-1) for name in ("mean", "std"))
    means, spreads = (pixels.mean(axis=0) - mean) / std, pixels.std(axis=0) / std
    return float(means[np.abs(means).argmax()]), float(spreads[np.abs(np.log(spreads + 1e-9)).argmax()])
