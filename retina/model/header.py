"""What the header of a weights file may say: one schema for every value and the sizes it implies. Beside the road.

Nothing is built from a header that breaks it, so no value of a stranger costs memory or time."""

import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.nn.modules import module

from retina.errors import CheckpointError, ConfigError, check
from retina.model.retinanet import retinanet
from retina.model.timm_backbone import PREFIX
from retina.schema import GOALS, MOST_PADDING, MOST_PIXELS, check_type
from retina.types import DTYPES

LAST_STEP = 10**12
MOST_LAYERS = 15_000
"""Parameters, buffers and modules that are made to find out what a header implies; timm's largest networks have half as
many."""
MOST_BUFFERS = 1 << 30
"""Bytes of buffers that a model may have and its file not hold, such as tables of positions."""

_INPUTS = ("backbone.stem.conv1.weight", "backbone.features.0.0.weight")
"""The first convolution of our own backbones."""

Rule = tuple[Any, Callable[[Any], bool]]
"""The type of a value, and whether a value of that type is allowed."""


def _within(low: int, high: int | float) -> Callable[[Any], bool]:
    return lambda value: value is None or low <= value <= high  # NaN is not


PREPROCESSING: Mapping[str, Rule] = {
    "short_side": (int, _within(1, MOST_PIXELS)),
    "long_side": (int | None, _within(1, MOST_PIXELS)),
    "pad_multiple": (int, _within(1, MOST_PADDING)),
    "pad_value": (list[int], lambda value: 1 <= len(value) <= 256 and all(0 <= v <= 255 for v in value)),
    "precision": (str, lambda value: value in DTYPES),
    "batch_size": (int, _within(1, 1 << 16)),
}
OPTIONAL: Mapping[str, Rule] = {
    "value_range": (list[int], lambda value: len(value) == 2 and 0 <= value[0] < value[1] <= 65535),
    "tile": (list[int], lambda value: len(value) == 2 and all(16 <= side < 1 << 15 for side in value)),
    "tile_overlap": (float, _within(0, 0.9)),
    "tile_whole": (bool, lambda value: True),
}
"""Of preprocessing, what earlier versions do not write."""
POSTPROCESS: Mapping[str, Rule] = {
    "score_threshold": (float, lambda value: 0 <= value < 1),
    "candidates_per_level": (int, _within(1, 2**31 - 1)),
    "nms_iou": (float, _within(0, 1)),
    "max_detections": (int, _within(1, 2**31 - 1)),
    "class_agnostic": (bool, lambda value: True),
}


_ESTIMATES: Mapping[str, Rule] = {
    name: (list[float] | None, lambda value: value is None or (len(value) == 3 and all(0 <= x < 1e9 for x in value)))
    for name in ("precision", "recall", "false_alarms", "count_error")
}
_OF_CLASS: Mapping[str, Rule] = {
    "threshold": (float, lambda value: 0 <= value < 1),
    "pooled": (bool, lambda value: True),
    "reached": (bool, lambda value: True),
    "num_objects": (int, _within(0, LAST_STEP)),
    **_ESTIMATES,
}
_OPERATING_POINT: Mapping[str, Rule] = {
    "goal": (str, lambda value: value in GOALS),
    "target": (float | None, lambda value: value is None or 0 <= value < 1e9),
    "num_images": (int, _within(0, LAST_STEP)),
    "classes": (list[dict[str, Any]], lambda value: True),
    "overall": (dict[str, Any], lambda value: True),
}


