"""Trains a detector. The same command again resumes; a finished run says so.

python tools/train.py                                          # the built-in shapes
python tools/train.py data=coco data.root=DIR name=mine        # your own data in COCO's layout
torchrun --nproc_per_node=8 tools/train.py experiment=coco_r50_1x
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retina.cli.build import build, build_trackers, call
from retina.cli.compose import Result, Settings, entry
from retina.cli.data import DataConfig
from retina.cli.recipe import Recipe, make_recipe, without_target
from retina.engine.config import TrainConfig, from_mapping
from retina.engine.run_folder import Opened, open_run
from retina.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from retina.data.annotations import Annotations
    from retina.data.loader import BatchLoader
    from retina.data.sampler import DetectionBatchSampler
    from retina.engine.checkpointer import TrainState
    from retina.engine.logging import RunLogger
    from retina.evaluation.evaluate import Evaluation
    from retina.model.retinanet import RetinaNet
    from retina.model.weights import DetectorCard


def shapes_by_default(typed: list[str]) -> list[str]:
    chosen = any(word.startswith(("data=", "experiment=")) for word in typed)
    return [] if chosen else ["experiment=shapes"]


def check(settings: Settings) -> None:
    """Raises ConfigError for settings that `main` would refuse, whatever the data. No weights are read."""
    from_mapping(TrainConfig, settings["train"], "train")
    from_mapping(DataConfig, settings["data"], "data")
    run_folder(str(settings["runs"]), str(settings["name"]))
    recipe = make_recipe(settings)

    import torch

    from retina.engine.optim import build_optimizer
    from retina.model.retinanet import retinanet

    arguments = settings["model"] | {"weights": None}
    with torch.device("meta"):  # shapes alone
        call(retinanet, "model", **arguments, num_classes=1, plugins=settings["plugins"])
    recipe.schedule(0, total=1000, steps_per_epoch=100)
    build_optimizer(recipe.optimizer, torch.nn.Conv2d(1, 1, 1))


@entry("train", default=shapes_by_default, check=check)
def main(settings: Settings) -> Result:
    config = from_mapping(TrainConfig, settings["train"], "train")
    data = from_mapping(DataConfig, settings["data"], "data")
    folder = run_folder(str(settings["runs"]), str(settings["name"]))

    # torch takes seconds to load, and a wrong setting should not wait for it
    import torch

    from retina import distributed
    from retina.cli.data import load_checked
    from retina.engine.checkpointer import Checkpointer, TrainState
    from retina.engine.environment import describe_environment, for_weights, record_environment
    from retina.engine.logging import RunLogger, describe_run
    from retina.engine.loop import fit
    from retina.engine.optim import build_optimizer
    from retina.engine.signals import StopRequest

    device = call(distributed.choose_device, "train.device", name=config.device)
    recipe = make_recipe(settings)
    trackers = build_trackers(settings["trackers"], settings["plugins"])
    with distributed.process_group(device), ExitStack() as stack:
        if config.deterministic:  # until the end of this run: a sweep may have others in this process
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)
        run = Opened(*distributed.on_main(lambda: open_run(folder, settings, overwrite=settings["overwrite"])))
        if data.prepare and data.root:
            prepare, root = data.prepare, Path(data.root)
            distributed.on_main(lambda: build(prepare, "data.prepare", plugins=settings["plugins"], root=root))
        recorder = RunLogger(folder, active=distributed.is_main(), trackers=trackers, settings=settings)
        stack.callback(recorder.close)
        environment = describe_environment(device)
        distributed.on_main(lambda: record_environment(folder, environment))
        for line in run.told():
            recorder.info(line)
        loaded = load_checked(data, ["train", "val"] if config.eval_every else ["train"], folder, say=recorder.info)
        annotations, val_annotations = loaded[0], loaded[-1]

        torch.manual_seed(config.seed)
        model = make_model(settings, recipe, annotations, device, recorder, resumes=run.resumes)
        optimizer = build_optimizer(recipe.optimizer, model, scale=config.batch_size / config.lr_batch_size)
        loader, sampler, val_loader, preprocessing = make_loaders(recipe, data, config, loaded, model)
        card = make_card(model, annotations, preprocessing, without_target(settings["postprocess"]))
        card = replace(card, environment=for_weights(environment))
        described = describe_run(
            folder, config, device, annotations, val_annotations, model, optimizer, recipe.schedule, sampler
        )
        for line in described:
            recorder.info(line)
        state = TrainState(model, optimizer, config, recipe.schedule)
        allowed = settings["allow_data_change"]
        checkpointer = Checkpointer(folder, state, card=card, recorder=recorder, allow_data_change=allowed)
        with StopRequest() as request:
            scored = partial(
                score, state, recipe, val_loader, val_annotations, recorder, data.max_pixels, request.signal
            )
            stopped = fit(
                state,
                recipe.criterion,
                loader,
                evaluate=scored if config.eval_every else None,
                checkpointer=checkpointer,
                recorder=recorder,
                annotations=annotations,
                stopping=request.signal,
            )
        progress = state.progress
        report_skipped(recorder, loader, val_loader)
        if stopped:
            recorder.info(f"told to stop: saved at step {progress.step}, the same command goes on from there")
        else:
            best = f", best {config.best_metric} {progress.best or 0:.3f} at step {progress.best_step}"
            best = "" if progress.best is None else best
            recorder.curves()
            recorder.info(f"finished at step {progress.step}{best}: {folder / 'best.safetensors'}")
            recorder.info(f"next: python tools/eval.py checkpoint={folder}   |   curves: {folder / 'curves.png'}")
    return Result(128 + stopped if stopped else 0, progress.best)


def make_model(
    settings: Settings,
    recipe: Recipe,
    annotations: "Annotations",
    device: "torch.device",
    recorder: "RunLogger",
    *,
    resumes: bool,
) -> "RetinaNet":
    """The detector of the `model` section on its device. A run that does not resume starts from `init_from`."""
    import torch

    from retina.interop.transfer import init_from
    from retina.losses.detection import DetectionLoss
    from retina.model.retinanet import retinanet

    if isinstance(recipe.criterion, DetectionLoss):
        call(recipe.criterion.check_classes, "loss", num_classes=len(annotations.classes))
    model = call(
        retinanet, "model", **settings["model"], num_classes=len(annotations.classes), plugins=settings["plugins"]
    )
    channels_last = settings["train"]["channels_last"]
    model = model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).to(device)
    if settings["init_from"] and not resumes:
        for line in init_from(model, settings["init_from"], classes=annotations.classes, remap=settings["remap"]):
            recorder.info(line)
    return model


def make_loaders(
    recipe: Recipe, data: DataConfig, config: TrainConfig, loaded: "Sequence[Annotations]", model: "RetinaNet"
) -> "tuple[BatchLoader, DetectionBatchSampler, BatchLoader, dict[str, Any]]":
    """Loader and sampler of the first split, loader of the last, and the preprocessing for the weights' header."""
    from retina.cli.data import build_eval_loader, build_train_loader, canvas_of
    from retina.data.loader import Canvas

    stride = max(model.strides)
    pad_multiple = data.pad_multiple or stride
    if model.arguments["canvas_strides"] and pad_multiple % stride:
        raise ConfigError(
            f"{pad_multiple} - anchors with strides from the canvas stand on a grid only where it is a multiple of "
            f"{stride}: give that, or model.canvas_strides=false",
            code="pad-multiple",
            key="data.pad_multiple",
        )
    pin_memory = next(model.parameters()).is_cuda
    canvas = canvas_of(data, Canvas(pad_multiple, model.pad_value))
    draws = call(recipe.sampler, "data.sampling", annotations=loaded[0]) if recipe.sampler else None
    loader, sampler = build_train_loader(
        loaded[0], recipe.pipeline, data, config, canvas, draws=draws, pin_memory=pin_memory
    )
    batch_size = data.eval_batch_size or sampler.micro_batch
    val_loader = build_eval_loader(loaded[-1], data, canvas, batch_size=batch_size, pin_memory=pin_memory)
    preprocessing = {
        "short_side": data.short_side,
        "long_side": data.long_side,
        "pad_multiple": pad_multiple,
        "pad_value": list(model.pad_value),
        "precision": config.precision,
        "batch_size": batch_size,
    }
    return loader, sampler, val_loader, preprocessing


