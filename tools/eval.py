"""Scores a trained detector on a data set, or a COCO results file without any model.

python tools/eval.py checkpoint=runs/mine
python tools/eval.py checkpoint=runs/mine data.root=/data/other output=eval_other
python tools/eval.py detections=RESULTS.json data=coco data.val.annotations=GT.json output=DIR
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _compose import Settings, build, call, compose, entry

from retina.engine.config import DataConfig, from_mapping
from retina.engine.run_folder import read_settings
from retina.errors import ConfigError


@entry("eval")
def main(settings: Settings) -> None:
    if (settings["checkpoint"] is None) == (settings["detections"] is None):
        raise ConfigError("checkpoint: give checkpoint=RUN_OR_FILE, or detections=RESULTS.json, and not both")
    if settings["detections"]:
        score_file(settings)
    else:
        score_detector(settings)


def score_file(settings: Settings) -> None:
    from retina.engine.data import load_split
    from retina.evaluation.metrics import coco_metrics
    from retina.evaluation.results import format_metrics, read_results, write_metrics

    if settings["output"] is None:
        raise ConfigError("output: missing - give output=DIR for metrics.json")
    data = from_mapping(DataConfig, settings["data"], "data")
    annotations = load_split(data, settings["split"], images_needed=False)
    metrics = coco_metrics(annotations, read_results(Path(settings["detections"]), annotations))
    output = open_output(Path(settings["output"]))
    write_metrics(output / "metrics.json", metrics)
    print(format_metrics(metrics))
    print(f"\nwritten: {output / 'metrics.json'}")


def score_detector(settings: Settings) -> None:
    checkpoint = Path(settings["checkpoint"])

    # torch takes seconds to load, and a wrong setting should not wait for it
    from functools import partial

    from retina import distributed
    from retina.data.coco import write_results
    from retina.engine.data import build_eval_loader, load_split
    from retina.evaluation.evaluate import evaluate
    from retina.evaluation.results import format_metrics, write_metrics
    from retina.inference import Detector
    from retina.postprocess import postprocess
    from retina.visualize import write_evaluation_pictures

    device = call(distributed.choose_device, "device", name=settings["device"])
    with distributed.process_group(device):
        detector = Detector.load(checkpoint, device=str(device), precision=settings["precision"])
        preprocessing = detector.card.preprocessing
        data = data_of(checkpoint, settings["data"], preprocessing)
        if data.prepare and data.root:
            build(data.prepare, "data.prepare", root=Path(data.root))
        annotations = load_split(data, settings["split"], classes=detector.classes)
        output = Path(settings["output"] or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "eval")
        if distributed.is_main():
            open_output(output)
        loader = build_eval_loader(
            annotations,
            short_side=data.short_side,
            long_side=data.long_side,
            batch_size=settings["batch_size"],
            num_workers=settings["num_workers"],
            divisor=data.pad_multiple or preprocessing["divisor"],
            pad_value=tuple(preprocessing["pad_value"]),
            pin_memory=device.type == "cuda",
        )
        options = detector.card.postprocess | settings["postprocess"]
        evaluation = evaluate(
            detector.model,
            loader,
            annotations,
            postprocess=call(partial, "postprocess", func=postprocess, **options),
            device=device,
            dtype=detector.dtype,
        )
        if distributed.is_main():
            write_metrics(output / "metrics.json", evaluation.metrics)
            write_results(output / "detections.json", annotations, *evaluation.detections)
            write_evaluation_pictures(
                output / "pictures",
                annotations,
                evaluation.detections,
                max_images=settings["pictures"],
                score_threshold=settings["score_threshold"],
            )
            print(format_metrics(evaluation.metrics))
            print(f"\nwritten: {output}/metrics.json, detections.json, pictures/")


def data_of(checkpoint: Path, given: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> DataConfig:
    """The run's own data section, changed by what was given on the command line (whatever differs from plain `data=coco`)."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    plain = compose("eval", [])["data"]
    settings = folder / "config.yaml"
    base = (
        read_settings(settings)["data"]
        if settings.is_file()
        else plain | {key: preprocessing[key] for key in ("short_side", "long_side")}
    )
    return from_mapping(DataConfig, overlay(base, given, plain), "data")


def overlay(base: Mapping[str, Any], given: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            merged[key] = overlay(base[key], value, plain.get(key) or {})
        elif value != plain.get(key):
            merged[key] = value
    return merged


def open_output(output: Path) -> Path:
    """Raises ConfigError for a folder that holds anything but an earlier evaluation."""
    if output.is_dir() and any(output.iterdir()) and not (output / "metrics.json").is_file():
        raise ConfigError(f"output: {output} holds other files - choose another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(f"output: {output} cannot be made ({fault.strerror}) - choose another folder") from None
    return output


if __name__ == "__main__":
    main()
