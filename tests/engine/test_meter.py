import pytest
import torch

from retina.engine.meter import Meter


def test_means_since_the_last_read() -> None:
    meter = Meter(batch_size=4)
    for scale in (1.0, 3.0):
        meter.add(torch.tensor([0.5, 0.25]) * scale, torch.tensor(10.0 * scale), torch.tensor(2.0))
    values = meter.read()
    assert values["loss_classification"] == pytest.approx(1.0)
    assert values["loss_box"] == pytest.approx(0.5)
    assert values["loss"] == pytest.approx(1.5)
    assert values["positives"] == pytest.approx(20)
    assert values["grad_norm"] == pytest.approx(2)
    meter.add(torch.tensor([7.0, 0.0]), torch.tensor(1.0), torch.tensor(1.0))
    assert meter.read()["loss"] == pytest.approx(7)


def test_waiting_is_counted_and_pauses_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("retina.engine.meter.time.perf_counter", lambda: now[0])
    meter = Meter(batch_size=10)
    with meter.waiting():
        now[0] += 1.0
    with meter.paused():
        now[0] += 100.0
    now[0] += 3.0
    meter.add(torch.zeros(2), torch.tensor(0.0), torch.tensor(0.0))
    values = meter.read()
    assert values["data_wait"] == pytest.approx(0.25)
    assert values["images_per_second"] == pytest.approx(2.5)
