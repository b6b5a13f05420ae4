"""What a run is made of, except data and model: made and checked before either is touched."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from retina.cli.build import build, call, check_arguments
from retina.cli.compose import Settings
from retina.cli.data import DataConfig
from retina.data.channels import RGB
from retina.engine.config import from_mapping
from retina.errors import ConfigError, under

if TYPE_CHECKING:
    from retina.data.transforms import Pipeline
    from retina.engine.optim import Schedule
    from retina.evaluation.metrics import Scoring


class Recipe(NamedTuple):
    criterion: Callable[..., Any]
    postprocess: Callable[..., Any]
    schedule: "Schedule"
    optimizer: Callable[..., Any]
    """Of parameter groups."""
    pipeline: "Pipeline"
    sampler: Callable[..., Any] | None
    """Of annotations: what `data.sampling` makes where it is a section."""
    scoring: "Scoring"


def make_recipe(settings: Settings) -> Recipe:
    """Raises ConfigError for settings that cannot be trained with, whatever the data."""
    from retina.data.transforms import Pipeline
    from retina.evaluation.metrics import Scoring
    from retina.inference import check_postprocess
    from retina.losses.detection import DetectionLoss
    from retina.model.parts import PARTS, part_class
    from retina.model.retinanet import retinanet

    data = from_mapping(DataConfig, settings["data"], "data")
    for name, origin in (("num_classes", "the classes of the data"), ("plugins", "plugins=[...]")):
        if name in settings["model"]:
            problem = f"is no setting, because {origin} decide it - leave it out"
            raise ConfigError(problem, code="not-a-setting", key=f"model.{name}")
    check_arguments(retinanet, [*settings["model"], "num_classes"], "model")
    for part in PARTS:
        section = settings["model"].get(part)
        if isinstance(section, Mapping):
            with under("model"):
                factory = part_class(section, part, settings["plugins"])
            check_arguments(factory, [key for key in section if key != "_target_"], f"model.{part}", partial=True)
    refuse_frozen_noise(settings)
    if settings["remap"] and not settings["init_from"]:
        problem = "renames classes of init_from - give init_from=..., or leave remap out"
        raise ConfigError(problem, code="contradiction", key="remap")
    make = partial(build, plugins=settings["plugins"])
    criterion = make(settings["loss"], "loss")
    if isinstance(criterion, DetectionLoss):
        quality, bins = settings["model"].get("head_quality"), settings["model"].get("box_bins")
        call(criterion.check_head, "loss", quality=bool(quality), bins=bins is not None)
    call(check_postprocess, "postprocess", options=without_target(settings["postprocess"]))
    scoring = from_mapping(Scoring, settings["eval"], "eval")
    if settings["train"].get("best_metric") == "AR100" != f"AR{scoring.max_dets}":
        problem = f"AR100 is not measured with eval.max_dets={scoring.max_dets} - give AP, or leave out that setting"
        raise ConfigError(problem, code="contradiction", key="train.best_metric")
    transforms = {name: make(section, f"augment.{name}") for name, section in settings["augment"].items()}
    for name, transform in transforms.items() if data.channels != RGB else []:
        if getattr(transform, "rgb_only", False):
            problem = f"changes colours, which images of {data.channels} channels (data.channels) have not"
            raise ConfigError(f"{problem} - give augment.{name}=null", code="contradiction", key=f"augment.{name}")
    sampling = data.sampling
    return Recipe(
        criterion=criterion,
        postprocess=make(settings["postprocess"], "postprocess"),
        schedule=make(settings["schedule"], "schedule"),
        optimizer=make(settings["optimizer"], "optimizer"),
        pipeline=Pipeline(transforms, min_size=data.min_size, min_visibility=data.min_visibility),
        sampler=make({**sampling, "_partial_": True}, "data.sampling") if isinstance(sampling, dict) else None,
        scoring=scoring,
    )


def without_target(section: Settings) -> Settings:
    return {key: value for key, value in section.items() if not key.startswith("_")}


def refuse_frozen_noise(settings: Settings) -> None:
    """Raises ConfigError for settings that would freeze randomly initialised layers."""
    model = settings["model"]
    key = "frozen_stages" if model.get("frozen_stages") else "norm" if model.get("norm") == "frozen" else ""
    if key and not (model.get("weights") or settings["init_from"]):
        problem = f"{model[key]} without model.weights freezes random layers - give null, or weights"
        raise ConfigError(problem, code="contradiction", key=f"model.{key}")
