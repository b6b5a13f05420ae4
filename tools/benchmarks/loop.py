"""What the training loop adds to the bare updates: logging, the moving average, bookkeeping, with a tiny model."""

import copy
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.step import make_batch
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
from retina.model.retinanet import RetinaNet, retinanet
from retina.model.weights import DetectorCard
from retina.types import Batch

IMAGES = 4
SIDE = 256


class Replay:
    """A loader without data: one batch for ever, so that only the loop is measured."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.steps)


def run(bench: Bench) -> list[Row]:
    steps, start = (3, 1) if bench.quick else (6, 1)
    model = retinanet(num_classes=5, backbone="resnet18", norm="frozen", fpn_channels=64, head_convs=2)
    model.to(bench.device).to(memory_format=torch.channels_last)
    batch = make_batch(IMAGES, SIDE, SIDE, bench.device, num_classes=5)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_shapes(root / "data", num_train=IMAGES * steps, num_val=1, image_size=[64, 64])
        annotations = read_coco(root / "data/annotations/instances_train.json", root / "data/train")

        def whole(length: int) -> RetinaNet:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                return loop(copy.deepcopy(model), batch, annotations, Path(folder), length, bench.device)

        one, other = whole(steps), bare(copy.deepcopy(model), batch, steps)
        for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs), "the loop trains something else"
        times = bench.time(
            {
                "ours, all": lambda: whole(start + steps),
                "ours, start": lambda: whole(start),
                "reference, all": lambda: bare(copy.deepcopy(model), batch, start + steps),
                "reference, start": lambda: bare(copy.deepcopy(model), batch, start),
            },
            warmup=1,
        )
    # the copy of the model, the first allocations and the last checkpoint fall out of the differences
    sides = {
        side: Times(
            [a - s for a, s in zip(times[f"{side}, all"].seconds, times[f"{side}, start"].seconds, strict=True)]
        )
        for side in ("ours", "reference")
    }
    name = f"{steps} steps in the training loop / bare, ResNet-18, {IMAGES} x {SIDE} x {SIDE}"
    return [cost(name, sides, must=1.05, goal=1.01), looked_at(bench, model, batch)]


def looked_at(bench: Bench, model: RetinaNet, batch: Batch) -> Row:
    """What an update costs of which is told what its loss is made of. One in train.log_every is, 20 by default: a fifth
    more for it is 1 % of the run."""
    plain = DetectionLoss()
    diagnosed, _ = with_diagnosis(plain, prior=0.01)
    one, other = (bare(copy.deepcopy(model), batch, 2, criterion) for criterion in (diagnosed, plain))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), "looking changes the update"
    times = bench.time(
        {"ours": lambda: bare(one, batch, 1, diagnosed), "reference": lambda: bare(other, batch, 1, plain)}, warmup=1
    )
    return cost(f"update with diagnosis / without, ResNet-18, {IMAGES} x {SIDE} x {SIDE}", times, must=1.2, goal=1.05)


def loop(
    model: RetinaNet, batch: Batch, annotations: Annotations, folder: Path, length: int, device: torch.device
) -> RetinaNet:
    config = TrainConfig(
        length=length,
        batch_size=IMAGES,
        ema=0.999,
        clip_norm=None,
        eval_every=None,
        save_every=10**6,
        log_every=20,
        pictures=0,
    )
    recorder = RunLogger(folder, active=True)
    state = TrainState(model, make_optimizer(model), config, MultiStep(warmup=1, milestones=()))
    card = DetectorCard(model=model.arguments, classes=[], category_ids=[], preprocessing={}, postprocess={})
    checkpointer = Checkpointer(folder, state, card=card, recorder=recorder)
    loader = Replay(batch, length)
    fit(state, DetectionLoss(), loader, checkpointer=checkpointer, recorder=recorder, annotations=annotations)
    recorder.close()
    return model


def bare(model: RetinaNet, batch: Batch, steps: int, criterion: DetectionLoss | None = None) -> RetinaNet:
    optimizer = make_optimizer(model)
    model.train()
    for step in range(steps):
        set_learning_rate(optimizer, MultiStep(warmup=1, milestones=())(step, total=steps, steps_per_epoch=steps))
        train_step(model, criterion or DetectionLoss(), [batch], optimizer=optimizer)
    return model


def make_optimizer(model: RetinaNet) -> torch.optim.Optimizer:
    return build_optimizer(partial(torch.optim.SGD, lr=1e-4, momentum=0.9), model)
