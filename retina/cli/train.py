"""Trains a detector. The same command again resumes; a finished run says so.

python tools/train.py                                          # the built-in shapes
python tools/train.py data=coco data.root=DIR name=mine        # your own data in COCO's layout, with chosen settings
python tools/train.py data=coco data.root=DIR budget=30min     # in half an hour
torchrun --nproc_per_node=8 tools/train.py experiment=coco_r50_1x
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from retina.cli.assemble import assemble
from retina.cli.auto import Command, check_budget, planned, remembered, shorter
from retina.cli.build import build_trackers, call
from retina.cli.compose import Result, Settings, default_settings, entry
from retina.cli.data import DataConfig, as_seen, load_checked, prepare_data
from retina.cli.loaders import unreadable_images
from retina.cli.memory import describe_duration, in_memory
from retina.cli.recipe import Recipe, make_recipe, without_target
from retina.cli.run_folder import Opened, folder_of, open_run, settle_at_end, where_now, write_settings
from retina.data.advice import rare_classes, unreachable
from retina.data.oddities import crowding
from retina.engine.config import TrainConfig, from_mapping
from retina.files import Place

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from retina.data.annotations import Annotations
    from retina.data.loader import BatchLoader
    from retina.data.sampler import DetectionBatchSampler
    from retina.engine.checkpointer import Checkpointer, TrainState
    from retina.engine.logging import RunLogger
    from retina.evaluation.evaluate import Evaluation
    from retina.model.retinanet import RetinaNet
    from retina.model.weights import DetectorCard


def shapes_by_default(typed: list[str]) -> list[str]:
    chosen = any(word.startswith(("data=", "experiment=")) for word in typed)
    return [] if chosen else ["experiment=shapes"]


def added_words(typed: list[str]) -> list[str]:
    """Neither data nor experiment: the shapes. Data without an experiment, which is a recipe: the automatic recipe."""
    named = any(word.startswith(("experiment=", "auto=")) for word in typed)
    return shapes_by_default(typed) or ([] if named else ["auto=true"])


def check(settings: Settings) -> None:
    """Raises ConfigError for settings that `main` would refuse, whatever the data. No weights are read."""
    from_mapping(TrainConfig, settings["train"], "train")
    from_mapping(DataConfig, settings["data"], "data")
    folder_of(settings)
    check_budget(settings, frozenset())
    recipe = make_recipe(settings)

    import torch

    from retina.engine.optim import build_optimizer
    from retina.model.retinanet import retinanet

    arguments = settings["model"] | {"weights": None}
    with torch.device("meta"):  # shapes alone
        call(retinanet, "model", **arguments, num_classes=1, plugins=settings["plugins"])
    recipe.schedule(0, total=1000, steps_per_epoch=100)
    build_optimizer(recipe.optimizer, torch.nn.Conv2d(1, 1, 1))


@entry("train", default=added_words, check=check)
def main(settings: Settings) -> Result:
    command = Command.begin(settings)
    config = from_mapping(TrainConfig, settings["train"], "train")
    data = from_mapping(DataConfig, settings["data"], "data")
    folder = folder_of(settings)
    check_budget(settings, command.typed)

    # torch takes seconds to load, and a wrong setting should not wait for it
    from retina import distributed
    from retina.cli.environment import describe_environment, for_weights, record_environment
    from retina.cli.report import describe_end
    from retina.cli.signals import StopRequest
    from retina.engine.checkpointer import Checkpointer, TrainState
    from retina.engine.logging import RunLogger
    from retina.engine.loop import fit
    from retina.engine.optim import build_optimizer
    from retina.precision import algorithms

    device = call(distributed.choose_device, "train.device", name=config.device)
    make_recipe(settings)
    trackers = build_trackers(settings["trackers"], settings["plugins"])
    with distributed.process_group(device, timeout_minutes=config.timeout_minutes), ExitStack() as stack:
        # until the end of this run: a sweep may have others in this process
        stack.enter_context(algorithms(deterministic=config.deterministic, few_shapes=bool(data.canvases)))
        settings |= distributed.on_main(lambda: remembered(folder, command))
        opening = {"overwrite": settings["overwrite"], "defaults": default_settings}
        run = Opened(*distributed.on_main(lambda: open_run(folder, settings, **opening)))
        if distributed.is_main():
            stack.callback(settle_at_end, place := Place(folder))
            place.check()
        prepare_data(data, settings["plugins"])
        options: dict[str, Any] = {"trackers": trackers, "settings": settings, "advice": shorter(settings)}
        recorder = RunLogger(folder, active=distributed.is_main(), **options)
        stack.callback(recorder.close)
        environment = describe_environment(device)
        distributed.on_main(lambda: record_environment(folder, environment))
        for line in run.notes:
            recorder.info(line)
        loaded = load_checked(data, ["train", "val"] if config.eval_every else ["train"], folder, say=recorder.info)
        train, val = loaded[0], loaded[-1]

        begins = where_now(folder, settings["init_from"]) if settings["init_from"] and not run.resumes else None
        start = partial(assemble, train=train, val=val, device=device, recorder=recorder, start=begins)
        if command.plans and not run.resumes:
            settings |= planned(command, train, device, start, recorder)
            distributed.on_main(lambda: write_settings(folder, settings))
        config, recipe, model, loader, sampler, val_loader, preprocessing, evaluated = start(settings)
        optimizer = build_optimizer(recipe.optimizer, model, scale=config.batch_size / config.lr_batch_size)
        state = TrainState(model, optimizer, config, recipe.schedule)
        announce(folder, settings, state, model, recipe, sampler, train, val, recorder)
        card = detector_card(model, train, preprocessing, settings["postprocess"], for_weights(environment))
        allowed = settings["allow_data_change"]
        checkpointer = Checkpointer(folder, state, card=card, recorder=recorder, allow_data_change=allowed)
        with StopRequest(lambda: config.compile and not state.learned) as request:
            scored = partial(score, checkpointer, recipe, val_loader, train, val, data.max_pixels, request.signal)
            stopped = fit(
                state,
                recipe.criterion,
                loader,
                evaluate=scored if config.eval_every else None,
                checkpointer=checkpointer,
                recorder=recorder,
                annotations=train,
                stopping=request.signal,
                deadline=command.deadline(evaluation=0.5 * evaluated / config.batch_size, recorder=recorder),
            )
        for line in unreadable_images(loader) + unreadable_images(val_loader):
            recorder.once(f"skipped: {line}")
        if not stopped:
            recorder.curves()
        for line in describe_end(folder, state, stopped):
            recorder.info(line)
    return Result(128 + stopped if stopped else 0, state.progress.best)


def announce(
    folder: "Path",
    settings: Settings,
    state: "TrainState",
    model: "RetinaNet",
    recipe: Recipe,
    sampler: "DetectionBatchSampler",
    train: "Annotations",
    val: "Annotations",
    recorder: "RunLogger",
) -> None:
    """What the run will do, and what is likely not meant."""
    from retina.cli.report import describe_run, num_steps, too_low_rate, undefined_metric

    data = settings["data"]
    for line in describe_run(folder, state, train, val, sampler):
        recorder.info(line)
    images, train = train, as_seen(from_mapping(DataConfig, data, "data"), train, with_objects=True)
    in_memory(settings, train, state.device, recorder, may_choose=False)
    if line := describe_duration(settings, train, state, num_steps(state, sampler), shorter(settings)):
        recorder.info(line)
    if warning := too_low_rate(state, sampler):
        recorder.warn(warning)
    if warning := unreachable(train, data["short_side"], data["long_side"], stride=min(model.strides)):
        recorder.warn(warning)
    if state.config.eval_every and (warning := undefined_metric(state.config.best_metric, val, recipe.scoring)):
        recorder.warn(warning)
    for name, split in {"train": images, **({"val": val} if state.config.eval_every else {})}.items():
        for line in rare_classes(name, split):
            recorder.warn(f"{split.file}: categories: {line}")
    limit = settings["postprocess"].get("max_detections")
    for line in crowding(val, recipe.scoring.max_dets, limit) if state.config.eval_every else []:
        recorder.warn(line)


def detector_card(
    model: "RetinaNet",
    annotations: "Annotations",
    preprocessing: dict[str, Any],
    postprocess: Settings,
    environment: dict[str, Any],
) -> "DetectorCard":
    """The header of the weights."""
    from retina.model.weights import DetectorCard

    return DetectorCard(
        model=model.arguments,
        classes=list(annotations.classes),
        category_ids=[i for i in annotations.category_ids if i is not None],
        preprocessing=preprocessing,
        postprocess=without_target(postprocess),
        environment=environment,
    )


def score(
    checkpointer: "Checkpointer",
    recipe: Recipe,
    loader: "BatchLoader",
    train: "Annotations",
    annotations: "Annotations",
    max_pixels: int,
    stopping: "Callable[[], int]",
    model: "nn.Module",
) -> "Evaluation":
    """The metrics of the model on the validation split, with a picture of some detections, and why they are near zero
    where that is plain. The operating point that is fitted to them goes into the header of the weights, should they be
    the best."""
    from retina.cli.afterwards import explain
    from retina.evaluation.decision_pictures import decision_pictures
    from retina.evaluation.evaluate import evaluate
    from retina.evaluation.operating_points import fit_operating_point
    from retina.evaluation.pictures import evaluation_pictures

    state, recorder = checkpointer.state, checkpointer.recorder
    loader.stopping = stopping
    evaluation = evaluate(
        model,
        recorder.evaluating(loader, len(loader.annotations)),
        annotations,
        postprocess=recipe.postprocess,
        criterion=recipe.criterion,
        device=state.device,
        dtype=state.dtype,
        stopping=stopping,
        scoring=recipe.scoring,
        tiles=loader.annotations,
    )
    if checkpointer.card and recorder.active:
        point = fit_operating_point(annotations, evaluation.detections)
        checkpointer.card = replace(checkpointer.card, operating_point=point)
        if state.config.pictures:
            pictures = decision_pictures(annotations, evaluation.detections, point, max_dets=recipe.scoring.max_dets)
            for name, picture in pictures.items():
                recorder.picture(state.progress.step, f"val/{name}", picture)
        if warning := explain(checkpointer, model, train, annotations, evaluation):
            recorder.warn(warning)
    if state.config.pictures and recorder.active:
        limits = {"max_images": state.config.pictures, "max_pixels": max_pixels}
        picture = evaluation_pictures(annotations, evaluation.detections, **limits)
        recorder.picture(state.progress.step, "val/detections", picture)
    return evaluation
