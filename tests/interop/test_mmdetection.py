from pathlib import Path

import pytest
import torch
from torch import Tensor

from faults import refused
from interop.states import mmdetection, number_of
from retina.errors import CheckpointError
from retina.interop.convert import Imported, convert_detector
from retina.interop.read import read_foreign

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
        "backbone.stem.bn1.running_mean": "backbone.bn1.running_mean",
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
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    assert len(found.state) == len(state) - len(counts)
    assert any(note.startswith("left out") and all(key in note for key in counts[1:]) for note in found.notes)
    told = {"p7_relu": False, "norm": "frozen", "stride_in_1x1": False, "p6_from": "c5", "anchors_rounded": False}
    assert {key: found.card.model[key] for key in told} == told
    assert found.card.classes[0] == "person"
    assert found.card.category_ids[-1] == 90


def test_the_settings_beside_the_weights_are_read_and_never_run(tmp_path: Path) -> None:
    canary = f"\nopen({str(tmp_path / 'canary')!r}, 'w')\n"
    meta = {"config": PYTORCH_2 + canary, "CLASSES": ("ant", "bee"), "mmdet_version": "2.25.0"}
    found = imported(mmdetection(2), tmp_path / "latest.pth", meta=meta)
    assert found.card.classes == ["ant", "bee"]
    assert found.card.model["mean"] == [123.0, 116.28, 103.53]
    assert found.card.model["std"] == [58.395, 57.12, 57.375]
    assert found.card.postprocess["max_detections"] == 200
    assert found.card.postprocess["candidates_per_level"] == 500
    assert found.card.postprocess["score_threshold"] == 0.1
    assert found.card.postprocess["nms_iou"] == 0.6
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(("norm_eval", "norm"), [(True, "frozen"), (False, "batch")])
def test_statistics_are_fixed_where_they_were(tmp_path: Path, norm_eval: bool, norm: str) -> None:
    text = PYTORCH_2.replace("depth=50,", f"depth=50, norm_eval={norm_eval},")
    found = imported(mmdetection(2), tmp_path / "latest.pth", meta={"config": text})
    assert found.card.model["norm"] == norm
    other = {"norm_fixed": not norm_eval}
    told = imported(mmdetection(2), tmp_path / "latest.pth", meta={"config": text}, conventions=other)
    assert told.card.model["norm"] != norm


@pytest.mark.parametrize("meta", [{"config": CAFFE_2}, {"cfg": CAFFE_3, "dataset_meta": {"classes": ["x"]}}])
def test_caffe_style_is_bgr_with_the_stride_in_1x1(tmp_path: Path, meta: dict[str, object]) -> None:
    state = mmdetection(1, backbone="resnet50")
    state["backbone.conv1.weight"] = torch.arange(3.0).view(1, 3, 1, 1).expand(64, 3, 7, 7)
    found = imported(state, tmp_path / "latest.pth", meta=meta)
    assert found.card.model["stride_in_1x1"] is True
    assert found.card.model["std"] == [1.0, 1.0, 1.0]
    assert found.card.model["mean"] == (
        [122.7717, 115.9465, 102.9801] if "config" in meta else [123.675, 116.28, 103.53]
    )
    assert found.card.model["p7_relu"] is ("cfg" in meta)
    assert found.card.classes == (["x"] if "cfg" in meta else ["class 0"])
    assert found.state["backbone.stem.conv1.weight"][0, :, 0, 0].tolist() == [2.0, 1.0, 0.0]


def test_without_settings_the_name_of_the_file_decides(tmp_path: Path) -> None:
    state = mmdetection(1, backbone="resnet50")
    found = imported(state, tmp_path / "retinanet_r50_caffe_fpn_1x_coco_20200531-f11027c5.pth")
    assert found.card.model["stride_in_1x1"] is True
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


def test_of_several_values_the_last_counts(tmp_path: Path) -> None:
    """As early 2.x stores them: the text of the base file, then that of its child."""
    meta = {"config": PYTORCH_2 + "# style='pytorch', mean=[1, 2, 3]\n" + CAFFE_2}
    found = imported(mmdetection(1, backbone="resnet50"), tmp_path / "epoch_12.pth", meta=meta)
    assert found.card.model["stride_in_1x1"] is True
    assert (found.card.model["mean"], found.card.model["std"]) == ([122.7717, 115.9465, 102.9801], [1.0, 1.0, 1.0])
    assert "caffe style, BGR: by the settings beside it" in found.notes
    assert "style: the settings beside it say pytorch and then caffe, which is taken" in found.notes


