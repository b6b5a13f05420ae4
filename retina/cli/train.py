"""Trains a detector. The same command again resumes; a finished run says so.

python tools/train.py                                          # the built-in shapes
python tools/train.py data=coco data.root=DIR name=mine        # your own data in COCO's layout
torchrun --nproc_per_node=8 tools/train.py experiment=coco_r50_1x
"""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from retina.cli.build import build, build_trackers, call
from retina.cli.compose import Result, Settings, entry
from retina.cli.recipe import make_recipe, without_target
from retina.engine.config import DataConfig, TrainConfig, from_mapping
from retina.engine.run_folder import Opened, open_run
from retina.errors import ConfigError

if TYPE_CHECKING:
    from retina.data.loader import BatchLoader
    from retina.engine.logging import RunLogger


def shapes_by_default(typed: list[str]) -> list[str]:
    chosen = any(word.startswith(("data=", "experiment=")) for word in typed)
    return [] if chosen else ["experiment=shapes"]


def check(settings: Settings) -> None:
    """Raises ConfigError for settings that `main` would refuse, whatever the data. No weights are read."""
    from_mapping(TrainConfig, settings["train"], "train")
    from_mapping(DataConfig, settings["data"], "data")
    run_folder(str(settings["runs"]), str(settings["name"]))
    make_recipe(settings)

    import torch

    from retina.model.retinanet import retinanet

    with torch.device("meta"):  # shapes alone
        call(retinanet, "model", **settings["model"] | {"weights": None}, num_classes=1)


