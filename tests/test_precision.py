"""What the word `precision` means on a device. Nothing is computed on a GPU here: its flags are torch's."""

import os

import pytest
import torch

from retina.precision import algorithms, chosen_precision, float32_as


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_float32_is_ieees_unless_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = flags()
    for precision, allowed in (("fp32", False), ("bf16", False), ("tf32", True)):
        with float32_as(precision):
            assert flags() == (allowed, allowed)
        assert flags() == before
    with pytest.raises(ValueError, match="stop"), float32_as("fp32"):
        raise ValueError("stop")
    assert flags() == before


def test_blocks_within_blocks_and_beside_them_leave_the_flags_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = flags()
    with float32_as("tf32"):
        with float32_as("fp32"):
            assert flags() == (False, False)
        assert flags() == (True, True)
    assert flags() == before
    first, second = float32_as("fp32"), float32_as("fp32")  # of two threads, the first of which ends first
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert flags() == (False, False)
    second.__exit__(None, None, None)
    assert flags() == before


def test_a_gpu_that_has_it_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert chosen_precision(None, gpu) == "bf16"
    assert chosen_precision("fp32", gpu) == "fp32"
    assert chosen_precision(None, cpu) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert chosen_precision(None, gpu) == "fp32"


def test_algorithms_last_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with algorithms(deterministic=False, few_shapes=True):
        assert torch.backends.cudnn.benchmark
    with algorithms(deterministic=True, few_shapes=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
