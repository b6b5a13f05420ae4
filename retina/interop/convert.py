"""From a recognised checkpoint to tensors and settings of ours: its conventions are applied to its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights

from retina.errors import ConfigError, under
from retina.interop.foreign import (
    BOX_LAYER,
    CLASS_LAYER,
    FIRST_CONVOLUTION,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Conventions,
    Foreign,
    backbone_name,
    backbone_norm,
    changed_conventions,
    model_arguments,
    num_anchors,
    refusal,
    shape_of,
    some,
)
from retina.model.retinanet import RetinaNet, retinanet
from retina.model.weights import DetectorCard


@dataclass(frozen=True)
class Imported:
    """A detector of another program as one of ours."""

    state: dict[str, Tensor]
    card: DetectorCard
    notes: list[str]
    """Lines that say what was done."""


def convert_detector(
    foreign: Foreign,
    file: Path,
    *,
    classes: Sequence[str] | None = None,
    conventions: Mapping[str, Any] | None = None,
    ignore_unknown: bool = False,
) -> Imported:
    """The detector a checkpoint holds.

    classes: names of its class layer's rows, where the file does not say; of torchvision's also one name fewer, if
        the first row stands for the background.
    conventions: fields of `Conventions` that differ from the program's.
    ignore_unknown: leaves out tensors that mean nothing here, instead of refusing the file.

    Raises CheckpointError for tensors that are missing, unknown or of other shapes, ConfigError for conventions and
    classes that do not fit."""
    used = changed_conventions(_usual(foreign), conventions or {})
    state, norm_notes = _floats(foreign.state), []
    if used.norm_fixed:  # only a norm that may be trained counts its batches
        counts = [key for key in state if key.startswith("backbone.") and key.endswith(".num_batches_tracked")]
        state = {key: value for key, value in state.items() if key not in counts}
        norm_notes = [f"left out, because the backbone's statistics are fixed: {', '.join(counts)}"] if counts else []
    anchors = num_anchors(state, file, used)
    rows, ids, why = class_rows(foreign, file, state, anchors, classes)
    _apply(state, used, anchors, list(rows), file)
    arguments = model_arguments(state, file, used, num_classes=len(rows))
    with torch.device("meta"), under("conventions"):
        model = retinanet(**arguments)
    _check_cells(foreign, file, used, model)
    expected = model.state_dict()
    notes = _compare(foreign, file, state, expected, ignore_unknown=ignore_unknown)
    resize = ("short_side", "long_side", "pad_multiple")
    detection = ("score_threshold", "candidates_per_level", "nms_iou", "max_detections")
    card = DetectorCard(
        model=model.arguments,
        classes=list(rows.values()),
        category_ids=ids,
        preprocessing={name: getattr(used, name) for name in resize}
        | {"pad_value": [round(value) for value in used.mean], "precision": "fp32", "batch_size": 8},
        postprocess={name: getattr(used, name) for name in detection} | {"class_agnostic": False},
    )
    lines = [f"recognised: {foreign.program}, {len(foreign.names)} tensors", *foreign.notes]
    lines.append(f"conventions: {', '.join(f'{name} {value}' for name, value in asdict(used).items())}")
    names = ("backbone", "norm", "levels", "p6_from", "head_convs", "head_norm")
    lines.append(f"model: {', '.join(f'{name} {arguments[name]}' for name in names)}")
    lines += [*norm_notes, f"classes: {len(rows)}, {why}", *notes]
    return Imported({key: state[key].contiguous() for key in expected}, card, lines)


def convert_backbone(
    foreign: Foreign, file: Path, *, conventions: Mapping[str, Any] | None = None, ignore_unknown: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The ResNet a checkpoint holds: tensors under torchvision's names for RGB images with ImageNet's mean and std, the
    settings of `model` that go with it, and lines that say what was done.

    Raises as `convert_detector`, also for conventions that no backbone has."""
    for name, value in (conventions or {}).items():
        if value is not None and name not in _OF_BACKBONES:
            line = f"means nothing to {file}, a plain backbone - leave it out"
            raise ConfigError(line, code="no-use", key=f"conventions.{name}")
    used = changed_conventions(_usual(foreign), conventions or {})
    state = _floats(foreign.state)
    name = backbone_name(state, file)
    norm = backbone_norm(state)
    with torch.device("meta"):
        whole = retinanet(num_classes=1, backbone=name, norm=norm, stride_in_1x1=used.stride_in_1x1).state_dict()
    expected = {key: value for key, value in whole.items() if key.startswith("backbone.")}
    notes = _compare(foreign, file, state, expected, ignore_unknown=ignore_unknown)
    first = state[FIRST_CONVOLUTION].flip(1) if used.bgr else state[FIRST_CONVOLUTION]
    state[FIRST_CONVOLUTION] = first * (torch.tensor(IMAGENET_STD) / torch.tensor(used.std)).view(1, 3, 1, 1)
    lines = [f"recognised: {foreign.program}, {name}, {len(foreign.names)} tensors", *foreign.notes, *notes]
    if used.bgr or list(used.std) != list(IMAGENET_STD):
        lines.append("first convolution: made to take RGB with ImageNet's std")
    settings: dict[str, Any] = {"backbone": name, "mean": list(used.mean), "stride_in_1x1": used.stride_in_1x1}
    settings |= {"norm_eps": used.norm_eps} | ({"norm": norm} if norm == "group" else {})
    defaults = {"mean": list(IMAGENET_MEAN), "stride_in_1x1": False, "norm_eps": 1e-5}
    settings = {name: value for name, value in settings.items() if value != defaults.get(name)}
    tensors = {key: value.contiguous() for key, value in state.items() if key in expected}
    return {key.removeprefix("backbone.").removeprefix("stem."): v for key, v in tensors.items()}, settings, lines