@entry("train", default=shapes_by_default, check=check)
def main(settings: Settings) -> Result:
    config = from_mapping(TrainConfig, settings["train"], "train")
    data = from_mapping(DataConfig, settings["data"], "data")
    folder = run_folder(str(settings["runs"]), str(settings["name"]))

    # torch takes seconds to load, and a wrong setting should not wait for it
    import torch

    from retina import distributed
    from retina.data.loader import Canvas
    from retina.engine.build import build_eval_loader, build_train_loader, canvas_of, load_checked
    from retina.engine.checkpointer import Checkpointer, TrainState
    from retina.engine.logging import RunLogger, describe_run
    from retina.engine.loop import fit
    from retina.engine.optim import build_optimizer
    from retina.engine.signals import StopRequest
    from retina.engine.step import DTYPES
    from retina.evaluation.evaluate import Evaluation, evaluate_unless_stopped
    from retina.evaluation.pictures import evaluation_pictures
    from retina.interop.transfer import init_from
    from retina.losses.detection import DetectionLoss
    from retina.model.retinanet import retinanet
    from retina.model.weights import DetectorCard

    device = call(distributed.choose_device, "train.device", name=config.device)
    recipe = make_recipe(settings)
    trackers = build_trackers(settings["trackers"], settings["plugins"])
    if config.deterministic:
        torch.use_deterministic_algorithms(True)

    with distributed.process_group(device), ExitStack() as stack:
        run = Opened(*distributed.on_main(lambda: open_run(folder, settings, overwrite=settings["overwrite"])))
        if data.prepare and data.root:
            prepare, root = data.prepare, Path(data.root)
            distributed.on_main(lambda: build(prepare, "data.prepare", plugins=settings["plugins"], root=root))
        logger = RunLogger(folder, active=distributed.is_main(), trackers=trackers, settings=settings)
        stack.callback(logger.close)
        for line in run.told():
            logger.info(line)
        splits = ["train", "val"] if config.eval_every else ["train"]
        loaded = load_checked(data, splits, folder, say=logger.info)
        annotations, val_annotations = loaded[0], loaded[-1]

        if isinstance(recipe.criterion, DetectionLoss):
            call(recipe.criterion.check_classes, "loss", num_classes=len(annotations.classes))

        torch.manual_seed(config.seed)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        model = call(retinanet, "model", **settings["model"], num_classes=len(annotations.classes))
        model = model.to(memory_format=memory_format).to(device)
        if settings["init_from"] and not run.resumes:
            for line in init_from(model, settings["init_from"], classes=annotations.classes, remap=settings["remap"]):
                logger.info(line)
        optimizer = build_optimizer(recipe.optimizer, model, scale=config.batch_size / config.lr_batch_size)

        divisor = data.pad_multiple or max(model.strides)
        if model.arguments["anchors_spread"] and divisor % max(model.strides):
            raise ConfigError(
                f"data.pad_multiple: {divisor} - spread anchors stand on a grid only where it is a multiple of "
                f"{max(model.strides)}: give that, or model.anchors_spread=false"
            )
        pin_memory = device.type == "cuda"
        canvas = canvas_of(data, Canvas(divisor, model.pad_value))
        loader, sampler = build_train_loader(annotations, recipe.pipeline, data, config, canvas, pin_memory=pin_memory)
        val_batch = data.eval_batch_size or sampler.micro_batch
        val_loader = build_eval_loader(val_annotations, data, canvas, batch_size=val_batch, pin_memory=pin_memory)
        card = DetectorCard(
            model=model.arguments,
            classes=list(annotations.classes),
            category_ids=[i for i in annotations.category_ids if i is not None],
            preprocessing={
                "short_side": data.short_side,
                "long_side": data.long_side,
                "divisor": divisor,
                "pad_value": list(model.pad_value),
                "precision": config.precision,
                "batch_size": val_batch,
            },
            postprocess=without_target(settings["postprocess"]),
        )
        for line in describe_run(
            folder, config, device, annotations, val_annotations, model, optimizer, recipe.schedule, sampler
        ):
            logger.info(line)
        state = TrainState(model, optimizer, config, recipe.schedule)
        checkpointer = Checkpointer(
            folder, state, card=card, recorder=logger, allow_data_change=settings["allow_data_change"]
        )
        with StopRequest() as request:

            def score(model: torch.nn.Module) -> Evaluation | None:
                evaluation = evaluate_unless_stopped(
                    request.signal,
                    model,
                    logger.evaluating(val_loader, len(val_annotations)),
                    val_annotations,
                    postprocess=recipe.postprocess,
                    criterion=recipe.criterion,
                    device=device,
                    dtype=DTYPES[config.precision],
                )
                if evaluation and config.pictures and logger.active:
                    limits = {"max_images": config.pictures, "max_pixels": data.max_pixels}
                    picture = evaluation_pictures(val_annotations, evaluation.detections, **limits)
                    logger.picture(state.progress.step, "val/detections", picture)
                return evaluation

            stopped = fit(
                state,
                recipe.criterion,
                loader,
                evaluate=score if config.eval_every else None,
                checkpointer=checkpointer,
                recorder=logger,
                annotations=annotations,
                stopping=request.signal,
            )
        progress = state.progress
        report_skipped(logger, loader, val_loader)
        if stopped:
            logger.info(f"told to stop: saved at step {progress.step}, the same command goes on from there")
        else:
            best = (
                f", best {config.best_metric} {progress.best:.3f} at step {progress.best_step}"
                if progress.best is not None
                else ""
            )
            logger.curves()
            logger.info(f"finished at step {progress.step}{best}: {folder / 'best.safetensors'}")
            logger.info(f"next: python tools/eval.py checkpoint={folder}   |   curves: {folder / 'curves.png'}")
    return Result(128 + stopped if stopped else 0, progress.best)


def report_skipped(logger: "RunLogger", *loaders: "BatchLoader") -> None:
    """Lists the images that could not be read, those of other processes too."""
    from retina import distributed

    for loader in loaders:
        faults = dict(one for part in distributed.gather_objects(list(loader.faults.items())) for one in part)
        for line in sorted(faults.values()):
            logger.once(f"skipped: {line}")


def run_folder(runs: str, name: str) -> Path:
    """Raises ConfigError for a name that leads out of `runs`, or nowhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).name:
        raise ConfigError(f"name: {name!r} is no name of a folder in {runs} - give another, or runs=FOLDER")
    return Path(runs) / name
