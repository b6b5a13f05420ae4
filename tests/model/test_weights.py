import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retina.errors import CheckpointError
from retina.model.retinanet import RetinaNet, retinanet
from retina.model.weights import DetectorCard, load_detector, read_card, save_detector

CPU = torch.device("cpu")


@pytest.fixture
def model() -> RetinaNet:
    torch.manual_seed(0)
    return retinanet(num_classes=2, backbone="resnet18", fpn_channels=16, head_convs=1).eval()


@pytest.fixture
def card(model: RetinaNet) -> DetectorCard:
    return DetectorCard(
        model=model.arguments,
        classes=["cat", "dog"],
        category_ids=[7, 3],
        preprocessing={"short_side": 64},
        postprocess={},
    )


def test_a_saved_detector_comes_back_the_same(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    save_detector(tmp_path / "best.safetensors", model.state_dict(), card)
    again, read = load_detector(tmp_path / "best.safetensors", CPU)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(torch.cat(again(images).logits, 1), torch.cat(model(images).logits, 1))
    assert read == card
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_weights_of_another_architecture_are_named(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "best.safetensors"
    save_detector(file, model.state_dict(), replace(card, model=card.model | {"fpn_channels": 32}))
    with pytest.raises(CheckpointError, match=r"^[^\n]*best\.safetensors: fpn[^\n]* - [^\n]*$"):
        load_detector(file, CPU)
    save_detector(file, model.state_dict(), replace(card, model=card.model | {"backbone": "resnet34"}))
    with pytest.raises(CheckpointError, match="lacks backbone"):
        load_detector(file, CPU)


def test_unusable_files_are_one_line(tmp_path: Path, model: RetinaNet, card: DetectorCard) -> None:
    file = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        read_card(file)
    save_file(model.state_dict(), file)
    with pytest.raises(CheckpointError, match="no detector description"):
        read_card(file)
    save_detector(file, model.state_dict(), replace(card, schema_version=99))
    with pytest.raises(CheckpointError, match="schema version 99"):
        read_card(file)
    save_file(load_file(file), file, metadata={"retina": json.dumps({"schema_version": 1})})
    with pytest.raises(CheckpointError, match="model is missing"):
        read_card(file)
    file.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_card(file)