_OF_BACKBONES = ("bgr", "mean", "std", "stride_in_1x1", "norm_eps")


def _usual(foreign: Foreign) -> Conventions:
    """Its program's conventions; only bottlenecks have a 1x1 convolution to stride in."""
    bottlenecks = "backbone.layer1.0.conv3.weight" in foreign.state
    return foreign.conventions if bottlenecks else replace(foreign.conventions, stride_in_1x1=False)


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _apply(state: dict[str, Tensor], conventions: Conventions, anchors: int, keep: Sequence[int], file: Path) -> None:
    """Turns the channels of the first convolution to RGB, and what is predicted for each anchor to our order and
    scale."""
    if conventions.bgr:
        shape_of(state, FIRST_CONVOLUTION, 4, file)
        state[FIRST_CONVOLUTION] = state[FIRST_CONVOLUTION].flip(1)
    order = torch.arange(anchors)
    if conventions.anchors_by_scale:
        order = order.view(len(conventions.anchor_scales), -1).T.flatten()
    for part, dimensions in (("weight", 4), ("bias", 1)):
        for layer in (CLASS_LAYER, BOX_LAYER):
            key = f"{layer}.{part}"
            rows = shape_of(state, key, dimensions, file)[0]
            if rows != len(state[f"{layer}.bias"]):
                raise refusal(file, f"{key} has {rows} rows, its bias has not - give another file", code="wrong-shape")
            value = state[key].unflatten(0, (anchors, -1))[order]
            if layer == CLASS_LAYER:
                value = value[:, list(keep)]
            else:
                value = value * torch.tensor(conventions.delta_std).view(1, 4, *[1] * (dimensions - 1))
            state[key] = value.flatten(0, 1)


def _check_cells(foreign: Foreign, file: Path, conventions: Conventions, model: RetinaNet) -> None:
    """Raises ConfigError if the anchors that a file holds are others than ours will be."""
    if foreign.cell_anchors is None:
        return
    cells = [model.anchors.cell(size) for size in model.anchors.sizes]
    if conventions.anchors_by_scale:
        split = len(conventions.anchor_ratios), len(conventions.anchor_scales)
        cells = [cell.unflatten(0, split).transpose(0, 1).flatten(0, 1) for cell in cells]
    stored = foreign.cell_anchors
    same_shapes = [cell.shape for cell in cells] == [cell.shape for cell in stored]
    if not same_shapes or not torch.allclose(torch.cat(cells), torch.cat(stored).double(), rtol=1e-5, atol=1e-3):
        problem = f"{file} holds other anchors - give the sizes, scales and ratios that it was trained with"
        raise ConfigError(problem, code="anchors", key="conventions.anchor_sizes")


