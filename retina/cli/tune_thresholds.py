"""Fits the score thresholds of a trained detector to a goal and writes them into the header of its weights.

python tools/tune_thresholds.py checkpoint=runs/mine                              # the highest F1, as after training
python tools/tune_thresholds.py checkpoint=runs/mine goal=precision target=0.95   # as much as can be had at 95 %
python tools/tune_thresholds.py checkpoint=runs/mine goal=recall target=0.9
python tools/tune_thresholds.py checkpoint=runs/mine goal=false_alarms target=0.05   # of each class per image
python tools/tune_thresholds.py checkpoint=runs/mine goal=count                   # the most exact numbers of objects

The tensors stay as they are. `infer`, `Detector.predict` and pictures use the thresholds unless they get a
score_threshold. What is printed is cross-fitted: each fifth of the images tells how good the thresholds fitted on the
others are. Exit code 3: some images could not be read.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from retina.cli.build import call
from retina.cli.compose import entry
from retina.cli.scoring import ScoringConfig, folder_of, score_split, settings_of
from retina.printing import say


@dataclass(frozen=True, kw_only=True)
class TuneConfig(ScoringConfig):
    """configs/tune_thresholds.yaml says what each is."""

    checkpoint: str
    goal: str
    target: float | None
    output: str | None


@entry("tune_thresholds", TuneConfig)
def main(config: TuneConfig) -> int:
    checkpoint = Path(config.checkpoint)
    settings = settings_of(checkpoint)

    # torch takes seconds to load, and a wrong setting should not wait for it
    from safetensors.torch import load

    from retina import distributed
    from retina.evaluation.operating_points import Goal, describe, fit_operating_point
    from retina.model.weights import read_file, save_detector

    goal = Goal(config.goal, config.target)
    goal.check()
    device = call(distributed.choose_device, "device", name=config.device)
    with distributed.process_group(device):
        folder = folder_of(checkpoint)
        scored = score_split(config, checkpoint, settings, device, folder / "eval", folder)
        if distributed.is_main():
            point = fit_operating_point(scored.annotations, scored.evaluation.detections, goal)
            source = scored.detector.file
            weights = Path(config.output) if config.output else source
            card, data = read_file(source)
            assert card is not None  # the detector has been loaded from it
            save_detector(weights, load(data), replace(card, operating_point=point))
            say(*describe(point, card.classes), "", f"written: {weights}")
            say(*(f"skipped: {line}" for line in scored.skipped), error=True)
    return 3 if scored.skipped else 0
