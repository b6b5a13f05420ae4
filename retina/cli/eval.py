"""Scores a trained detector on a data set, or a COCO results file without any model.

python tools/eval.py checkpoint=runs/mine
python tools/eval.py checkpoint=runs/mine data=coco data.root=/data/other output=eval_other
torchrun --nproc_per_node=8 tools/eval.py checkpoint=runs/mine
python tools/eval.py detections=RESULTS.json data=coco data.val.annotations=GT.json output=DIR

Images that cannot be read (up to data.max_bad_fraction) are listed on stderr and count as images in which nothing was
found; the exit code is then 3.
"""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.analysis import write_analysis
from retina.cli.build import call
from retina.cli.compose import entry
from retina.cli.data import data_of, load_split
from retina.cli.run_folder import open_evaluation
from retina.cli.scoring import ScoringConfig, folder_of, score_split, scoring_of, settings_of
from retina.data.oddities import crowding
from retina.errors import ConfigError, check, check_choice
from retina.printing import say

if TYPE_CHECKING:
    from retina.data.coco import Annotations
    from retina.evaluation.metrics import DetectionArrays, Scoring


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ScoringConfig):
    """configs/eval.yaml says what each is."""

    checkpoint: str | None
    detections: str | None
    output: str | None
    scorer: str | None
    pictures: int
    report: bool
    score_threshold: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.checkpoint is None) == (self.detections is None):
            problem = "give checkpoint=RUN_OR_FILE, or detections=RESULTS.json, and not both"
            raise ConfigError(problem, code="contradiction", key="checkpoint")
        if self.detections and self.output is None:
            raise ConfigError("missing - give output=DIR for metrics.json", code="missing-setting", key="output")
        check_choice(self.scorer, ("pycocotools", None), "scorer")
        check(self.pictures >= 0, "pictures", self.pictures, "give 0 or more")
        if self.scorer and find_spec("pycocotools") is None:
            problem = "pycocotools is not installed - pip install 'retina-detect[coco]', or leave scorer out"
            raise ConfigError(problem, code="missing-package", key="scorer")


@entry("eval", EvalConfig)
def main(config: EvalConfig) -> int:
    return score_detector(config, Path(config.checkpoint)) if config.checkpoint else score_file(config)


def score_file(config: EvalConfig) -> int:
    """The exit code."""
    results, output = Path(str(config.detections)), Path(str(config.output))
    data = data_of({}, config.data, {})

    from retina.evaluation.metrics import coco_metrics, write_metrics
    from retina.evaluation.results import read_results

    scoring = scoring_of({}, config.eval)
    annotations = load_split(data, config.split, needs="ids")
    warnings: list[str] = []
    detections = read_results(results, annotations, warnings)
    metrics = coco_metrics(annotations, detections, scoring)
    say(*(f"warning: {line}" for line in warnings), error=True)
    open_evaluation(output)
    write_metrics(output / "metrics.json", metrics)
    report(config, scoring, annotations, metrics, results, f"{output / 'metrics.json'}")
    if config.report:
        facts = [("results", str(results)), ("annotations", str(annotations.file))]
        write_analysis(output, annotations, detections, metrics, scoring, facts=facts)
    return 0


def score_detector(config: EvalConfig, checkpoint: Path) -> int:
    """The exit code, the same on every rank."""
    folder = folder_of(checkpoint)
    settings = settings_of(checkpoint)

    # torch takes seconds to load, and a wrong setting should not wait for it
    from retina import distributed
    from retina.data.results import write_results
    from retina.evaluation.metrics import write_metrics
    from retina.evaluation.pictures import write_evaluation_pictures

    device = call(distributed.choose_device, "device", name=config.device)
    with distributed.process_group(device):
        output = Path(config.output) if config.output else folder / "eval"
        scored = score_split(config, checkpoint, settings, device, output, None if config.output else folder)
        annotations, metrics, skipped = scored.annotations, scored.evaluation.metrics, scored.skipped
        if distributed.is_main():
            detections = keep_known(annotations, scored.evaluation.detections)
            write_metrics(output / "metrics.json", metrics | {"skipped_images": len(skipped)})
            write_results(output / "detections.json", annotations, *detections)
            limits = {"max_images": config.pictures, "max_pixels": scored.data.max_pixels}
            threshold = (
                (scored.detector.thresholds or 0.3) if config.score_threshold is None else config.score_threshold
            )
            folder = output / "pictures"
            drawn = write_evaluation_pictures(folder, annotations, detections, score_threshold=threshold, **limits)
            names = f"{output}/metrics.json, detections.json{', pictures/' if drawn else ''}"
            report(config, scored.scoring, annotations, metrics, output / "detections.json", names)
            if config.report:
                about: Any = {"point": scored.detector.card.operating_point, "run": folder_of(checkpoint)}
                facts = [("weights", str(scored.detector.file)), ("annotations", str(annotations.file))]
                write_analysis(output, annotations, detections, metrics, scored.scoring, facts=facts, **about)
            say(*(f"skipped: {line}" for line in skipped), error=True)
    return 3 if skipped else 0


def report(
    config: EvalConfig,
    scoring: "Scoring",
    annotations: "Annotations",
    metrics: dict[str, Any],
    results: Path,
    written: str,
) -> None:
    """Prints the metrics, what was written, and our numbers beside those of the other scorer."""
    from retina.evaluation.metrics import format_metrics

    say(*format_metrics(metrics, scoring).splitlines(), "", f"written: {written}")
    say(*(f"warning: {line}" for line in crowding(annotations, scoring.max_dets)), error=True)
    if config.scorer and not annotations.file.is_file():
        problem = "reads one annotation file - score joined ones without it, or one by one"
        raise ConfigError(problem, code="contradiction", key="scorer")
    if config.scorer:
        from retina.evaluation.cross_check import describe_differences, pycocotools_metrics

        reference = pycocotools_metrics(annotations.file, json.loads(results.read_bytes()), scoring)
        say("", *describe_differences(metrics, reference))


def keep_known(annotations: "Annotations", detections: "DetectionArrays") -> "DetectionArrays":
    """Without detections of classes that the annotation file has no category for: they have no id to be written under,
    and no metric."""
    import numpy as np

    known = np.array([category is not None for category in annotations.category_ids])[detections.labels]
    if not known.all():
        say(f"{np.count_nonzero(~known)} detections are of classes that {annotations.file} does not have: left out")
    return type(detections)(*(values[known] for values in detections))
