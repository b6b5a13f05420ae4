"""Folders as DeepForest publishes them: in with their classes and thresholds, and out for DeepForest itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet50
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import retina
from faults import refused
from retina.errors import CheckpointError, ConfigError
from retina.interop.deepforest import as_deepforest, is_deepforest, read_deepforest

CONFIG = {"num_classes": 2, "nms_thresh": 0.3, "score_thresh": 0.02, "label_dict": {"Dead": 1, "Alive": 0}}


def network() -> TorchvisionRetinaNet:
    """`deepforest.models.retinanet.RetinaNetHub` without its download. (That such a network finds the same here is
    shown in test_torchvision.py.)"""
    torch.manual_seed(0)
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    blocks = LastLevelP6P7(256, 256)
    backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=blocks)
    return TorchvisionRetinaNet(backbone, 2).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepforest") / "trees"
    folder.mkdir()
    save_file({f"model.{key}": value for key, value in network().state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_folder_is_loaded_with_its_classes_and_thresholds(folder: Path) -> None:
    detector = retina.load(folder, device="cpu")
    assert detector.classes == ("Alive", "Dead")
    assert detector.card.postprocess["score_threshold"] == 0.02
    assert detector.card.postprocess["nms_iou"] == 0.3
    assert {"anchors_rounded", "canvas_strides"} <= {k for k, v in detector.card.model.items() if v is True}
    theirs, ours = network().state_dict(), read_deepforest(folder).state
    assert (ours["fpn.extra.0.weight"] == theirs["backbone.fpn.extra_blocks.p6.weight"]).all()
    assert (ours["head.classification.predict.weight"] == theirs["head.classification_head.cls_logits.weight"]).all()


def test_a_folder_comes_out_as_it_went_in(folder: Path, tmp_path: Path) -> None:
    imported = read_deepforest(folder)
    files = as_deepforest(imported.state, imported.card, [])
    assert json.loads(files["config.json"]) == {**CONFIG, "label_dict": {"Alive": 0, "Dead": 1}}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert is_deepforest(tmp_path)
    again = read_deepforest(tmp_path)
    assert again.card == imported.card
    assert all((again.state[key] == value).all() for key, value in imported.state.items())
    for name, value in {"anchors_rounded": False, "backbone": "resnet18", "norm": "group", "mean": [1.0] * 3}.items():
        other = replace(imported.card, model=imported.card.model | {name: value})
        with refused("not-in-deepforest", name, kind=ConfigError):
            as_deepforest(imported.state, other, [])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"label_dict": {"a": 1, "b": 2}}, "bad-header"),
        ({"label_dict": ["a"]}, "bad-header"),
        ({"score_thresh": 2.0}, "bad-header"),
        ({"nms_thresh": None}, "bad-header"),
        (None, "unreadable-file"),
    ],
)
def test_a_strangers_description_is_checked(tmp_path: Path, changes: dict[str, Any] | None, code: str) -> None:
    text = "{" if changes is None else json.dumps(CONFIG | changes)
    (tmp_path / "config.json").write_text(text)
    with refused(code, "config.json", kind=CheckpointError):
        read_deepforest(tmp_path)


@pytest.mark.slow
def test_deepforest_takes_what_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepforest", reason="not installed")
    cache = tmp_path / "torch" / "hub" / "checkpoints"  # torchvision would fetch a backbone, which is then replaced
    cache.mkdir(parents=True)
    torch.save(resnet50(weights=None).state_dict(), cache / "resnet50-0676ba61.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    from deepforest.main import deepforest

    imported = read_deepforest(folder)
    for name, content in as_deepforest(imported.state, imported.card, []).items():
        (tmp_path / name).write_bytes(content)
    program = deepforest(config_args={"model": {"name": str(tmp_path)}})
    assert program.label_dict == {"Alive": 0, "Dead": 1}
    expected = network().state_dict()
    loaded = program.model.state_dict()
    assert all((loaded[key] == value).all() for key, value in expected.items())
