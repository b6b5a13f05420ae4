"""What the training loop adds to the bare updates: logging, the moving average, bookkeeping, with a tiny model."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.step import make_batch, small_model
from retina.data.coco import Annotations, read_coco
from retina.data.shapes import write_shapes
from retina.engine.checkpointer import Checkpointer, TrainState
from retina.engine.config import TrainConfig
from retina.engine.logging import RunLogger
from retina.engine.loop import fit
from retina.engine.optim import MultiStep, build_optimizer, set_learning_rate
from retina.engine.step import train_step
from retina.lab.clock import Bench, Row, Times, cost
from retina.losses.detection import DetectionLoss
from retina.losses.diagnose import with_diagnosis
from retina.model.retinanet import RetinaNet
from retina.model.weights import DetectorCard
from retina.types import Batch

IMAGES = 4
SIDE = 256
SHAPE = f"ResNet-18, {IMAGES} x {SIDE} x {SIDE}"
SCHEDULE = MultiStep(warmup=1, milestones=())


def run(bench: Bench) -> list[Row]:
    steps = 3 if bench.quick else 6
    model = small_model(bench.device, norm="frozen")
    batch = make_batch(IMAGES, SIDE, SIDE, bench.device, num_classes=5)
    with TemporaryDirectory() as scratch:
        write_shapes(Path(scratch, "data"), num_train=IMAGES * steps, num_val=1, image_size=[64, 64])
        annotations = read_coco(Path(scratch, "data/annotations/instances_train.json"), Path(scratch, "data/train"))

        def train(length: int) -> RetinaNet:
            return loop(copy.deepcopy(model), batch, annotations, length)

        def train_bare(length: int) -> RetinaNet:
            return bare(copy.deepcopy(model), batch, length)

        assert_same(train(steps), train_bare(steps))
        ways: dict[str, Callable[[], object]] = {}
        for name, way in (("ours", train), ("reference", train_bare)):
            ways |= {f"{name}, all": partial(way, 1 + steps), f"{name}, start": partial(way, 1)}
        times = bench.time(ways, warmup=1)
    # the copy of the model, the first allocations and the last checkpoint fall out of the differences
    sides = {}
    for name in ("ours", "reference"):
        pairs = zip(times[f"{name}, all"].seconds, times[f"{name}, start"].seconds, strict=True)
        sides[name] = Times([whole - start for whole, start in pairs])
    name = f"{steps} steps in the training loop / bare, {SHAPE}"
    return [cost(name, sides, must=1.05, goal=1.01), diagnosis(bench, model, batch)]


def diagnosis(bench: Bench, model: RetinaNet, batch: Batch) -> Row:
    """What an update costs of which is told what its loss is made of. One in train.log_every is, 20 by default: a fifth
    more for it is 1 % of the run."""
    plain = DetectionLoss()
    diagnosed, _ = with_diagnosis(plain, prior=0.01)
    diagnosed_model, plain_model = (bare(copy.deepcopy(model), batch, 2, criterion) for criterion in (diagnosed, plain))
    assert_same(diagnosed_model, plain_model)
    ways = {
        "ours": partial(bare, diagnosed_model, batch, 1, diagnosed),
        "reference": partial(bare, plain_model, batch, 1, plain),
    }
    return cost(f"update with diagnosis / without, {SHAPE}", bench.time(ways, warmup=1), must=1.2, goal=1.05)


def assert_same(model: RetinaNet, reference: RetinaNet) -> None:
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter, expected), "the two train something else"


def loop(model: RetinaNet, batch: Batch, annotations: Annotations, length: int) -> RetinaNet:
    """Trains on the same batch over and over, so that only the loop is measured."""
    settings: dict[str, Any] = {"clip_norm": None, "eval_every": None, "save_every": 10**6, "pictures": 0}
    config = TrainConfig(length=length, batch_size=IMAGES, ema=0.999, log_every=20, **settings)
    state = TrainState(model, make_optimizer(model), config, SCHEDULE)
    card = DetectorCard(model=model.arguments, classes=[], category_ids=[], preprocessing={}, postprocess={})
    with TemporaryDirectory() as folder:
        recorder = RunLogger(Path(folder), active=True)
        checkpointer = Checkpointer(Path(folder), state, card=card, recorder=recorder)
        batches = [batch] * length
        fit(state, DetectionLoss(), batches, checkpointer=checkpointer, recorder=recorder, annotations=annotations)
        recorder.close()
    return model


def bare(model: RetinaNet, batch: Batch, steps: int, criterion: DetectionLoss | None = None) -> RetinaNet:
    optimizer = make_optimizer(model)
    model.train()
    for step in range(steps):
        set_learning_rate(optimizer, SCHEDULE(step, total=steps, steps_per_epoch=steps))
        train_step(model, criterion or DetectionLoss(), [batch], optimizer=optimizer)
    return model


def make_optimizer(model: RetinaNet) -> torch.optim.Optimizer:
    return build_optimizer(partial(torch.optim.SGD, lr=1e-4, momentum=0.9), model)
