"""One update, on one process and on several."""

import os
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from retina import distributed
from retina.engine.optim import build_optimizer
from retina.engine.step import parallel, train_step
from retina.losses.boxes import giou
from retina.losses.detection import DetectionLoss
from retina.model.retinanet import RetinaNet, retinanet
from retina.types import Batch, Losses, Predictions, Targets

STEPS, IMAGES, SIDE = 6, 8, 64


WEIGHTED = DetectionLoss(box_loss=giou, box_weighting="score")


def tiny_model(norm: str = "group", prior: float = 0.01) -> RetinaNet:
    torch.manual_seed(0)
    return retinanet(
        num_classes=3, backbone="resnet18", norm=norm, fpn_channels=16, head_convs=1, levels=(3, 4, 5), prior=prior
    ).train()


def images_of_step(step: int, picked: slice) -> Batch:
    """The last half of the images has no objects."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    corner = torch.rand(IMAGES, 2, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(IMAGES, 2, 2, generator=generator)], dim=-1)
    labels = torch.randint(0, 3, (IMAGES, 2), generator=generator)
    valid = torch.zeros(IMAGES, 2, dtype=torch.bool)
    valid[: IMAGES // 2] = True
    sizes = torch.full((IMAGES, 2), SIDE)
    targets = Targets(boxes[picked], labels[picked], valid[picked], torch.zeros_like(valid)[picked])
    return Batch(images[picked], sizes[picked], targets, torch.arange(IMAGES)[picked], sizes[picked])


def run_steps(
    accumulate: int,
    dtype: torch.dtype = torch.float32,
    clip_norm: float | None = 1.0,
    lr: float = 0.002,
    fused: bool | None = None,
    criterion: DetectionLoss = DetectionLoss(),  # noqa: B008
    prior: float = 0.01,
) -> torch.Tensor:
    """Losses and gradient norms [STEPS 3] of this process group. At ten times this learning rate the last digit of a
    weight decides on units of a ReLU soon enough to differ by more than rounding within so few steps."""
    model = tiny_model(prior=prior).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(partial(torch.optim.SGD, lr=lr, momentum=0.9, fused=fused), model)
    net = parallel(model, torch.device("cpu"))
    size = IMAGES // (distributed.world_size() * accumulate)
    rows = []
    for step in range(STEPS):
        starts = [distributed.rank() * size * accumulate + i * size for i in range(accumulate)]
        result = train_step(
            net,
            criterion,
            [images_of_step(step, slice(start, start + size)) for start in starts],
            optimizer=optimizer,
            scaler=torch.amp.GradScaler("cpu", enabled=dtype == torch.float16),
            dtype=dtype,
            clip_norm=clip_norm,
        )
        rows.append(torch.stack([*result.losses, result.grad_norm]))
    return torch.stack(rows)


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        for accumulate in (1, 2):
            losses = run_steps(accumulate)
            if distributed.is_main():
                torch.save(losses, Path(folder, f"{accumulate}.pt"))
            weighted = run_steps(accumulate, criterion=WEIGHTED, prior=0.3)
            if distributed.is_main():
                torch.save(weighted, Path(folder, f"weighted_{accumulate}.pt"))
        torch.save(spoiled_step(), Path(folder, f"spoiled_{rank}.pt"))
        torch.save(agreements(), Path(folder, f"agreed_{rank}.pt"))


def spoiled_step() -> dict[str, object]:
    """What each rank makes of a step in which rank 1 alone has a box that is no number."""
    model = tiny_model()
    net = parallel(model, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batch = images_of_step(0, slice(0, 2))
    if distributed.rank() == 1:
        batch.targets.boxes[0, 0, 2] = float("nan")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = train_step(net, WEIGHTED, [batch], optimizer=optimizer, scaler=scaler, dtype=torch.float32, clip_norm=None)
    same = all(map(torch.equal, model.state_dict().values(), tiny_model().state_dict().values()))
    return {"updated": bool(result.updated), "same": same, "rank_sums": bool(result.rank_sums.isfinite().all())}


def agreements() -> list[tuple[int, bool]]:
    first = distributed.rank() == 0
    return [
        tuple(distributed.agree()),
        tuple(distributed.agree(stop=0 if first else signal.SIGINT)),
        tuple(distributed.agree(stop=signal.SIGINT if first else signal.SIGTERM)),
        tuple(distributed.agree(error=not first)),
        tuple(distributed.agree(stop=signal.SIGTERM, error=True)),
    ]


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the losses of two processes for each accumulation."""
    folder = tmp_path_factory.mktemp("losses")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, str(folder)), nprocs=2, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    return run_steps(accumulate=1)


