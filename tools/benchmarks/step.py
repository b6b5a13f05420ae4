"""The whole training step, against nothing but its convolutions and against torchvision's RetinaNet."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.torchvision_model import pair, target_dicts, unit_images
from retina.cli.build import build
from retina.cli.compose import compose
from retina.engine.optim import build_optimizer
from retina.engine.step import train_step
from retina.lab.clock import Bench, Row, absolute, cost, speedup
from retina.losses.detection import DetectionLoss
from retina.model.retinanet import RetinaNet, retinanet
from retina.precision import float32_as
from retina.types import DTYPES, Batch, Criterion, Targets

OBJECTS = 8
"""Per image; COCO has 7.3 on average."""


def run(bench: Bench) -> list[Row]:
    cuda = bench.device.type == "cuda"
    images, height, width = (16, 800, 1088) if cuda else (2, 512, 512)
    if bench.quick:
        images, height, width = 2, 128, 128
    model, reference = pair(device=bench.device)
    batch = make_batch(images, height, width, bench.device)
    with float32_as("fp32"):  # TF32 would be 1.7e-4 off
        check_losses(model, reference, batch)

    precisions = ["bf16"] if bench.quick else ["fp32", "bf16"]  # a part of the work is enough to see that it runs
    ways = {"torchvision": torchvision_step(reference, batch, amp=cuda)}
    for name in precisions:
        ways |= {name: our_step(model, batch, DTYPES[name]), f"floor {name}": convolutions(model, batch, DTYPES[name])}
    default, bare = Parts.of([], bench.device), Parts.of(["model.head_norm=null"], bench.device)
    for name in precisions:
        ways[f"default {name}"] = default.step([batch], DTYPES[name])
        ways[f"default floor {name}"] = convolutions(bare.model, batch, DTYPES[name])
    times = bench.time(ways)

    floor = {"must": 1.20, "goal": 1.05} if cuda else {"must": 1.06, "goal": 1.02}
    shape = f"{images} x {height} x {width}"
    rows = []
    for name in precisions:
        sides = {"ours": times[name], "reference": times[f"floor {name}"]}
        rows.append(cost(f"step {name} / its convolutions, {shape}", sides, **floor))
        sides = {"ours": times[f"default {name}"], "reference": times[f"default floor {name}"]}
        rows.append(cost(f"default recipe: step {name} / its convolutions, {shape}", sides, **floor))
    if not (cuda or bench.quick):  # the size that is trained at, where the optimizer weighs less
        large = make_batch(2, 800, 1088, bench.device)
        ways = {"ours": our_step(model, large, torch.bfloat16), "reference": convolutions(model, large, torch.bfloat16)}
        rows.append(cost("step bf16 / its convolutions, 2 x 800 x 1088", bench.time(ways, warmup=1), **floor))
    bars = {"fp32": (1.0, 1.06), "bf16": (1.5, 2.5) if cuda else (1.8, 2.1)}
    for name in precisions:
        sides = {"ours": times[name], "reference": times["torchvision"]}
        measure = f"step {name} vs torchvision {'under AMP' if cuda else 'fp32'}, {shape}"
        rows.append(speedup(measure, sides, must=bars[name][0], goal=bars[name][1]))
    if cuda:
        speed = images / times["bf16"].median
        rows.append(absolute("training bf16", speed, "images/s", must=130, goal=270, lower_is_better=False))
    return rows


def make_batch(images: int, height: int, width: int, device: torch.device, num_classes: int = 80) -> Batch:
    """Random pixels and boxes of 16 pixels to half the canvas; only the number of objects is the same everywhere."""
    side = torch.tensor([width, height]).float()
    size = 16 + torch.rand(images, OBJECTS, 2) ** 2 * (side / 2 - 16)
    corner = torch.rand(images, OBJECTS, 2) * (side - size)
    targets = Targets(
        boxes=torch.cat([corner, corner + size], dim=-1).to(device),
        labels=torch.randint(num_classes, (images, OBJECTS), device=device),
        valid=torch.ones(images, OBJECTS, dtype=torch.bool, device=device),
        crowd=torch.zeros(images, OBJECTS, dtype=torch.bool, device=device),
    )
    pixels = torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    sizes = torch.tensor([[height, width]] * images, device=device)
    return Batch(pixels, sizes, targets, torch.arange(images, device=device), sizes)


def small_model(device: torch.device, *, norm: str) -> RetinaNet:
    """The same for the same seed of torch."""
    model = retinanet(num_classes=5, backbone="resnet18", norm=norm, fpn_channels=64, head_convs=2)
    return model.to(device).to(memory_format=torch.channels_last).train()


class Parts(NamedTuple):
    """What a recipe trains, as from published weights: fixed statistics and two frozen stages."""

    model: RetinaNet
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    clip_norm: float | None

    @classmethod
    def of(cls, words: list[str], device: torch.device, num_classes: int = 80) -> "Parts":
        """Of a recipe in the words of `tools/train.py`; none are the default."""
        settings = compose("train", ["data=coco", *words])
        arguments = settings["model"] | {"norm": "frozen", "frozen_stages": 2}
        model = retinanet(**arguments, num_classes=num_classes).to(memory_format=torch.channels_last).to(device)
        optimizer = build_optimizer(build(settings["optimizer"], "optimizer"), model)
        return cls(model.train(), build(settings["loss"], "loss"), optimizer, settings["train"]["clip_norm"])

    def step(self, micro_batches: list[Batch], dtype: torch.dtype) -> Callable[[], object]:
        options: dict[str, Any] = {"optimizer": self.optimizer, "dtype": dtype, "clip_norm": self.clip_norm}
        return lambda: train_step(self.model, self.criterion, micro_batches, **options)


def our_step(model: RetinaNet, batch: Batch, dtype: torch.dtype) -> Callable[[], object]:
    """With the optimizer as training builds it."""
    sgd = partial(torch.optim.SGD, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    optimizer = build_optimizer(sgd, model)
    criterion = DetectionLoss()
    return lambda: train_step(model, criterion, [batch], optimizer=optimizer, dtype=dtype)


def convolutions(model: RetinaNet, batch: Batch, dtype: torch.dtype) -> Callable[[], object]:
    """Backbone, FPN and head, forward and backward from random gradients of their outputs: what no step can save."""
    images = model.normalize(batch.images).contiguous(memory_format=torch.channels_last)
    gradients: list[Tensor] = []

    def floor() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits, deltas, _ = model.head(model.fpn(model.backbone(images)))
        outputs = [*logits, *deltas]
        if not gradients:
            gradients.extend(torch.randn_like(output) * 1e-3 for output in outputs)
        torch.autograd.backward(outputs, gradients)
        model.zero_grad(set_to_none=True)

    return floor


def torchvision_step(model: nn.Module, batch: Batch, *, amp: bool) -> Callable[[], object]:
    """As torchvision's reference script trains: SGD with its defaults, optionally mixed precision with loss scaling."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(batch.images.device.type, enabled=amp)

    def step() -> None:
        images = unit_images(batch.images)
        with torch.autocast(batch.images.device.type, torch.float16) if amp else nullcontext():
            losses = model(images, target_dicts(batch.targets))
        optimizer.zero_grad()
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


@torch.no_grad()
def check_losses(model: RetinaNet, reference: nn.Module, batch: Batch) -> None:
    """Both losses of every image within 1e-4 of torchvision's, which divides each image by its own positives."""
    expected = reference(unit_images(batch.images), target_dicts(batch.targets))
    means = torch.zeros(2, device=batch.images.device)
    for image in range(len(batch.images)):
        row = slice(image, image + 1)
        losses = DetectionLoss()(model(batch.images[row]), Targets(*(field[row] for field in batch.targets)))
        means += torch.stack(losses[:2]) / losses.num_positives / len(batch.images)
    expected_means = torch.stack([expected["classification"], expected["bbox_regression"]])
    torch.testing.assert_close(means, expected_means, rtol=1e-4, atol=0)
