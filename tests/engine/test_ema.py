import pytest
import torch
from torch import nn

from retina.engine.optim import ExponentialMovingAverage


def test_average_follows_with_a_decay_that_grows() -> None:
    model = nn.BatchNorm1d(1)
    ema = ExponentialMovingAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(1.0)
        model.num_batches_tracked.fill_(7)
    ema.update(step=0)  # decay (1 + 0) / (10 + 0)
    assert ema.model.weight.item() == pytest.approx(0.1 * 1.0 + 0.9 * 3.0)
    assert ema.model.running_mean.item() == pytest.approx(0.9)
    assert ema.model.num_batches_tracked.item() == 7
    ema.update(step=1000)  # capped at 0.5
    assert ema.model.weight.item() == pytest.approx(0.5 * 2.8 + 0.5 * 3.0)


def test_average_is_a_frozen_copy() -> None:
    model = nn.Linear(2, 2)
    ema = ExponentialMovingAverage(model, decay=0.9)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    assert ema.model.weight.data_ptr() != model.weight.data_ptr()