def make_card(
    model: "RetinaNet", annotations: "Annotations", preprocessing: dict[str, Any], postprocess: dict[str, Any]
) -> "DetectorCard":
    """The header of the weights file."""
    from retina.model.weights import DetectorCard

    ids = [i for i in annotations.category_ids if i is not None]
    return DetectorCard(
        model=model.arguments,
        classes=list(annotations.classes),
        category_ids=ids,
        preprocessing=preprocessing,
        postprocess=postprocess,
    )


def score(
    state: "TrainState",
    recipe: Recipe,
    loader: "BatchLoader",
    annotations: "Annotations",
    recorder: "RunLogger",
    max_pixels: int,
    stopping: "Callable[[], int]",
    model: "nn.Module",
) -> "Evaluation | None":
    """The metrics of the model on the validation split, with a picture of some detections; None if told to stop."""
    from retina.evaluation.evaluate import StoppedError, evaluate
    from retina.evaluation.pictures import evaluation_pictures
    from retina.types import DTYPES

    try:
        evaluation = evaluate(
            model,
            recorder.evaluating(loader, len(annotations)),
            annotations,
            postprocess=recipe.postprocess,
            criterion=recipe.criterion,
            device=state.device,
            dtype=DTYPES[state.config.precision],
            stopping=stopping,
        )
    except StoppedError:
        return None
    if state.config.pictures and recorder.active:
        limits = {"max_images": state.config.pictures, "max_pixels": max_pixels}
        picture = evaluation_pictures(annotations, evaluation.detections, **limits)
        recorder.picture(state.progress.step, "val/detections", picture)
    return evaluation


def report_skipped(recorder: "RunLogger", *loaders: "BatchLoader") -> None:
    """Lists the images that could not be read, those of other processes too."""
    from retina import distributed

    for loader in loaders:
        faults = dict(one for part in distributed.gather_objects(list(loader.faults.items())) for one in part)
        for line in sorted(faults.values()):
            recorder.once(f"skipped: {line}")


def run_folder(runs: str, name: str) -> Path:
    """Raises ConfigError for a name that leads out of `runs`, or nowhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).name:
        raise ConfigError(f"name: {name!r} is no name of a folder in {runs} - give another, or runs=FOLDER")
    return Path(runs) / name
