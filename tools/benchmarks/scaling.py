"""The training step on 1, 2, 4 processes (GPUs where there are several): equal losses, and what it costs to be many.

Every process has the same work, so that without communication a step would take as long as alone. Processes on a CPU
meet by gloo on one machine: where they outnumber its cores, wall time says nothing, processor time still does.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.run import main as torchrun

from benchmarks.step import make_batch, small_model
from retina import distributed
from retina.engine.optim import build_optimizer
from retina.engine.step import parallel, train_step
from retina.files import write_whole
from retina.lab.clock import Bench, Row, absolute
from retina.losses.detection import DetectionLoss
from retina.types import Batch, Targets

TOTAL = 4
"""Images of a step whose losses are compared, over all processes."""
OWN = 2
"""Images of each process in a step that is timed."""


def run(bench: Bench) -> list[Row]:
    cuda = bench.device.type == "cuda"
    counts = [1, 2] if bench.quick else [1, 2, 4]
    if cuda:
        counts = [count for count in counts if count <= torch.cuda.device_count()]
    results = {count: launch(count, bench) for count in counts}
    alone = results[1]
    rows = []
    for count in counts[1:]:
        many = results[count]
        torch.testing.assert_close(*(torch.tensor(r["losses"]) for r in (many, alone)), rtol=1e-5, atol=1e-5)
        row = partial(compare, f"scaling, {count} {'GPUs' if cuda else 'processes (gloo)'}")
        if cuda or count <= (os.cpu_count() or 1):
            measure = "efficiency (wall time of a step: one / many)"
            rows.append(replace(row(measure, many["wall"], alone["wall"]), ratio=alone["wall"] / many["wall"]))
        if not cuda:
            rows.append(row("processor time per step: many / one", many["processor"], alone["processor"]))
        measure = f"all-reduce of the gradients ({many['megabytes']:.0f} MB) / a step of one process (wall time)"
        rows.append(row(measure, many["all_reduce"], alone["wall"]))
    return rows


def compare(who: str, measure: str, many: float, alone: float) -> Row:
    row = absolute(f"{who}: {measure}", many * 1000, "ms", lower_is_better="efficiency" not in measure)
    return replace(row, reference=alone * 1000, ratio=many / alone)


def launch(count: int, bench: Bench) -> dict[str, Any]:
    """What rank 0 of `count` processes reports, started by torchrun."""
    with TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        side, rounds = (64, 2) if bench.quick else (256, bench.rounds)
        words = ["--standalone", f"--nproc_per_node={count}", "-m", "benchmarks.scaling"]
        words += [bench.device.type, str(side), str(rounds), str(output)]
        with patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)):
            process = get_context("spawn").Process(target=torchrun, args=(words,))  # its signal handlers go with it
            process.start()
            process.join()
        assert process.exitcode == 0
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def work(device_type: str, side: int, rounds: int, output: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    device = distributed.choose_device(device_type)
    with distributed.process_group(device):
        result = {"losses": losses(device), **times(device, side, rounds)}
        if distributed.is_main():
            write_whole(output, json.dumps(result).encode())


def losses(device: torch.device) -> list[list[float]]:
    """Of three updates on the same images, however many processes share them."""
    images, sizes, targets, indices, original_sizes = draw(TOTAL, 64, device)
    share = slice(distributed.rank(), TOTAL, distributed.world_size())
    objects = Targets(*(field[share] for field in targets))
    step = stepper(Batch(images[share], sizes[share], objects, indices[share], original_sizes[share]))
    return [step().tolist() for _ in range(3)]


def times(device: torch.device, side: int, rounds: int) -> dict[str, float]:
    """Medians in seconds: a step by the clock and by the processor, and an all-reduce of as much as the gradients."""
    step = stepper(draw(OWN, side, device))
    size = sum(parameter.numel() for parameter in small_model(device, norm="group").parameters())
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


def stepper(batch: Batch) -> Callable[[], torch.Tensor]:
    """An update of a new model, the same in every process; returns the losses of all processes together."""
    torch.manual_seed(0)
    model = small_model(batch.images.device, norm="group")
    optimizer = build_optimizer(partial(torch.optim.SGD, lr=0.01, momentum=0.9), model)
    net, criterion = parallel(model, batch.images.device), DetectionLoss()
    return lambda: train_step(net, criterion, [batch], optimizer=optimizer).losses


def draw(images: int, side: int, device: torch.device) -> Batch:
    torch.manual_seed(1)
    return make_batch(images, side, side, device, num_classes=5)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
