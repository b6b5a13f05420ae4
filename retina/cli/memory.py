"""Whether a run fits into memory and a day, said before its first step. Beside the road."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from retina.cli.compose import Settings
from retina.cli.data import PADDING
from retina.engine.plan import Choice, clock
from retina.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from retina.data.annotations import Annotations
    from retina.engine.checkpointer import TrainState
    from retina.engine.logging import RunLogger

SURE = 1.4
"""The estimate of memory was 0.94 to 1.39 of what was used: what is so much larger than there is, will not fit."""
AMPLE = 4e9, 20_000
"""Bytes, and bytes per pixel of all images, that no usual network reaches (a ResNet-50 takes 1,300): where there are so
many, nothing is counted, which would take half a second."""
LONG = 3600.0
"""Seconds from which a run on a CPU is called long before it starts."""


def in_memory(
    settings: Settings, annotations: "Annotations", device: "torch.device", recorder: "RunLogger", *, may_choose: bool
) -> list[Choice]:
    """Nothing, or where a step would need more memory than there is, the micro-batches with which it does not. Every
    rank must call it.

    Raises ConfigError for a step that will not fit; one that may not is warned of."""
    from retina import distributed
    from retina.engine.probe import free_bytes, step_bytes
    from retina.precision import chosen_precision

    train = settings["train"]
    canvas = largest_canvas(settings, annotations)
    most_objects = int((annotations.offsets[1:] - annotations.offsets[:-1]).max(initial=0))
    batch = train["batch_size"] // distributed.world_size()
    if batch < 1 or batch % train["accumulate"]:  # the sampler has a word for that
        return []
    frees = [free for free in distributed.gather_objects(free_bytes(device)) if free is not None]
    if not frees:
        return []
    free = min(frees)
    if AMPLE[0] + AMPLE[1] * batch // train["accumulate"] * canvas[0] * canvas[1] < free:
        return []
    precision = chosen_precision(train["precision"], device)
    model, needs = on_meta(settings, annotations), dict[int, int]()
    for accumulate in (n for n in range(train["accumulate"], batch + 1) if batch % n == 0):
        try:
            images = (batch // accumulate, *canvas)
            needs[accumulate] = step_bytes(model, images, objects=most_objects, precision=precision)
        except (RuntimeError, TypeError):  # parts of plugins may need values, which meta tensors have not
            return []
        if fits := needs[accumulate] < 0.9 * free:
            break
    first, need = train["accumulate"], needs[train["accumulate"]]
    if fits and accumulate == first:
        return []
    if may_choose and accumulate != first and needs[accumulate] < SURE * free:
        reason = f"{need / 1e9:.1f} GB would be needed at once, {free / 1e9:.1f} are free"
        return [Choice("train.accumulate", accumulate, reason)]
    problem = f"{batch // first} images of {canvas[0]}x{canvas[1]} at once need about {need / 1e9:.1f} GB"
    fix = f"{f'train.accumulate={accumulate} or ' if fits else ''}a smaller data.short_side and data.long_side"
    problem = f"{problem}, and {free / 1e9:.1f} GB are free - give {fix}"
    if need > SURE * free and _has_usual_sizes(settings):
        raise ConfigError(problem, code="too-little-memory", key="train.batch_size")
    recorder.warn(problem)
    return []


def _has_usual_sizes(settings: Settings) -> bool:
    """Whether no transform of another package may make images smaller than the settings say."""
    sections = [section for section in settings["augment"].values() if section]
    return all(str(section["_target_"]).startswith("retina.") for section in sections)


def on_meta(settings: Settings, annotations: "Annotations") -> Any:
    """The detector without memory, with the norms and frozen stages that its weights will bring."""
    import torch

    from retina.cli.build import call
    from retina.model.retinanet import retinanet

    arguments = dict(settings["model"])
    if arguments.pop("weights", None):
        usual = {"norm": "frozen", "frozen_stages": 2}
        arguments |= {key: value for key, value in usual.items() if arguments[key] is None}
    with torch.device("meta"):
        return call(retinanet, "model", **arguments, num_classes=len(annotations.classes), plugins=settings["plugins"])


def largest_canvas(settings: Settings, annotations: "Annotations") -> tuple[int, int]:
    """(height, width) of the largest that a batch may have: upright and wide images are never in the same batch."""
    data, coarsest = settings["data"], 2 ** max(settings["model"]["levels"])
    stride = data["pad_multiple"] or (coarsest if settings["model"].get("canvas_strides") else min(coarsest, PADDING))
    if data["canvases"]:
        height, width = max(data["canvases"], key=lambda canvas: canvas[0] * canvas[1])
        return height, width
    padded = np.ceil(_resized(settings, annotations).round() / stride).astype(int) * stride
    upright = np.sign(annotations.sizes[:, 1] - annotations.sizes[:, 0])
    canvases = [padded[upright == side].max(axis=0) for side in np.unique(upright)]
    height, width = max(canvases, key=lambda canvas: canvas[0] * canvas[1]).tolist()
    return height, width


def _resized(settings: Settings, annotations: "Annotations") -> Float64[np.ndarray, "N 2"]:
    """(height, width) of the images as an evaluation sees them."""
    sizes, data = annotations.sizes, settings["data"]
    scale = np.minimum(data["short_side"] / sizes.min(axis=1), data["long_side"] / sizes.max(axis=1))
    return sizes * scale[:, None]


def describe_duration(
    settings: Settings, annotations: "Annotations", state: "TrainState", steps: int, advice: str
) -> str:
    """How long a run takes on a CPU, and what would make it shorter if that is long; empty where nobody knows."""
    from retina.engine.probe import seconds_per_pixel

    if state.device.type != "cpu" or settings["budget"]:
        return ""
    try:
        pixel = seconds_per_pixel(state.model, largest_canvas(settings, annotations), state.dtype)
    except (RuntimeError, TypeError):  # parts of plugins may want other images
        return ""
    image = float(_resized(settings, annotations).prod(axis=1).mean())
    seconds = pixel * image * steps * state.config.batch_size
    return f"about {clock(seconds)} on this CPU, evaluations not counted{f' - {advice}' if seconds > LONG else ''}"
