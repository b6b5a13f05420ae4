"""Groups of processes for tests: forks of the test's own, since a new one needs seconds to load torch."""

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def in_processes(task: Callable[[int], None], folder: Path, world_size: int = 2) -> list[int | None]:
    """Exit codes of `task(rank)` in a gloo group that meets in `folder`. What hangs for a minute is killed."""
    store = f"file://{folder}/store_of_the_group"

    def process(rank: int) -> None:
        limit = datetime.timedelta(seconds=1000)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
        task(rank)
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,), daemon=True) for rank in range(world_size)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(1000)
        one.kill()
        one.join()
    return [one.exitcode for one in processes]
