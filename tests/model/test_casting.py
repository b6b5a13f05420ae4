import pytest
import torch

from retina.model import casting
from retina.model.retinanet import RetinaNet, retinanet

IMAGES = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)


def gradients(model: RetinaNet) -> list[torch.Tensor | None]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        predictions = model(IMAGES)
    torch.stack([level.float().square().sum() for level in (*predictions.logits, *predictions.deltas)]).sum().backward()
    return [p.grad for p in model.parameters()]


def test_casting_stage_by_stage_is_what_autocast_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options = {"norm": "group", "frozen_stages": 2, "fpn_channels": 16, "head_convs": 1, "levels": [3, 4, 5]}
    model = retinanet(num_classes=2, backbone="resnet18_half", **options)  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters()]
    expected = gradients(model)
    monkeypatch.setattr(casting, "DEVICES", ("cpu",))
    cast = gradients(model)
    assert [name for name, _ in model.named_parameters()] == names
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(isinstance(conv.weight, torch.nn.Parameter) for conv in convs)
    for one, other in zip(cast, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == torch.float32
            assert torch.equal(one, other)
