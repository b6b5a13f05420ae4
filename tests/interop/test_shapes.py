from pathlib import Path

import pytest
import torch

from faults import refused
from interop.states import body
from retina.errors import CheckpointError
from retina.interop.foreign import backbone_name, backbone_norm
from retina.model.backbone import RESNETS

FILE = Path("theirs.pth")


@pytest.mark.parametrize("name", RESNETS)
def test_every_backbone_is_known_by_its_shapes(name: str) -> None:
    state = {f"backbone.{key}": torch.empty(shape, device="meta") for key, shape in body(name).items()}
    assert backbone_name(state, FILE) == name


def test_another_backbone_is_named_by_what_was_seen() -> None:
    state = {f"backbone.{key}": torch.empty(shape, device="meta") for key, shape in body("resnet18").items()}
    state["backbone.layer1.0.conv2.weight"] = torch.empty(48, 64, 3, 3, device="meta")
    with refused("unknown-backbone", "theirs.pth", "48x64", kind=CheckpointError):
        backbone_name(state, FILE)


def test_norms_are_told_by_their_statistics() -> None:
    state = {"backbone.bn1.weight": torch.zeros(1)}
    assert backbone_norm(state) == "group"
    state["backbone.bn1.running_var"] = torch.zeros(1)
    assert backbone_norm(state) == "frozen"
    state["backbone.bn1.num_batches_tracked"] = torch.zeros(())
    assert backbone_norm(state) == "batch"
