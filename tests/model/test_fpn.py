"""Pyramids against the same sums written out level by level."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from faults import refused
from retina.errors import ConfigError
from retina.model.fpn import FPN, PAFPN

CHANNELS = (5, 6, 7, 8)


def maps(height: int = 64, width: int = 96) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, c, height // s, width // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True))


def written_out(neck: FPN, features: tuple[Tensor, ...], *, bottom_up: bool) -> list[Tensor]:
    """P3..P7 with the weights of `neck`, in mmdetection's order of work."""
    state = neck.state_dict()

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    c3, c4, c5 = features[-3:]
    m5 = conv("lateral.2", c5)
    m4 = conv("lateral.1", c4) + F.interpolate(m5, scale_factor=2)
    m3 = conv("lateral.0", c3) + F.interpolate(m4, scale_factor=2)
    p3, p4, p5 = (conv(f"output.{i}", m) for i, m in enumerate((m3, m4, m5)))
    if bottom_up:
        n4 = p4 + conv("down.0", p3, stride=2)
        n5 = p5 + conv("down.1", n4, stride=2)
        p4, p5 = conv("down_output.0", n4), conv("down_output.1", n5)
    p6 = conv("extra.0", c5 if neck.p6_from == "c5" else p5, stride=2)
    p7 = conv("extra.1", p6.relu() if neck.p7_relu else p6, stride=2)
    return [p3, p4, p5, p6, p7]


@pytest.mark.parametrize("p7_relu", [True, False])
@pytest.mark.parametrize("p6_from", ["c5", "p5"])
@pytest.mark.parametrize("kind", [FPN, PAFPN])
def test_equals_the_sums_written_out(kind: type[FPN], p6_from: str, p7_relu: bool) -> None:
    neck = kind(CHANNELS, channels=4, levels=(3, 4, 5, 6, 7), p6_from=p6_from, p7_relu=p7_relu)
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.normal_()
    found = neck(maps())
    expected = written_out(neck, maps(), bottom_up=kind is PAFPN)
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert neck.strides == (8, 16, 32, 64, 128)


@pytest.mark.parametrize("kind", [FPN, PAFPN])
@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (2,), (3, 4), (5, 6), (2, 3, 4, 5, 6, 7)])
def test_every_parameter_takes_part_on_any_levels(kind: type[FPN], levels: tuple[int, ...]) -> None:
    """Odd sizes too: a map of 3 x 5 halves to 2 x 3."""
    last = min(5, levels[-1])
    features = tuple(torch.randn(1, CHANNELS[i], *size) for i, size in enumerate(((24, 40), (12, 20), (6, 10), (3, 5))))
    neck = kind(CHANNELS[: last - 1], channels=4, levels=levels)
    pyramid = neck(features[: last - 1])
    sizes = {2: (24, 40), 3: (12, 20), 4: (6, 10), 5: (3, 5), 6: (2, 3), 7: (1, 2)}
    assert [tuple(level.shape) for level in pyramid] == [(1, 4, *sizes[level]) for level in levels]
    torch.stack([level.square().sum() for level in pyramid]).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in neck.parameters())


def test_maps_finer_than_the_first_level_are_not_needed() -> None:
    """A backbone may have none."""
    torch.manual_seed(0)
    all_maps = FPN(CHANNELS, channels=4, levels=(4, 5))
    torch.manual_seed(0)
    coarse = FPN(CHANNELS[-2:], channels=4, levels=(4, 5))
    for one, other in zip(all_maps(maps()), coarse(maps()[-2:]), strict=True):
        assert torch.equal(one, other)


def test_the_bottom_up_path_has_two_convolutions_per_step() -> None:
    plain, path = (
        sum(p.numel() for p in kind(CHANNELS, channels=4, levels=(3, 4, 5, 6, 7)).parameters()) for kind in (FPN, PAFPN)
    )
    assert path - plain == 2 * 2 * (4 * 4 * 9 + 4)


@pytest.mark.parametrize("levels", [(), (3, 5), (4, 3), (1, 2), (6, 7)])
def test_levels_that_are_no_pyramid_are_refused(levels: tuple[int, ...]) -> None:
    with refused("out-of-range", "levels", kind=ConfigError):
        FPN(CHANNELS, channels=4, levels=levels)
