"""Settings that a command leaves open, chosen from its data, device and budget (retina/engine/plan.py has the rules).

Beside the road.

What is chosen is written into the run's config.yaml, both in its place and under `chosen`. The same command again
takes it from there: nothing is measured twice, so a run that was cut off goes on bit for bit.
"""

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retina.cli.compose import Settings, typed_keys
from retina.cli.data import DataConfig, as_seen, with_tile
from retina.cli.memory import in_memory
from retina.cli.run_folder import SETTINGS, holds_work, read_settings
from retina.data.channels import RGB
from retina.engine.config import from_mapping
from retina.engine.plan import (
    Choice,
    Facts,
    clock,
    is_given,
    plan,
    plan_pixels,
    steps_in,
    to_seconds,
    with_values,
)
from retina.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from retina.cli.assemble import Parts
    from retina.data.annotations import Annotations
    from retina.engine.deadline import Deadline
    from retina.engine.logging import RunLogger

AUTO = "auto"
PIXELS_OF = 64
"""Images that mean and standard deviation are measured on."""


class Command(NamedTuple):
    """What the planning starts from."""

    settings: Settings
    typed: frozenset[str]
    """Keys that the command gives."""
    started: float
    """`time.monotonic()` at its start, from when a budget counts."""

    @classmethod
    def begin(cls, settings: Settings) -> "Command":
        left_open = {"data.tile"} if settings["data"]["tile"] == AUTO else set()
        return cls(settings, typed_keys() - left_open, time.monotonic())

    @property
    def plans(self) -> bool:
        """Whether something is chosen: by `auto`, by a budget, for tiles, or measured on images that are not RGB."""
        data = self.settings["data"]
        chosen = data["channels"] != RGB or data["tile"] == AUTO
        return bool(self.settings["auto"] or self.settings["budget"] or chosen)

    def left(self) -> float | None:
        budget = to_seconds(self.settings["budget"])
        return None if budget is None else budget - (time.monotonic() - self.started)

    def deadline(self, **options: Any) -> "Deadline | None":
        from retina.engine.deadline import Deadline

        budget = to_seconds(self.settings["budget"])
        return None if budget is None else Deadline(budget, self.started, **options)


def check_budget(settings: Settings, typed: frozenset[str]) -> None:
    """Raises ConfigError for a budget that is no time, or beside a length."""
    if to_seconds(settings["budget"]) is not None and is_given("train.length", typed):
        problem = "decides train.length, which is given too - leave one of them out"
        raise ConfigError(problem, code="contradiction", key="budget")


def remembered(folder: Path, command: Command) -> Settings:
    """The settings with what was chosen when the run in this folder began, if it has got anywhere."""
    file = folder / SETTINGS
    if not (command.plans and file.is_file() and holds_work(folder)) or command.settings["overwrite"]:
        return command.settings
    chosen = read_settings(file).get("chosen")
    if not isinstance(chosen, dict):
        return command.settings
    open_keys = {key: value for key, value in chosen.items() if not is_given(key, command.typed)}
    try:
        return with_values(command.settings, open_keys) | {"chosen": chosen}
    except (KeyError, TypeError):
        fix = "choose another name=..., or overwrite=true to discard that run"
        raise ConfigError(f"{file}: is damaged - {fix}", code="damaged-settings") from None


def planned(
    command: Command,
    annotations: "Annotations",
    device: "torch.device",
    assemble: "Callable[[Settings], Parts]",
    recorder: "RunLogger",
) -> Settings:
    """The settings with what is chosen for a run that begins; the recorder gets the table. Every rank must call it.

    assemble: the model and loaders of settings, for a trial of some steps.

    Raises ConfigError for a budget that is too small, and where not even one image fits into memory."""
    from retina import distributed

    tiles = choose_tiles(command.settings, annotations)
    command = command._replace(settings=changed(command.settings, tiles))
    data = from_mapping(DataConfig, command.settings["data"], "data")
    seen = as_seen(data, annotations, with_objects=True)
    facts = facts_of(command.settings, seen, device, annotations)

    def choose(facts: Facts) -> "tuple[list[Choice], Parts]":
        choices = (plan if command.settings["auto"] else plan_pixels)(facts, command.settings, command.typed)
        settings = changed(command.settings, choices)
        choices += in_memory(settings, seen, device, recorder, may_choose=may_accumulate(command))
        return choices, assemble(changed(settings, choices))

    choices, parts = choose(facts)
    if command.settings["budget"]:
        seconds, size = parts.seconds_per_step(command.left()), parts.pixels_per_step
        left = distributed.broadcast_object(command.left())
        choices, parts = choose(replace(facts, seconds=max(1.0, left or 0.0), pixels_per_second=size / seconds))
        if parts.pixels_per_step != size:
            seconds = parts.seconds_per_step(command.left())
        choices.append(length_in(distributed.broadcast_object(command.left()) or 0.0, seconds, parts))
    settings, choices = changed(command.settings, choices), tiles + choices
    # a copy, because what stands in two places would be written as an alias, which no run's file may have
    chosen = copy.deepcopy({choice.key: choice.value for choice in choices})
    for line in table(choices):
        recorder.info(line)
    if facts.few and not facts.pretrained and command.settings["auto"]:
        recorder.info(
            "few images go further with ImageNet's weights: model.weights=DEFAULT; offline see docs/weights.md"
        )
    return settings | {"chosen": chosen}


