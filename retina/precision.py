"""In which numbers a device computes. Beside the road.

A GPU may compute float32 convolutions and products in TF32, which rounds their inputs to 10 bits; torch lets
convolutions do so. That is `tf32` here; `fp32` is IEEE's."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in hardware, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def chosen_precision(name: str | None, device: torch.device) -> str:
    """The precision itself; for None bf16 on a GPU that has it, else fp32."""
    return name or ("bf16" if device.type == "cuda" and native_bf16(device) else "fp32")


_lock = threading.Lock()
_asked: list[tuple[bool, bool]] = []
"""Torch's flags before any block, then what each block that is under way wants, because threads share the flags."""


@contextmanager
def float32_as(precision: str) -> Iterator[None]:
    """Within the block, float32 convolutions and products are in TF32 if that is the `precision`, else IEEE's.

    Of blocks in several threads the last that began decides, and the last that ends puts torch's flags back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    wanted = (precision == "tf32",) * 2
    with _lock:
        if not _asked:
            _asked.append((cudnn.allow_tf32, matmul.allow_tf32))
        _asked.append(wanted)
        cudnn.allow_tf32, matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        with _lock:
            del _asked[len(_asked) - 1 - _asked[::-1].index(wanted)]
            cudnn.allow_tf32, matmul.allow_tf32 = _asked[-1]
            if len(_asked) == 1:
                _asked.clear()


@contextmanager
def algorithms(*, deterministic: bool, few_shapes: bool) -> Iterator[None]:
    """Within the block torch takes deterministic algorithms only, if asked to; else cuDNN tries which are the fastest
    for each shape of maps, where those are few: on data of many shapes it would go on trying.

    cuBLAS is deterministic with workspaces of its own, which it reads of the environment when it is first used."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = few_shapes and not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
