import math

import pytest
import torch

from retina.engine.meter import Meter, PendingFlags
from retina.engine.step import StepResult


def result(losses: torch.Tensor, positives: float, grad_norm: float, *, updated: bool = True) -> StepResult:
    numbers = torch.tensor(positives), torch.tensor(grad_norm)
    return StepResult(losses, *numbers, rank_sums=torch.zeros(3), updated=torch.tensor(updated))


def test_means_since_the_last_read() -> None:
    meter = Meter()
    for scale in (1.0, 3.0):
        meter.add(result(torch.tensor([0.5, 0.25]) * scale, 10.0 * scale, 2.0), 4)
    values = meter.read()
    assert values["loss_classification"] == pytest.approx(1.0)
    assert values["loss_box"] == pytest.approx(0.5)
    assert values["loss"] == pytest.approx(1.5)
    assert values["positives"] == pytest.approx(20)
    assert values["grad_norm"] == pytest.approx(2)
    meter.add(result(torch.tensor([7.0, 0.0]), 1.0, 1.0), 4)
    assert meter.read()["loss"] == pytest.approx(7)


def test_steps_without_an_update_count_for_nothing() -> None:
    meter = Meter()
    skipped = result(torch.full((2,), math.nan), math.nan, math.nan, updated=False)
    meter.add(skipped, 1)
    assert meter.read() == {}
    meter.add(result(torch.tensor([1.0, 2.0]), 3.0, 4.0), 1)
    meter.add(skipped, 1)
    values = meter.read()
    assert (values["loss"], values["positives"], values["grad_norm"]) == (3.0, 3.0, 4.0)
    assert Meter().read() == {}


def test_a_restored_meter_goes_on() -> None:
    whole, before, after = Meter(), Meter(), Meter()
    for step in range(4):
        numbers = result(torch.rand(2), float(torch.rand(())), float(torch.rand(()))), 1
        whole.add(*numbers)
        if step == 2:
            after.load_state(before.state(), torch.device("cpu"))
        (before if step < 2 else after).add(*numbers)
    one, two = whole.read(), after.read()
    assert all(one[key] == two[key] for key in ("loss", "positives", "grad_norm"))
    assert Meter().state() == []


def test_waiting_is_counted_and_pauses_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("retina.engine.meter.time.perf_counter", lambda: now[0])
    meter = Meter()
    with meter.waiting():
        now[0] += 1.0
    with meter.paused():
        now[0] += 100.0
    now[0] += 3.0
    meter.add(result(torch.zeros(2), 0.0, 0.0), 10)
    values = meter.read()
    assert values["data_wait"] == pytest.approx(0.25)
    assert values["images_per_second"] == pytest.approx(2.5)


def test_flags_come_back_in_order_and_late() -> None:
    pending: PendingFlags[int] = PendingFlags(2)
    taken = []
    for step, flag in enumerate([True, False, True, True, False]):
        pending.add(torch.tensor(flag), step)
        taken.append(list(pending.take()))
    assert taken == [[], [], [(True, 0)], [(False, 1)], [(True, 2)]]
    assert list(pending.take(everything=True)) == [(True, 3), (False, 4)]
    assert list(pending.take(everything=True)) == []


def test_without_lag_flags_come_at_once() -> None:
    pending: PendingFlags[str] = PendingFlags(0)
    pending.add(torch.tensor(False), "a")
    assert list(pending.take()) == [(False, "a")]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_waited_for() -> None:
    pending: PendingFlags[int] = PendingFlags(1)
    large = torch.rand(4096, 4096, device="cuda")
    for step in range(8):
        large = large @ large / 4096
        pending.add((large >= 0).all() if step % 2 else (large < 0).all(), step)
    assert list(pending.take()) + list(pending.take(everything=True)) == [(bool(step % 2), step) for step in range(8)]
