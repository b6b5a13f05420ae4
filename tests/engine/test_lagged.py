import pytest
import torch

from retina.engine.meter import Lagged


def test_flags_come_back_in_order_and_late() -> None:
    lagged: Lagged[int] = Lagged(2)
    told = []
    for step, flag in enumerate([True, False, True, True, False]):
        lagged.add(torch.tensor(flag), step)
        told.append(list(lagged.take()))
    assert told == [[], [], [(True, 0)], [(False, 1)], [(True, 2)]]
    assert list(lagged.take(everything=True)) == [(True, 3), (False, 4)]
    assert list(lagged.take(everything=True)) == []


def test_without_lag_they_come_at_once() -> None:
    lagged: Lagged[str] = Lagged(0)
    lagged.add(torch.tensor(False), "a")
    assert list(lagged.take()) == [(False, "a")]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_waited_for() -> None:
    lagged: Lagged[int] = Lagged(1)
    large = torch.rand(4096, 4096, device="cuda")
    for step in range(8):
        large = large @ large / 4096
        lagged.add((large >= 0).all() if step % 2 else (large < 0).all(), step)
    assert list(lagged.take()) + list(lagged.take(everything=True)) == [(bool(step % 2), step) for step in range(8)]