def test_classification_loss_falls() -> None:
    losses = run_steps(accumulate=1, lr=0.05)
    assert losses.isfinite().all()
    assert losses[-3:, 0].max() < losses[:3, 0].min()


def test_the_fused_optimizer_is_the_plain_one(alone: torch.Tensor) -> None:
    """Its kernels take the gradients' layout in memory for granted."""
    torch.testing.assert_close(run_steps(accumulate=1, fused=False), alone, rtol=1e-5, atol=1e-5)


def test_accumulation_changes_nothing(alone: torch.Tensor) -> None:
    torch.testing.assert_close(run_steps(accumulate=4), alone, rtol=1e-5, atol=1e-5)


# rank 1 sees only images without objects
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(alone: torch.Tensor, on_two_processes: Path, accumulate: int) -> None:
    losses = torch.load(on_two_processes / f"{accumulate}.pt", weights_only=True)
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def weighted_alone() -> torch.Tensor:
    """With scores of 0.3, so that the weights of a step sum to more than 1."""
    return run_steps(accumulate=1, criterion=WEIGHTED, prior=0.3)


def test_accumulation_changes_nothing_where_boxes_have_a_divisor_of_their_own(weighted_alone: torch.Tensor) -> None:
    losses = run_steps(accumulate=4, criterion=WEIGHTED, prior=0.3)
    torch.testing.assert_close(losses, weighted_alone, rtol=1e-5, atol=1e-5)
    assert (weighted_alone[:, 1] - run_steps(accumulate=1, prior=0.3)[:, 1]).abs().min() > 1e-2  # another loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one_where_boxes_have_a_divisor_of_their_own(
    weighted_alone: torch.Tensor, on_two_processes: Path, accumulate: int
) -> None:
    losses = torch.load(on_two_processes / f"weighted_{accumulate}.pt", weights_only=True)
    torch.testing.assert_close(losses, weighted_alone, rtol=1e-5, atol=1e-5)


def as_dropout(*_: object) -> None:
    torch.rand(())


