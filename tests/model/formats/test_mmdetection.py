from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.states import mmdetection, number_of
from retina.errors import CheckpointError
from retina.model.formats.convert import Imported, convert_detector
from retina.model.formats.read import read_foreign

PYTORCH_2 = """model = dict(
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    neck=dict(type='FPN', add_extra_convs='on_input', num_outs=5),
    bbox_head=dict(bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0])),
    test_cfg=dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6), max_per_img=200))
img_norm_cfg = dict(mean=[123.0, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""
CAFFE_2 = """model = dict(backbone=dict(type='ResNet', depth=50, style='caffe'))
img_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
"""
CAFFE_3 = """model = dict(
    backbone=dict(style='caffe'),
    data_preprocessor=dict(bgr_to_rgb=False, mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0]),
    neck=dict(relu_before_extra_convs=True))
"""


def imported(state: dict[str, Tensor], file: Path, *, meta: object = None, **options: object) -> Imported:
    torch.save({"meta": meta, "state_dict": state} if meta else state, file)
    return convert_detector(read_foreign(file), file, **options)


def test_every_tensor_finds_its_place(tmp_path: Path) -> None:
    state = mmdetection()
    found = imported(state, tmp_path / "retinanet_r18_fpn_1x_coco.pth")
    expected = {
        "backbone.stem.bn1.num_batches_tracked": "backbone.bn1.num_batches_tracked",
        "backbone.layer2.0.downsample.0.weight": "backbone.layer2.0.downsample.0.weight",
        "fpn.lateral.2.weight": "neck.lateral_convs.2.conv.weight",
        "fpn.output.0.bias": "neck.fpn_convs.0.conv.bias",
        "fpn.extra.0.weight": "neck.fpn_convs.3.conv.weight",
        "fpn.extra.1.bias": "neck.fpn_convs.4.conv.bias",
        "head.classification.convs.2.weight": "bbox_head.cls_convs.1.conv.weight",
        "head.box.convs.0.weight": "bbox_head.reg_convs.0.conv.weight",
        "head.classification.predict.weight": "bbox_head.retina_cls.weight",
        "head.box.predict.bias": "bbox_head.retina_reg.bias",
    }
    for ours, theirs in expected.items():
        assert found.state[ours].unique().tolist() == [number_of(theirs)], ours
    assert len(found.state) == len(state)
    told = {"p7_relu": False, "norm": "batch", "stride_in_1x1": False, "p6_from": "c5", "anchors_rounded": False}
    assert {key: found.model[key] for key in told} == told
    assert found.classes[0] == "person"
    assert found.category_ids[-1] == 90


def test_the_settings_beside_the_weights_are_read_and_never_run(tmp_path: Path) -> None:
    canary = f"\nopen({str(tmp_path / 'canary')!r}, 'w')\n"
    meta = {"config": PYTORCH_2 + canary, "CLASSES": ("ant", "bee"), "mmdet_version": "2.25.0"}
    found = imported(mmdetection(2), tmp_path / "latest.pth", meta=meta)
    assert found.classes == ["ant", "bee"]
    assert found.model["mean"] == [123.0, 116.28, 103.53]
    assert found.model["std"] == [58.395, 57.12, 57.375]
    assert found.postprocess["max_detections"] == 200
    assert found.postprocess["candidates_per_level"] == 500
    assert found.postprocess["score_threshold"] == 0.1
    assert found.postprocess["nms_iou"] == 0.6
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("meta", [{"config": CAFFE_2}, {"cfg": CAFFE_3, "dataset_meta": {"classes": ["x"]}}])
def test_caffe_style_is_bgr_with_the_stride_in_1x1(tmp_path: Path, meta: dict[str, object]) -> None:
    state = mmdetection(1, backbone="resnet50")
    state["backbone.conv1.weight"] = torch.arange(3.0).view(1, 3, 1, 1).expand(64, 3, 7, 7)
    found = imported(state, tmp_path / "latest.pth", meta=meta)
    assert found.model["stride_in_1x1"] is True
    assert found.model["std"] == [1.0, 1.0, 1.0]
    assert found.model["mean"] == ([122.7717, 115.9465, 102.9801] if "config" in meta else [123.675, 116.28, 103.53])
    assert found.model["p7_relu"] is ("cfg" in meta)
    assert found.classes == (["x"] if "cfg" in meta else ["class 0"])
    assert found.state["backbone.stem.conv1.weight"][0, :, 0, 0].tolist() == [2.0, 1.0, 0.0]


def test_without_settings_the_name_of_the_file_decides(tmp_path: Path) -> None:
    state = mmdetection(1, backbone="resnet50")
    found = imported(state, tmp_path / "retinanet_r50_caffe_fpn_1x_coco_20200531-f11027c5.pth")
    assert found.model["stride_in_1x1"] is True
    assert any("its name says caffe" in note for note in found.notes)


class HistoryBuffer:
    """As mmengine's: numpy arrays and methods in its state."""

    def __init__(self) -> None:
        import numpy

        self.log, self.methods = numpy.arange(3.0), {"mean": HistoryBuffer.mean}

    def mean(self) -> None:
        pass


def test_the_log_that_mmengine_saves_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    data = {"state_dict": mmdetection(1), "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}}, "meta": {}}
    torch.save(data, tmp_path / "epoch_12.pth")
    monkeypatch.undo()
    assert b"HistoryBuffer" in (tmp_path / "epoch_12.pth").read_bytes()
    assert read_foreign(tmp_path / "epoch_12.pth").is_detector


def test_what_no_setting_here_does_is_refused(tmp_path: Path) -> None:
    meta = {"config": PYTORCH_2.replace("on_input", "on_lateral")}
    with pytest.raises(CheckpointError, match="P6 is made of a lateral map"):
        imported(mmdetection(1), tmp_path / "x.pth", meta=meta)
    with pytest.raises(CheckpointError, match="numbers that are none"):
        imported(mmdetection(1), tmp_path / "x.pth", meta={"config": "mean=[1.0.0, 2, 3]"})