def _compare(
    foreign: Foreign, file: Path, state: dict[str, Tensor], expected: dict[str, Tensor], *, ignore_unknown: bool
) -> list[str]:
    """Lines about the tensors that are not taken over. Raises CheckpointError for missing ones and other shapes, and
    for those that mean nothing here."""
    missing = [key for key in expected if key not in state]
    unknown = [*foreign.unknown, *(foreign.names.get(key, key) for key in state if key not in expected)]
    if missing:
        strange = f", and {len(unknown)} mean nothing here: {some(unknown)}" if unknown else ""
        problem = f"lacks {len(missing)} tensors, here {some(missing)}{strange} - give the whole state dict of a model"
        raise refusal(file, problem, code="missing-tensor", lacking=missing, unknown=unknown)
    for key, value in expected.items():
        if value.shape != state[key].shape:
            shapes = f"is {list(state[key].shape)}, not {list(value.shape)} as in the model its other tensors make"
            raise refusal(file, f"{foreign.names.get(key, key)} {shapes} - give another file", code="wrong-shape")
    if unknown and not ignore_unknown:
        problem = f"{len(unknown)} tensors mean nothing here, so it may be another model: {some(unknown)}"
        fix = "ignore_unknown=true leaves them out and lists them"
        raise refusal(file, f"{problem} - {fix}", code="unknown-tensor", unknown=unknown)
    lines = [f"left out, unknown here: {', '.join(unknown)}"] if unknown else []
    for reason in dict.fromkeys(foreign.unused.values()):
        keys = [key for key, why in foreign.unused.items() if why == reason]
        lines.append(f"left out, {reason}: {', '.join(keys)}")
    return lines


def coco_rows() -> list[str | None]:
    """COCO's name of category 0, 1, 2, ... 90, as torchvision lists them; None where there is none (0 is torchvision's
    background)."""
    names = RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return [None if name in ("__background__", "N/A") else name for name in names]


def class_rows(
    foreign: Foreign, file: Path, state: dict[str, Tensor], anchors: int, classes: Sequence[str] | None
) -> tuple[dict[int, str], list[int], str]:
    """The rows of the class layer that are kept for each anchor and their names, the category id of each, and where the
    names come from."""
    (total,) = shape_of(state, f"{CLASS_LAYER}.bias", 1, file)
    count, rest = divmod(total, anchors)
    if rest or not count:
        problem = f"{total} class logits per cell for {anchors} anchors - give another file"
        raise refusal(file, problem, code="wrong-shape")
    coco = coco_rows()
    names: list[str | None]
    if classes is not None:
        names = list(classes)
        if foreign.background_first and len(names) == count - 1:
            names = [None, *names]
        if len(names) != count:
            line = f"{len(names)} names for {count} classes of {file} - name them all, in its order"
            raise ConfigError(line, code="classes", key="classes")
        why = "as given"
    elif foreign.classes is not None and len(foreign.classes) == count:
        names, why = foreign.classes, "as the file says"
    elif foreign.background_first and count == len(coco):
        names, why = coco, "COCO's by their category ids; rows of the background and of ids COCO does not use left out"
    elif count == 80:
        names, why = [name for name in coco if name], "COCO's, because there are 80"
    else:
        names, why = [f"class {k}" for k in range(count)], "numbered: the file does not name them, give classes=[...]"
    rows = {row: name for row, name in enumerate(names) if name is not None}
    if len(set(rows.values())) < len(rows):
        raise ConfigError(
            f"some of {file} have the same name - give {count} different names", code="classes", key="classes"
        )
    is_coco = set(rows.values()) <= set(coco) and count in (80, len(coco))
    return rows, [coco.index(name) if is_coco else foreign.first_id + row for row, name in rows.items()], why