VERTICAL = """model = dict(
    backbone=dict(
        style='pytorch',
        type='ResNet'),
    bbox_head=dict(
        anchor_generator=dict(
            octave_base_scale=2,
            ratios=[
                0.33,
                1.0,
                3.0,
            ],
            scales_per_octave=2,
            strides=[
                8,
                16,
                32,
                64,
                128,
            ],
            type='AnchorGenerator'),
        bbox_coder=dict(
            target_means=[
                0.0,
                0.0,
                0.0,
                0.0,
            ],
            target_stds=[
                0.1,
                0.1,
                0.2,
                0.2,
            ],
            type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True)),
    data_preprocessor=dict(
        bgr_to_rgb=False,
        mean=[
            1.0,
            2.0,
            3.0,
        ],
        pad_size_divisor=64,
        std=[
            4.0,
            5.0,
            6.0,
        ]),
    test_cfg=dict(nms=dict(iou_threshold=0.4, type='nms'), score_thr=0.2))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(
        640,
        512,
    ), type='Resize'),
]
train_pipeline = [
    dict(keep_ratio=False, scale=(
        1000,
        900,
    ), type='Resize'),
]
"""


def test_settings_are_read_as_mmengine_writes_them(tmp_path: Path) -> None:
    state = mmdetection(1)
    for kind, rows in (("cls", 6), ("reg", 24)):
        state |= {f"bbox_head.retina_{kind}.weight": torch.ones(rows, 8, 3, 3)}
        state |= {f"bbox_head.retina_{kind}.bias": torch.ones(rows)}
    found = imported(state, tmp_path / "epoch_12.pth", meta={"cfg": VERTICAL})
    assert (found.card.model["mean"], found.card.model["std"]) == ([3.0, 2.0, 1.0], [6.0, 5.0, 4.0])
    assert found.card.model["anchor_sizes"] == [16.0, 32.0, 64.0, 128.0, 256.0]
    assert (found.card.model["anchor_scales"], found.card.model["anchor_ratios"]) == ([1.0, 2**0.5], [0.33, 1.0, 3.0])
    assert found.state["head.box.predict.bias"][:4].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert (
        found.card.preprocessing | {"short_side": 512, "long_side": 640, "pad_multiple": 64} == found.card.preprocessing
    )
    assert (found.card.postprocess["score_threshold"], found.card.postprocess["nms_iou"]) == (0.2, 0.4)
    (absent,) = (note for note in found.notes if note.startswith("not in the settings"))
    assert "nms_pre" in absent
    assert "mean" not in absent


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("type='ResNet'", "x=dict(add_extra_convs='on_lateral')", "add_extra_convs on_lateral: P6 made of a lateral"),
        ("use_sigmoid=True", "use_sigmoid=False", "use_sigmoid False: a softmax over classes"),
        ("target_means=[\n                0.0,", "target_means=[\n                0.5,", "target_means"),
        ("DeltaXYWHBBoxCoder", "TBLRBBoxCoder", "type TBLRBBoxCoder: boxes coded otherwise"),
        ("octave_base_scale=2", "scales=[8]", "anchors without octave_base_scale"),
        ("                8,\n", "                4,\n", "strides of other levels"),
        ("keep_ratio=True", "keep_ratio=False", "images of another aspect ratio"),
        ("            1.0,\n            2.0", "            1.0.0,\n            2.0", "mean with numbers that are none"),
        ("640,\n", "1e400,\n", "scale with numbers that are none"),
    ],
)
def test_settings_that_nothing_here_does_are_refused(tmp_path: Path, before: str, after: str, said: str) -> None:
    assert before in VERTICAL
    meta = {"cfg": VERTICAL.replace(before, after, 1)}
    with refused("unsupported", "x.pth", said, kind=CheckpointError):
        imported(mmdetection(1), tmp_path / "x.pth", meta=meta)
