"""Peak memory of a training step above the weights and the optimizer's state, each side in a process of its own."""

import ctypes
import gc
import multiprocessing
import sys
from dataclasses import replace

import torch

from benchmarks.step import check_losses, make_batch, our_step, torchvision_step
from benchmarks.torchvision_model import pair
from retina.lab.clock import Bench, Row, absolute, peak_memory
from retina.precision import float32_as


def run(bench: Bench) -> list[Row]:
    side = 128 if bench.quick else 512
    context = multiprocessing.get_context("spawn")  # a fork would share, and so hide, what the first has allocated
    with context.Pool(1, maxtasksperchild=1) as pool:
        peak, reference_peak = (pool.apply(step_peak, (who, side, str(bench.device))) for who in ("ours", "reference"))
    row = absolute(f"peak memory of a step, 2 x {side} x {side} fp32", peak / 2**20, "MiB", must=0.95, goal=0.87)
    return [replace(row, reference=reference_peak / 2**20, ratio=peak / reference_peak)]


def step_peak(who: str, side: int, device: str) -> int:
    """Bytes, of the third step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, reference = pair(device=torch.device(device))
    batch = make_batch(2, side, side, torch.device(device))
    with float32_as("fp32"):
        check_losses(model, reference, batch)
    step = our_step(model, batch, torch.float32) if who == "ours" else torchvision_step(reference, batch, amp=False)
    del model, reference
    step()
    step()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide part of the rise
    return peak_memory(step)