def check_header(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raises ConfigError for the first value of a header that a detector cannot have. Integers become floats where
    those are asked for.

    hints: the types of its fields. Settings of later versions in `preprocessing` are ignored; other functions would not
    know what to do with an unknown one."""
    for name, hint in hints.items():
        check(name in values, name, None, "it is missing")
        check_type(values[name], hint, name)
    model, classes = values["model"], values["classes"]
    arguments = get_type_hints(retinanet)
    for name, value in model.items():
        check(name in arguments, f"model.{name}", value, "there is no such setting")
        check_type(value, arguments[name], f"model.{name}")
        check(_is_finite(value), f"model.{name}", value, "give finite numbers")
        model[name] = _as_floats(value, arguments[name])
    pad_value, channels = values["preprocessing"].get("pad_value"), len(model.get("mean", "RGB"))
    if isinstance(pad_value, list):
        check(len(pad_value) == channels, "preprocessing.pad_value", pad_value, f"the model's mean has {channels}")
    num_classes = model.get("num_classes", len(classes))
    check(num_classes == len(classes), "model.num_classes", num_classes, f"there are {len(classes)} classes")
    ids = values["category_ids"]
    check(len(set(ids)) == len(ids) <= len(classes), "category_ids", ids, "give an id for each class")
    check(0 <= values["step"] <= LAST_STEP, "step", values["step"], f"give 0 to {LAST_STEP}")
    check(all(map(_is_finite, values["metrics"].values())), "metrics", values["metrics"], "give finite numbers")
    if point := values["operating_point"]:
        _check_record(point, _OPERATING_POINT, "operating_point")
        check(len(point["classes"]) == len(classes), "operating_point.classes", len(point["classes"]), "one per class")
        for label, one in enumerate(point["classes"]):
            _check_record(one, _OF_CLASS, f"operating_point.classes.{label}")
        _check_record(point["overall"], _ESTIMATES, "operating_point.overall")
    for section, rules in (("preprocessing", {**PREPROCESSING, **OPTIONAL}), ("postprocess", POSTPROCESS)):
        for name, value in values[section].items():
            if name in rules:
                hint, allows = rules[name]
                check_type(value, hint, f"{section}.{name}")
                check(allows(value), f"{section}.{name}", value, "it is out of range")
                values[section][name] = _as_floats(value, hint)
            elif section == "postprocess":
                check(False, f"{section}.{name}", value, "there is no such setting")


def _check_record(record: dict[str, Any], rules: Mapping[str, Rule], key: str) -> None:
    """Raises ConfigError for the first value that is missing, unknown, of the wrong type or not allowed."""
    for name in record:
        check(name in rules, f"{key}.{name}", record[name], "there is no such value")
    for name, (hint, allows) in rules.items():
        check(name in record, f"{key}.{name}", None, "it is missing")
        check_type(record[name], hint, f"{key}.{name}")
        check(allows(record[name]), f"{key}.{name}", record[name], "it is out of range")
        record[name] = _as_floats(record[name], hint)


def _as_floats(value: Any, hint: Any) -> Any:
    if "float" not in str(hint):
        return value
    if isinstance(value, list):
        return [_as_floats(item, hint) for item in value]
    return float(value) if isinstance(value, int) else value


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_sizes(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raises ConfigError for the first setting of our own neck and head that contradicts the sizes of the tensors.

    It bounds what building the model costs: no layer is made that the file has no tensor for. ResNets have fixed sizes;
    of parts of other packages see `model_on_meta`."""
    if "num_classes" not in arguments:
        raise ConfigError("is missing", code="other-model", key="num_classes")
    parameters = inspect.signature(retinanet).parameters.values()
    settings = {parameter.name: parameter.default for parameter in parameters} | dict(arguments)
    cell = len(settings["anchor_scales"]) * len(settings["anchor_ratios"])
    numbers: list[tuple[str, int, int]] = []  # setting, what it implies, what the tensors have
    inputs = [state[name].shape[1] for name in _INPUTS if name in state and state[name].ndim == 4]
    if isinstance(settings["backbone"], str) and inputs:
        numbers.append(("mean", len(settings["mean"]), inputs[0]))
    if isinstance(settings["neck"], str):
        numbers.append(("fpn_channels", settings["fpn_channels"], _rows(state, "fpn.output.0.weight")))
        numbers.append(("levels", len(settings["levels"]), _count(state, r"fpn\.(output|extra)\.\d+\.weight", 4)))
    if settings.get("head") == "task_aligned":
        layers = _count(state, r"head\.convs\.\d+\.conv\.weight", 4)
        numbers.append(("head_convs", settings["head_convs"], layers))
        channels = settings["head_channels"] or settings["fpn_channels"]
        numbers.append(("head_channels", channels, _rows(state, "head.convs.0.conv.weight")))
        numbers.append(("num_classes", settings["num_classes"], _rows(state, "head.classification.predict.weight")))
    elif settings.get("head") is None:
        channels = settings["head_channels"] or settings["fpn_channels"]
        towers = ("head.classification", "head.box")
        for tower, outputs in zip(towers, (settings["num_classes"], 4 * (settings["box_bins"] or 1)), strict=True):
            layers = _count(state, rf"{re.escape(tower)}\.convs\.\d+\.weight", 4)
            numbers.append(("head_convs", settings["head_convs"], layers))
            if layers:
                numbers.append(("head_channels", channels, _rows(state, f"{tower}.convs.0.weight")))
            name = "num_classes" if tower == towers[0] else "box_bins"
            numbers.append((f"{name} x anchors", outputs * cell, _rows(state, f"{tower}.predict.weight")))
    for name, implied, present in numbers:
        if implied != present:
            raise ConfigError(f"implies {implied}, its tensors have {present}", code="other-model", key=name)


def model_on_meta(arguments: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Names and shapes of the tensors of a model with parts of timm or of plugins, made without memory for them; None
    for a model of our own parts, and for one whose parts need values, which meta tensors have not.

    Raises ConfigError for more layers than any detector has, and what `retinanet` raises."""
    parts = [arguments.get(name) for name in ("backbone", "neck", "head")]
    if not any(isinstance(part, Mapping) or str(part).startswith(PREFIX) for part in parts):
        return None
    try:
        with torch.device("meta"), _few_layers():
            model = retinanet(**arguments)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    state = model.state_dict()
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in state)
    check(buffers <= MOST_BUFFERS, "buffers", buffers, f"give parts with at most {MOST_BUFFERS} bytes of them")
    return state


def check_tensors(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path) -> None:
    """Raises CheckpointError naming the first tensor of the `file` that is missing, unknown or of another shape."""
    for key in {**expected, **state}:
        if key not in state:
            problem = f"lacks {key}"
        elif key not in expected:
            problem = f"has an unknown {key}"
        elif expected[key].shape != state[key].shape:
            problem = f"{key} is {list(state[key].shape)}, the model needs {list(expected[key].shape)}"
        else:
            continue
        fix = "weights of another architecture - use the model settings they were trained with"
        raise CheckpointError(f"{file}: {problem}: {fix}", code="other-model")


@contextmanager
def _few_layers() -> Iterator[None]:
    """Raises ConfigError for the parts of a model that this thread makes within the block, from a number on."""
    thread, made = threading.get_ident(), 0

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > MOST_LAYERS:
            problem = f"implies more than {MOST_LAYERS} layers - take another copy of the file"
            raise ConfigError(problem, code="other-model", key="model")

    with ExitStack() as hooks:
        for kind in ("parameter", "buffer", "module"):
            hooks.callback(getattr(module, f"register_module_{kind}_registration_hook")(count).remove)
        yield


def _rows(state: Mapping[str, Tensor], name: str) -> int:
    return state[name].shape[0] if name in state and state[name].ndim else 0


def _count(state: Mapping[str, Tensor], pattern: str, ndim: int) -> int:
    return sum(tensor.ndim == ndim and re.fullmatch(pattern, name) is not None for name, tensor in state.items())
