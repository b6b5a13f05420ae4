"""The training step on 1, 2, 4 processes (GPUs where there are several): equal losses, and what it costs to be many.

Every process has the same work, so that without communication a step would take as long as alone. Processes on a CPU
meet by gloo on one machine: where they outnumber its cores, wall time says nothing, processor time still does.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.run import main as torchrun

from benchmarks.step import make_batch
from retina import distributed
from retina.engine.optim import build_optimizer
from retina.engine.step import parallel, train_step
from retina.lab.clock import Bench, Row
from retina.losses.detection import DetectionLoss
from retina.model.retinanet import RetinaNet, retinanet
from retina.types import Batch, Targets

TOTAL = 4
"""Images of a step whose losses are compared, over all processes."""
OWN = 2
"""Images of each process in a step that is timed."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run(bench: Bench) -> list[Row]:
    cuda = bench.device.type == "cuda"
    counts = [1, 2] if bench.quick else [1, 2, 4]
    if cuda:
        counts = [count for count in counts if count <= torch.cuda.device_count()]
    with _torchrun_only(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)):
        results = {count: _launch(count, bench) for count in counts}
    alone = results[1]
    rows = []
    for count in counts[1:]:
        result = results[count]
        losses, wanted = torch.tensor(result["losses"]), torch.tensor(alone["losses"])
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
        row = partial(_row, f"scaling, {count} {'GPUs' if cuda else 'processes (gloo)'}")
        if cuda or count <= (os.cpu_count() or 1):
            efficiency = alone["wall"] / result["wall"]
            rows.append(row("efficiency (wall time of a step: one / many)", result["wall"], alone["wall"], efficiency))
        if not cuda:
            cost = result["processor"] / alone["processor"]
            rows.append(row("processor time per step: many / one", result["processor"], alone["processor"], cost))
        name = f"all-reduce of the gradients ({result['megabytes']:.0f} MB) / a step of one process (wall time)"
        rows.append(row(name, result["all_reduce"], alone["wall"], result["all_reduce"] / alone["wall"]))
    return rows


@contextmanager
def _torchrun_only(**variables: str) -> Iterator[None]:
    """Environment variables for the processes that are started meanwhile; torchrun's signal handlers go with them."""
    before = {name: os.environ.get(name) for name in variables}
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    os.environ.update(variables)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


def _row(who: str, what: str, ours: float, alone: float, ratio: float) -> Row:
    return Row(
        measure=f"{who}: {what}",
        ours=ours * 1000,
        reference=alone * 1000,
        unit="ms",
        ratio=ratio,
        must=None,
        goal=None,
        lower_is_better="efficiency" not in what,
    )


def _launch(count: int, bench: Bench) -> dict[str, Any]:
    """What rank 0 of `count` processes reports, started as torchrun does."""
    with TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        side, rounds = (64, 2) if bench.quick else (256, bench.rounds)
        work = ["benchmarks.scaling", bench.device.type, str(side), str(rounds), str(output)]
        torchrun(["--standalone", f"--nproc_per_node={count}", "-m", *work])
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def _work(device_type: str, side: int, rounds: int, output: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    device = distributed.choose_device(device_type)
    with distributed.process_group(device):
        result = {"losses": _losses(device), **_times(device, side, rounds)}
        if distributed.is_main():
            output.write_text(json.dumps(result))


def _losses(device: torch.device) -> list[list[float]]:
    """Of three updates on the same images, however many processes share them."""
    share = TOTAL // distributed.world_size()
    step = _stepper(
        _part(_drawn(TOTAL, 64, device), slice(distributed.rank() * share, (distributed.rank() + 1) * share))
    )
    return [step().tolist() for _ in range(3)]


def _times(device: torch.device, side: int, rounds: int) -> dict[str, float]:
    """Medians in seconds: a step by the clock and by the processor, and an all-reduce of as much as the gradients."""
    step = _stepper(_drawn(OWN, side, device))
    size = sum(parameter.numel() for parameter in _model(device).parameters())
    gradients = torch.zeros(size, device=device)

    def timed(work: Callable[[], object]) -> tuple[float, float]:
        wall, processor = [], []
        for number in range(rounds + 2):
            distributed.all_reduce_sum(torch.zeros(1, device=device)).item()  # all begin together
            started, processor_started = time.perf_counter(), time.process_time()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                wall.append(time.perf_counter() - started)
                processor.append(time.process_time() - processor_started)
        return median(wall), median(processor)

    wall, processor = timed(step)
    all_reduce, _ = timed(lambda: distributed.all_reduce_sum(gradients))
    return {"wall": wall, "processor": processor, "all_reduce": all_reduce, "megabytes": size * 4 / 1e6}


def _stepper(batch: Batch) -> Callable[[], torch.Tensor]:
    """An update of a new model, the same in every process; returns the losses of all processes together."""
    device = batch.images.device
    model = _model(device)
    optimizer = build_optimizer(partial(torch.optim.SGD, lr=0.01, momentum=0.9), model)
    net = parallel(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    criterion = DetectionLoss()

    def step() -> torch.Tensor:
        return train_step(
            net, criterion, [batch], optimizer=optimizer, scaler=scaler, dtype=torch.float32, clip_norm=None
        ).losses

    return step


def _model(device: torch.device) -> RetinaNet:
    torch.manual_seed(0)
    model = retinanet(num_classes=5, backbone="resnet18", norm="group", fpn_channels=64, head_convs=2)
    model.to(memory_format=torch.channels_last)
    return model.to(device).train()


def _drawn(images: int, side: int, device: torch.device) -> Batch:
    torch.manual_seed(1)
    return make_batch(images, side, side, device, num_classes=5)


def _part(batch: Batch, rows: slice) -> Batch:
    images, sizes, targets, indices, original_sizes = batch
    return Batch(
        images[rows], sizes[rows], Targets(*(field[rows] for field in targets)), indices[rows], original_sizes[rows]
    )


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
