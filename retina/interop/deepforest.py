"""DeepForest's published folders, in and out: `config.json` beside `model.safetensors`.

Conventions (weecology/DeepForest 2.1, deepforest/models/retinanet.py): torchvision's `retinanet_resnet50_fpn` with
frozen norms of eps 1e-5 and P6 of P5, classes without a background, label_dict from a class name to its row, one score
threshold for all classes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from retina.errors import CheckpointError, ConfigError
from retina.interop.convert import Imported, convert_detector
from retina.interop.foreign import Conventions
from retina.interop.read import read_foreign
from retina.interop.torchvision import check_export, to_torchvision
from retina.model.weights import DetectorCard, serialize
from retina.schema import check_type, parse_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TYPES: Mapping[str, Any] = {"label_dict": dict[str, int], "score_thresh": float, "nms_thresh": float}


def is_deepforest(folder: Path) -> bool:
    """Whether a folder says of itself what DeepForest's do."""
    try:
        return "label_dict" in parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_deepforest(folder: Path) -> Imported:
    """The detector of a folder, with its classes and thresholds.

    Raises CheckpointError for a description that is none, and as `read_foreign` and `convert_detector` do."""
    file = folder / CONFIG
    try:
        values = parse_json(file.read_bytes())
        for name, hint in _TYPES.items():
            if name not in values:
                raise ConfigError("is missing", code="bad-header", key=name)
            check_type(values[name], hint, name)
    except ConfigError as fault:
        raise CheckpointError(f"{file}: {fault} - restore it from a copy", code="bad-header") from None
    except (OSError, ValueError, TypeError, RecursionError) as fault:
        raise CheckpointError(f"{file}: cannot be read ({fault}) - fetch it again", code="unreadable-file") from None
    labels = values["label_dict"]
    names = sorted(labels, key=lambda name: labels[name])
    if [labels[name] for name in names] != list(range(len(names))):
        problem = f"label_dict {labels} does not count its classes from 0"
        raise CheckpointError(f"{file}: {problem} - restore it from a copy", code="bad-header")
    thresholds = {"score_threshold": float(values["score_thresh"]), "nms_iou": float(values["nms_thresh"])}
    for name, value in thresholds.items():
        if not 0 <= value < 1:
            raise CheckpointError(f"{file}: {name} is {value} - restore it from a copy", code="bad-header")
    foreign = read_foreign(folder / WEIGHTS)
    return convert_detector(foreign, folder / WEIGHTS, classes=names, conventions={**thresholds, "max_detections": 300})


def as_deepforest(state: Mapping[str, Tensor], card: DetectorCard, thresholds: list[float]) -> dict[str, bytes]:
    """The files of a folder that DeepForest takes as the name of a model.

    thresholds: of each class at the operating point, of which the lowest is taken; none: that of the postprocess.

    Raises ConfigError for a detector that DeepForest cannot have."""
    check_export(card.model, card.postprocess)
    usual = Conventions()
    needed: dict[str, Any] = {
        "backbone": "resnet50",
        "fpn_channels": 256,
        "p6_from": "p5",
        "head_norm": None,
        "norm_eps": usual.norm_eps,
        "anchor_sizes": None,
        "anchor_scales": list(usual.anchor_scales),
        "anchor_ratios": list(usual.anchor_ratios),
        "anchors_rounded": True,
        "canvas_strides": True,
        "mean": list(usual.mean),
        "std": list(usual.std),
    }
    for name, only in needed.items():
        if (value := card.model[name]) != only:
            line = f"{value} - DeepForest's RetinaNet has {only} and nothing else; start from its weights (init_from)"
            raise ConfigError(line, code="not-in-deepforest", key=f"model.{name}")
    if card.model["norm"] not in ("batch", "frozen"):
        line = f"{card.model['norm']} - DeepForest's RetinaNet has BatchNorm"
        raise ConfigError(line, code="not-in-deepforest", key="model.norm")
    config = {
        "num_classes": len(card.classes),
        "nms_thresh": card.postprocess.get("nms_iou", 0.5),
        "score_thresh": min(thresholds, default=card.postprocess.get("score_threshold", 0.05)),
        "label_dict": {name: label for label, name in enumerate(card.classes)},
    }
    tensors = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    return {
        WEIGHTS: serialize(to_torchvision(tensors), {"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
