"""A trained detector over a split, as it was trained or as the command says: what several commands begin with. Beside
the road."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retina.cli.build import call
from retina.cli.data import data_of, drop_nulls
from retina.cli.loaders import open_split, progress, unreadable_images
from retina.cli.run_folder import open_evaluation, read_settings
from retina.engine.config import from_mapping
from retina.errors import ConfigError, check, check_choice

if TYPE_CHECKING:
    import torch

    from retina.cli.data import DataConfig
    from retina.data.annotations import Annotations
    from retina.evaluation.evaluate import Evaluation
    from retina.evaluation.metrics import Scoring
    from retina.inference import Detector


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """On what a detector is run, and how. configs/eval.yaml says what each is."""

    split: str
    batch_size: int | None
    device: str
    precision: str | None
    plugins: list[str]
    data: dict[str, Any]
    eval: dict[str, Any]
    postprocess: dict[str, Any]
    traceback: bool

    def __post_init__(self) -> None:
        check_choice(self.split, ("train", "val"), "split")
        check(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "give 1 or more, or null")


class Scored(NamedTuple):
    detector: "Detector"
    data: "DataConfig"
    annotations: "Annotations"
    evaluation: "Evaluation"
    scoring: "Scoring"
    skipped: list[str]
    """A line for each image that could not be read."""


def folder_of(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """Of the run that the weights are from; empty where they stand alone."""
    file = folder_of(checkpoint) / "config.yaml"
    settings = read_settings(file) if file.is_file() else {}
    if not isinstance(settings.get("data", {}), dict):
        raise ConfigError(f"{file}: data: is no section - restore it, or give data=...", code="wrong-type")
    return settings


def scoring_of(settings: dict[str, Any], typed: dict[str, Any]) -> "Scoring":
    """As the run was scored, changed by what was typed."""
    from retina.evaluation.metrics import Scoring

    trained = settings.get("eval") or {}
    return from_mapping(Scoring, (trained if isinstance(trained, dict) else {}) | drop_nulls(typed), "eval")


def score_split(
    config: ScoringConfig,
    checkpoint: Path,
    settings: dict[str, Any],
    device: "torch.device",
    output: Path,
    within: Path | None,
) -> Scored:
    """Within a process group. Makes the folder `output`, which must be that of an evaluation.

    settings: of the run, by `settings_of`."""
    from retina import distributed
    from retina.detections import postprocess
    from retina.evaluation.evaluate import evaluate
    from retina.hub import load
    from retina.inference import check_postprocess

    detector = load(checkpoint, device=str(device), precision=config.precision, plugins=config.plugins)
    options = detector.card.postprocess | drop_nulls(config.postprocess)
    call(check_postprocess, "postprocess", options=options)
    data = data_of(settings.get("data", {}), config.data, detector.card.preprocessing)
    scoring = scoring_of(settings, config.eval)
    distributed.on_main(lambda: open_evaluation(output, within))
    annotations, loader = open_split(data, config.split, detector, output, batch_size=config.batch_size)
    evaluation = evaluate(
        detector.model,
        progress(loader, "evaluating", len(loader)),
        annotations,
        postprocess=partial(postprocess, **options),
        device=device,
        dtype=detector.dtype,
        scoring=scoring,
        tiles=loader.annotations,
    )
    return Scored(detector, data, annotations, evaluation, scoring, unreadable_images(loader))
