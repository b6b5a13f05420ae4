import pytest
import torch

from retina.engine.meter import Meter

YES, NO = torch.tensor(True), torch.tensor(False)


def test_means_since_the_last_read() -> None:
    meter = Meter(batch_size=4)
    for scale in (1.0, 3.0):
        meter.add(YES, torch.tensor([0.5, 0.25]) * scale, torch.tensor(10.0 * scale), torch.tensor(2.0))
    values = meter.read()
    assert values["loss_classification"] == pytest.approx(1.0)
    assert values["loss_box"] == pytest.approx(0.5)
    assert values["loss"] == pytest.approx(1.5)
    assert values["positives"] == pytest.approx(20)
    assert values["grad_norm"] == pytest.approx(2)
    meter.add(YES, torch.tensor([7.0, 0.0]), torch.tensor(1.0), torch.tensor(1.0))
    assert meter.read()["loss"] == pytest.approx(7)


def test_steps_without_an_update_count_for_nothing() -> None:
    meter = Meter(batch_size=1)
    nothing = torch.tensor(float("nan"))
    meter.add(NO, nothing.repeat(2), nothing, nothing)
    assert meter.read() == {}
    meter.add(YES, torch.tensor([1.0, 2.0]), torch.tensor(3.0), torch.tensor(4.0))
    meter.add(NO, nothing.repeat(2), nothing, nothing)
    values = meter.read()
    assert (values["loss"], values["positives"], values["grad_norm"]) == (3.0, 3.0, 4.0)
    assert Meter(batch_size=1).read() == {}


def test_a_restored_meter_goes_on() -> None:
    whole, before, after = Meter(1), Meter(1), Meter(1)
    for step in range(4):
        numbers = YES, torch.rand(2), torch.rand(()), torch.rand(())
        whole.add(*numbers)
        if step == 2:
            after.load_state(before.state(), torch.device("cpu"))
        (before if step < 2 else after).add(*numbers)
    one, two = whole.read(), after.read()
    assert all(one[key] == two[key] for key in ("loss", "positives", "grad_norm"))
    assert Meter(1).state() == []


def test_waiting_is_counted_and_pauses_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("retina.engine.meter.time.perf_counter", lambda: now[0])
    meter = Meter(batch_size=10)
    with meter.waiting():
        now[0] += 1.0
    with meter.paused():
        now[0] += 100.0
    now[0] += 3.0
    meter.add(YES, torch.zeros(2), torch.tensor(0.0), torch.tensor(0.0))
    values = meter.read()
    assert values["data_wait"] == pytest.approx(0.25)
    assert values["images_per_second"] == pytest.approx(2.5)