def choose_tiles(settings: Settings, annotations: "Annotations") -> list[Choice]:
    """Raises ConfigError for tiles that are larger than all images."""
    data = from_mapping(DataConfig, settings["data"], "data")
    tile = with_tile(data, annotations).tile
    if data.tile != AUTO:
        return []
    what = "the smallest objects would be lost in whole images" if tile else "objects are large enough in whole images"
    return [Choice("data.tile", tile, what)]


def changed(settings: Settings, choices: list[Choice]) -> Settings:
    return with_values(settings, {choice.key: choice.value for choice in choices})


def shorter(settings: Settings) -> str:
    """What would make the run shorter, whatever else is chosen."""
    return "shorter with " + ("a smaller budget" if settings["budget"] else "budget=1h, a smaller data.short_side")


def length_in(left: float, seconds: float, parts: "Parts") -> Choice:
    """As many steps as fit into what is left."""
    evaluations = parts.evaluations
    # forward alone, in batches like those of training, then NMS and metrics
    evaluation = 0.5 * seconds * parts.evaluated_images / parts.config.batch_size
    steps = steps_in(left, step=seconds, evaluation=evaluation, evaluations=max(1, evaluations))
    epochs = steps * parts.config.batch_size / parts.images
    return Choice("train.length", steps, f"{clock(left)} left, {seconds:.2g} s for each step: {epochs:.1f} epochs")


def facts_of(settings: Settings, annotations: "Annotations", device: "torch.device", images: "Annotations") -> Facts:
    """annotations: of what the detector sees, `images` or their tiles."""
    import numpy as np

    from retina import distributed
    from retina.precision import native_bf16

    counts = np.diff(annotations.offsets)
    is_object = ~annotations.crowd
    image_of = np.repeat(np.arange(len(annotations)), counts)
    pairs = np.unique(np.stack((annotations.labels[is_object], image_of[is_object])), axis=1)
    shares = np.bincount(pairs[0], minlength=len(annotations.classes)) / len(annotations)
    pretrained = bool(settings["model"]["weights"] or settings["init_from"])
    channels = settings["data"]["channels"]
    measure = (settings["auto"] and not pretrained) or channels != RGB
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Facts(
        image_sizes=annotations.sizes,
        objects=annotations.boxes[is_object, 2:] - annotations.boxes[is_object, :2],
        image_of=image_of[is_object],
        shares=shares,
        pretrained=pretrained,
        device=device.type,
        bf16=native_bf16(device),
        cores=max(1, cores // max(1, distributed.launched_number("LOCAL_WORLD_SIZE"))),
        processes=distributed.world_size(),
        mean_std=distributed.on_main(lambda: mean_and_std(images)) if measure else None,
        channels=channels,
    )


def mean_and_std(annotations: "Annotations") -> tuple[list[float], list[float]] | None:
    """Per channel, over some images; None where none of them can be read."""
    import numpy as np

    from retina.data.images import read_image

    channels = annotations.pixels.channels
    sums, squares, pixels = np.zeros(channels), np.zeros(channels), 0
    for row in np.unique(np.linspace(0, len(annotations) - 1, PIXELS_OF).astype(int)).tolist():
        try:
            image = read_image(annotations.path(row), pixels=annotations.pixels)
            values = image[::2, ::2].reshape(-1, channels).astype(np.float64)
        except DataError:  # the loader says so
            continue
        sums, squares, pixels = sums + values.sum(axis=0), squares + (values**2).sum(axis=0), pixels + len(values)
    if not pixels:
        return None
    mean = sums / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1.0))
    return mean.round(1).tolist(), std.round(1).tolist()


def may_accumulate(command: Command) -> bool:
    return bool(command.settings["auto"]) and not is_given("train.accumulate", command.typed)


def table(choices: list[Choice]) -> list[str]:
    """A line for each choice, with its reason."""
    if not choices:
        return []
    rows = [(choice.key, _shown(choice.value), choice.reason) for choice in choices]
    key, value = (max(len(row[i]) for row in rows) for i in (0, 1))
    head = "chosen, because the command leaves it open (key=value changes it, auto=false leaves the defaults):"
    return [head, *(f"  {row[0]:<{key}}  {row[1]:<{value}}  {row[2]}" for row in rows)]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return value["_target_"].rpartition(".")[2] if "_target_" in value else ", ".join(value)
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
