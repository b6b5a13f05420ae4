import math

import pytest
import torch
from torch import nn

from faults import refused
from retina.engine.optim import Cosine, MultiStep, build_optimizer, norm_and_divisor, set_learning_rate, step_where
from retina.errors import ConfigError

RUN = {"total": 1000, "steps_per_epoch": 100}


def test_multistep_warms_up_linearly_and_drops_at_milestones() -> None:
    schedule = MultiStep(warmup=10, warmup_factor=0.0, milestones=(500, "8ep", 0.9), gamma=0.1)
    assert [schedule(step, **RUN) for step in (0, 4, 9, 10)] == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1])
    assert [schedule(step, **RUN) for step in (499, 500, 799, 800, 900, 999)] == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.001, 0.001]
    )


def test_cosine_falls_from_one_to_its_final_factor() -> None:
    schedule = Cosine(warmup=0, final_factor=0.1)
    assert schedule(0, **RUN) == pytest.approx(1)
    assert schedule(500, **RUN) == pytest.approx(0.55)
    assert schedule(1000, **RUN) == pytest.approx(0.1)
    values = [Cosine(warmup="1ep")(step, **RUN) for step in range(1000)]
    assert values.index(max(values)) == 100
    assert values[550] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def test_norms_and_biases_are_not_decayed_and_the_rate_is_scaled() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5), model, scale=0.5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if decay[id(p)] == 0.5} == {"0.weight", "3.weight"}
    assert {name for name, p in model.named_parameters() if decay[id(p)] == 0.0} == {
        "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias"
    }  # fmt: skip
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(0.025)
    assert set_learning_rate(optimizer, 1.0) == pytest.approx(0.05)


def test_frozen_parameters_are_left_out_and_wrong_values_are_one_line() -> None:
    model = nn.Linear(2, 2)
    with refused("wrong-value", "optimizer: ", "learning rate", kind=ConfigError):
        build_optimizer(lambda groups: torch.optim.SGD(groups, lr=-1.0), model)
    model.requires_grad_(False)
    with refused("nothing-to-train", "model: ", kind=ConfigError):
        build_optimizer(lambda groups: torch.optim.SGD(groups, lr=1.0), model)


@pytest.mark.parametrize(
    ("options", "code", "key"),
    [
        ({"milestones": [0.5, "x"]}, "out-of-range", "milestones"),
        ({"warmup": "x"}, "out-of-range", "warmup"),
        ({"gamma": -1.0}, "out-of-range", "gamma"),
    ],
)
def test_a_schedule_that_means_nothing_names_the_argument(options: dict[str, object], code: str, key: str) -> None:
    with refused(code, f"{key}: ", kind=ConfigError):
        MultiStep(**options)  # type: ignore[arg-type]


def test_norm_and_divisor() -> None:
    a, b, unused = (nn.Parameter(torch.zeros(n)) for n in (2, 1, 1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])

    def both(divisor: float, clip_norm: float | None) -> list[float]:
        return [x.item() for x in norm_and_divisor([a, b, unused], torch.tensor(divisor), clip_norm)]

    assert both(0.5, None) == pytest.approx([10, 0.5])
    assert both(2.0, 1.0) == pytest.approx([2.5, 5], abs=1e-5), "a norm of 5 becomes one of 1"
    assert both(1.0, 10.0) == pytest.approx([5, 1]), "what is short enough stays"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_update_that_is_not_wanted_changes_nothing(kind: type[torch.optim.Optimizer], fused: bool) -> None:
    """The same as not calling the optimizer at all, whether it was the first update or a later one; others are by the
    gradients divided by what is asked for."""
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    models = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [kind(model.parameters(), lr=0.1, fused=fused, **options) for model in models]
    for wanted in (False, True, False, True, True):
        gradients = [torch.randn_like(p) for p in models[0].parameters()]
        for model in models:
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.clone() if wanted else torch.full_like(gradient, torch.nan)
                if model is models[0]:
                    p.grad *= 4
        step_where(optimizers[0], torch.tensor(wanted), torch.tensor(4.0))
        if wanted:
            optimizers[1].step()
        for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, two)
    ours, theirs = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for i in range(2):
        assert all(torch.equal(ours[i][key], theirs[i][key]) for key in theirs[i])
