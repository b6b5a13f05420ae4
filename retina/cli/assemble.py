"""Makes what a training run consists of from its settings. Beside the road."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from retina.cli.build import call
from retina.cli.compose import Settings
from retina.cli.data import DataConfig
from retina.cli.loaders import build_loaders
from retina.cli.recipe import Recipe, make_recipe
from retina.engine.config import TrainConfig, from_mapping, to_steps
from retina.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from retina.data.annotations import Annotations
    from retina.data.loader import BatchLoader
    from retina.data.sampler import DetectionBatchSampler
    from retina.engine.logging import RunLogger
    from retina.model.retinanet import RetinaNet


class Parts(NamedTuple):
    """What a run is made of, as `assemble` makes it."""

    config: TrainConfig
    recipe: Recipe
    model: "RetinaNet"
    loader: "BatchLoader"
    sampler: "DetectionBatchSampler"
    val_loader: "BatchLoader"
    preprocessing: dict[str, Any]
    evaluated_images: int
    """Or tiles."""

    @property
    def images(self) -> int:
        """Of an epoch."""
        return self.sampler.images_per_epoch

    @property
    def steps(self) -> int:
        return to_steps(self.config.length, steps_per_epoch=self.sampler.steps_per_epoch, total=None, key="length")

    @property
    def evaluations(self) -> int:
        """How many there are in the run, whatever its length is where they are a share of it."""
        every = self.config.eval_every
        if every is None:
            return 0
        return round(1 / every) if isinstance(every, float) and every < 1 else 1

    @property
    def pixels_per_step(self) -> float:
        """Of the images of all processes, at the size that they have in an evaluation."""
        return float(self.config.batch_size * self.preprocessing["short_side"] * self.preprocessing["long_side"])

    def seconds_per_step(self, left: float | None) -> float:
        """Measured by some steps that leave the model as it is, in a twentieth of what is `left` of a budget, or the
        fewest that tell."""
        from retina.engine.probe import seconds_per_step

        parts = (self.model, self.recipe.criterion, self.loader, self.config, self.recipe.optimizer)
        return seconds_per_step(*parts, patience=0.0 if left is None else min(20.0, left / 20))


def assemble(
    settings: Settings,
    *,
    train: "Annotations",
    val: "Annotations",
    device: "torch.device",
    recorder: "RunLogger",
    start: str | None,
) -> Parts:
    """All but the optimizer; the same for the same settings."""
    import torch

    from retina.engine.probe import keep_memory
    from retina.precision import chosen_precision

    if device.type == "cpu":
        keep_memory()
    config = from_mapping(TrainConfig, settings["train"], "train")
    config = replace(config, precision=chosen_precision(config.precision, device))
    data = from_mapping(DataConfig, settings["data"], "data")
    recipe = make_recipe(settings)
    torch.manual_seed(config.seed)
    model = make_model(settings, recipe, train, device, recorder, start=start)
    loader, sampler, val_loader, preprocessing = build_loaders(data, config, recipe, train, val, model)
    evaluated = len(val_loader.annotations)
    return Parts(config, recipe, model, loader, sampler, val_loader, preprocessing, evaluated)


def make_model(
    settings: Settings,
    recipe: Recipe,
    annotations: "Annotations",
    device: "torch.device",
    recorder: "RunLogger",
    *,
    start: str | None,
) -> "RetinaNet":
    """The detector of the `model` section on its device, with the weights to start from."""
    import torch

    from retina.interop.transfer import init_from, norms_of
    from retina.losses.detection import DetectionLoss
    from retina.model.retinanet import retinanet

    num_classes = len(annotations.classes)
    if isinstance(recipe.criterion, DetectionLoss):
        call(recipe.criterion.check_classes, "loss", num_classes=num_classes)
    model = call(retinanet, "model", **settings["model"], num_classes=num_classes, plugins=settings["plugins"])
    channels = annotations.pixels.channels
    if model.mean.numel() != channels:
        problem = f"has {model.mean.numel()} numbers, and images have {channels} channels (data.channels)"
        raise ConfigError(f"{problem} - leave it out, it is measured", code="contradiction", key="model.mean")
    for line in norms_of(settings["model"]["weights"], model.arguments):
        recorder.once(line)
    channels_last = settings["train"]["channels_last"]
    model = model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).to(device)
    if start:
        for line in init_from(model, start, classes=annotations.classes, remap=settings["remap"]):
            recorder.info(line)
    return model
