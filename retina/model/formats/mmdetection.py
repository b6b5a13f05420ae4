"""mmdetection's RetinaNet, of 2.x and 3.x, whose tensors have the same names.

Conventions (open-mmlab/mmdetection): in `pytorch` style images in RGB with ImageNet's mean and std and a stride in the
3x3 convolution, in `caffe` style BGR less a mean and a stride in 1x1 (retinanet_r50_caffe_fpn_1x_coco.py in
configs/retinanet/); short side 800, long side at most 1333, padded to multiples of 32; P6 of C5, and no ReLU before P7
(`add_extra_convs` and `relu_before_extra_convs` in mmdet/models/necks/fpn.py); anchors [ratio scale] around
(column, row) x stride, not rounded (mmdet/models/task_modules/prior_generators/anchor_generator.py; mmdet/core/anchor/
in 2.x); classes from 0, no row for the background; score above 0.05, 1000 candidates per level, NMS at 0.5, 100
detections (configs/_base_/models/retinanet_r50_fpn.py).

No tensor tells the style. The settings that mmcv and mmengine store as text beside the weights do: they are searched
for single values and never run.
"""

import re
from collections.abc import Callable, Set
from typing import Any

from retina.errors import CheckpointError
from retina.model.formats.conventions import Conventions
from retina.model.formats.foreign import Foreign, Source, rename, tower_rules

_NUMBERS = r"[\[(]([\d., e+-]+)[\])]"


def recognises(keys: Set[str]) -> bool:
    return {"backbone.conv1.weight", "bbox_head.retina_cls.weight"} <= keys


def read(source: Source) -> Foreign:
    state = source.state
    has_norm = any(key.startswith("bbox_head.cls_convs.0.gn.") for key in state)
    levels = sum(bool(re.fullmatch(r"neck\.lateral_convs\.\d\.conv\.weight", key)) for key in state)

    def output(match: re.Match[str]) -> str:
        i = int(match[1])
        return f"fpn.output.{i}.{match[2]}" if i < levels else f"fpn.extra.{i - levels}.{match[2]}"

    renamed = rename(
        state,
        [
            (r"backbone\.((?:conv|bn)1\..+)", r"backbone.stem.\1"),
            (r"backbone\.(layer[1-4]\..+)", r"backbone.\1"),
            (r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"fpn.lateral.\1.\2"),
            (r"neck\.fpn_convs\.(\d)\.conv\.(weight|bias)", output),
            *tower_rules(r"bbox_head\.cls_convs", "classification", conv=r"\.conv", norm=r"\.gn", has_norm=has_norm),
            *tower_rules(r"bbox_head\.reg_convs", "box", conv=r"\.conv", norm=r"\.gn", has_norm=has_norm),
            (r"bbox_head\.retina_cls\.(weight|bias)", r"head.classification.predict.\1"),
            (r"bbox_head\.retina_reg\.(weight|bias)", r"head.box.predict.\1"),
        ],
        [
            (r"data_preprocessor\.(mean|std)", "read from the settings beside the weights"),
            (r"ema_.+", "the moving average, which mmdetection exchanges with the weights before it saves"),
        ],
    )
    conventions, notes = style(source)
    return Foreign(
        program="mmdetection's RetinaNet",
        state=renamed.state,
        names=renamed.names,
        conventions=conventions,
        unused=renamed.unused,
        unknown=renamed.unknown,
        classes=classes(source.other),
        notes=notes,
    )


def style(source: Source) -> tuple[Conventions, list[str]]:
    """What the settings beside the weights say, or the name of the file, or by default `pytorch` style."""
    meta = source.other.get("meta")
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "") if meta else ""
    if not text:
        caffe = "caffe" in source.file.name
        why = "its name says caffe" if caffe else "nothing in it says otherwise"
        notes = [f"no settings lie beside the weights: {'caffe' if caffe else 'pytorch'} style, because {why}"]
        return _conventions(caffe=caffe), notes

    def find(pattern: str, default: Any, convert: Callable[[str], Any]) -> Any:
        found = re.search(rf"\b{pattern}", text)
        return convert(found[1]) if found else default

    def numbers(values: str) -> tuple[float, ...]:
        return tuple(float(value) for value in values.split(",") if value.strip())

    caffe = find(r"style['\"]?\s*[=:]\s*['\"](\w+)", "pytorch", str) == "caffe"
    bgr = find(r"(?:bgr_)?to_rgb['\"]?\s*[=:]\s*(True|False)", str(not caffe), str) == "False"
    usual = _conventions(caffe=caffe)
    try:
        mean = find(rf"mean['\"]?\s*[=:]\s*{_NUMBERS}", usual.mean[:: -1 if bgr else 1], numbers)
        std = find(rf"std['\"]?\s*[=:]\s*{_NUMBERS}", usual.std[:: -1 if bgr else 1], numbers)
        conventions = Conventions(
            bgr=bgr,
            mean=mean[:: -1 if bgr else 1],
            std=std[:: -1 if bgr else 1],
            stride_in_1x1=caffe,
            p7_relu=find(r"relu_before_extra_convs['\"]?\s*[=:]\s*(True|False)", "False", str) == "True",
            anchor_offset=find(r"center_offset['\"]?\s*[=:]\s*([\d.]+)", 0.0, float),
            delta_std=find(rf"target_stds['\"]?\s*[=:]\s*{_NUMBERS}", usual.delta_std, numbers),
            score_threshold=find(r"score_thr['\"]?\s*[=:]\s*([\d.]+)", usual.score_threshold, float),
            candidates_per_level=find(r"nms_pre['\"]?\s*[=:]\s*(\d+)", usual.candidates_per_level, int),
            nms_iou=find(r"iou_threshold['\"]?\s*[=:]\s*([\d.]+)", usual.nms_iou, float),
            max_detections=find(r"max_per_img['\"]?\s*[=:]\s*(\d+)", usual.max_detections, int),
        )
    except ValueError:
        raise CheckpointError(f"{source.file}: its settings hold numbers that are none - remove its meta") from None
    if find(r"add_extra_convs['\"]?\s*[=:]\s*['\"]?(\w+)", "", str) == "on_lateral":
        raise CheckpointError(f"{source.file}: P6 is made of a lateral map, which no setting here does - train it anew")
    return conventions, [
        f"{'caffe' if caffe else 'pytorch'} style, {'BGR' if bgr else 'RGB'}: the settings beside it say so"
    ]


def _conventions(*, caffe: bool) -> Conventions:
    if caffe:
        return Conventions(bgr=True, std=(1.0, 1.0, 1.0), stride_in_1x1=True, p7_relu=False)
    return Conventions(p7_relu=False)


def classes(other: dict[str, Any]) -> list[str | None] | None:
    """Of mmcv's `CLASSES` or mmengine's `dataset_meta`."""
    meta = other.get("meta")
    if not isinstance(meta, dict):
        return None
    inner = meta.get("dataset_meta")
    found = [m.get(key) for m in (meta, inner) if isinstance(m, dict) for key in ("CLASSES", "classes")]
    names = next((list(value) for value in found if isinstance(value, (list, tuple))), None)
    return names if names and all(isinstance(name, str) for name in names) else None