@pytest.mark.parametrize("padding", [0, 16])
def test_the_look_ahead_leaves_no_trace(padding: int) -> None:
    """Running statistics and random numbers are as without it."""
    traces = []
    for criterion in (DetectionLoss(), WEIGHTED):
        model = tiny_model("batch")
        model.fpn.register_forward_pre_hook(as_dropout)
        batches = [images_of_step(0, slice(start, start + 2)) for start in range(0, IMAGES, 2)]
        batches = [batch._replace(sizes=batch.sizes - padding) for batch in batches]
        torch.manual_seed(1)
        train_step(model, criterion, batches, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        traces.append([*distributed.running_statistics(model), torch.get_rng_state()])
    assert all(map(torch.equal, *traces))


@pytest.mark.parametrize("criterion", [DetectionLoss(), WEIGHTED], ids=["one divisor", "two"])
def test_divisors_are_those_of_the_whole_step(criterion: DetectionLoss) -> None:
    model = tiny_model(prior=0.3)
    batch = images_of_step(0, slice(None))
    losses = criterion(model(batch.images, batch.sizes), batch.targets)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(losses.total(), list(parameters.values()))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    micro = [images_of_step(0, slice(i, i + 2)) for i in range(0, IMAGES, 2)]
    result = train_step(model, criterion, micro, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    for (name, p), gradient in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(before[name] - p, gradient, rtol=1e-4, atol=1e-6, msg=name)
    norm = torch.stack([g.norm() for g in expected]).norm()
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_spoils_one_rank_is_known_to_all(on_two_processes: Path, rank: int) -> None:
    told = torch.load(on_two_processes / f"spoiled_{rank}.pt", weights_only=True)
    assert told == {"updated": False, "same": True, "rank_sums": rank == 0}
    agreed = torch.load(on_two_processes / f"agreed_{rank}.pt", weights_only=True)
    assert agreed == [
        (0, False),
        (signal.SIGINT, False),
        (signal.SIGTERM, False),
        (0, True),
        (signal.SIGTERM, True),
    ]


def test_a_step_without_any_object_trains() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    empty = images_of_step(0, slice(IMAGES // 2, None))
    result = train_step(
        model, DetectionLoss(), [empty], optimizer=optimizer, scaler=scaler, dtype=torch.float32, clip_norm=None
    )
    assert result.positives.item() == 0
    assert result.losses[0] > 0
    assert result.losses[1] == 0
    assert all(p.isfinite().all() for p in model.parameters())


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [value.clone() for value in (*model.state_dict().values(), *moments)]


def vertical_tangent(predictions: Predictions, targets: Targets) -> Losses:
    """A criterion with a finite value and an infinite gradient."""
    losses = DetectionLoss()(predictions, targets)
    return losses._replace(box=losses.box + (predictions.deltas[0] * 0).sum().sqrt())


@pytest.mark.parametrize("place", ["pixels", "boxes", "weights", "gradient", "averages"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_number_that_is_not_finite_changes_nothing(place: str, norm: str) -> None:
    model = tiny_model(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = vertical_tangent if place == "gradient" else DetectionLoss()
    batch = images_of_step(0, slice(None))
    averages = [torch.ones(3), torch.zeros(2)]
    arguments = {
        "optimizer": optimizer,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "dtype": torch.float32,
        "clip_norm": 1.0,
        "averages": averages,
    }
    assert train_step(model, DetectionLoss(), [batch], **arguments).updated
    if place == "pixels":
        model.std.zero_()
    elif place == "boxes":
        batch.targets.boxes[-1, -1, 0] = float("nan")  # not even a valid object
    elif place == "weights":
        next(model.parameters()).data.view(-1)[0] = float("inf")
    elif place == "averages":
        averages[1][0] = float("inf")
    before = state_of(model, optimizer)
    result = train_step(model, criterion, [batch, images_of_step(1, slice(None))], **arguments)
    assert not result.updated
    after = state_of(model, optimizer)
    counters = [name.endswith("num_batches_tracked") for name in model.state_dict()]
    for one, two, counter in zip(before, after, counters + [False] * len(after), strict=False):
        assert counter or torch.equal(one, two)


def test_more_objects_than_anchors_and_identical_boxes_of_different_classes() -> None:
    model = tiny_model()
    batch = images_of_step(0, slice(0, 1))
    anchors = sum(len(level) for level in model(batch.images).anchors)
    count = anchors + 10
    boxes = torch.tensor([8.0, 8.0, 40.0, 40.0]).repeat(1, count, 1)
    targets = Targets(
        boxes, torch.arange(count)[None] % 3, torch.ones(1, count, dtype=torch.bool), torch.zeros(1, count).bool()
    )
    losses = WEIGHTED(model(batch.images, batch.sizes), targets)
    assert torch.stack(losses).isfinite().all()
    # the first of equal boxes takes all their anchors, as argmax does
    only_first = WEIGHTED(model(batch.images, batch.sizes), Targets(*(field[:, :1] for field in targets)))
    torch.testing.assert_close(torch.stack(losses), torch.stack(only_first))


def test_bfloat16_stays_near_float32(alone: torch.Tensor) -> None:
    half = run_steps(accumulate=1, dtype=torch.bfloat16)
    torch.testing.assert_close(half[:3, :2], alone[:3, :2], rtol=0.02, atol=0.0)
