"""A GPU whose memory is short, played by a criterion that takes few images at a time."""

import pytest
import torch

from faults import refused
from retina.engine.optim import build_optimizer
from retina.engine.shortage import Shortage
from retina.engine.step import StepResult, train_step
from retina.errors import RetinaError
from retina.losses.detection import DetectionLoss
from retina.model.retinanet import RetinaNet, retinanet
from retina.types import Batch, Losses, Predictions, Targets

IMAGES = 5


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 64, 64), dtype=torch.uint8, generator=generator)
    corners = 32 * torch.rand(IMAGES, 2, 2, generator=generator)
    yes = torch.ones(IMAGES, 2, dtype=torch.bool)
    targets = Targets(torch.cat((corners, corners + 24), dim=-1), torch.ones(IMAGES, 2).long(), yes, ~yes)
    sizes = torch.tensor([[64, 64]] * IMAGES)
    return Batch(images, sizes, targets, torch.arange(IMAGES), sizes)


def model() -> RetinaNet:
    torch.manual_seed(0)
    return retinanet(num_classes=3, backbone="resnet18_half", norm="group", fpn_channels=16, head_convs=1)


class Small:
    """The criterion, in the memory of `most` images."""

    def __init__(self, most: int) -> None:
        self.most, self.counts = most, list[int]()

    def __call__(self, predictions: Predictions, targets: Targets) -> Losses:
        count = len(targets.boxes)
        if count > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.counts.append(count)
        return DetectionLoss()(predictions, targets)


def update(network: RetinaNet, criterion: Small, shortage: Shortage) -> StepResult:
    optimizer = build_optimizer(lambda groups: torch.optim.SGD(groups, lr=0.1), network)

    def make(parts: list[Batch]) -> StepResult:
        return train_step(network, criterion, parts, optimizer=optimizer)

    return shortage.update(make, [batch()], 7)


def test_the_update_is_the_same_from_fewer_images_at_a_time() -> None:
    warnings: list[str] = []
    whole, parts, small = model(), model(), Small(2)
    expected = update(whole, Small(IMAGES), Shortage(1, halves=True, warn=warnings.append))
    assert warnings == []
    shortage = Shortage(1, halves=True, warn=warnings.append)
    result = update(parts, small, shortage)
    assert small.counts == [2, 1, 1, 1]
    assert shortage.accumulate == 4
    assert len(warnings) == 2
    torch.testing.assert_close(result.losses, expected.losses)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    small.counts.clear()
    update(parts, small, shortage)
    assert small.counts == [2, 1, 1, 1], "what did not fit is not tried again"
    assert len(warnings) == 2


@pytest.mark.parametrize(("halves", "most"), [(False, 2), (True, 0)])
def test_one_line_says_what_would_help(halves: bool, most: int) -> None:
    network = model()
    before = [p.clone() for p in network.parameters()]
    words = ["step 7", "64x64", "expandable_segments"] + (["train.accumulate=2"] if not halves else [])
    with refused("out-of-memory", *words, kind=RetinaError):
        update(network, Small(most), Shortage(1, halves=halves, warn=lambda line: None))
    assert all(torch.equal(x, y) for x, y in zip(network.parameters(), before, strict=True))
    assert all(p.grad is None for p in network.parameters())
