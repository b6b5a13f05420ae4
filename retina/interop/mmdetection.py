"""mmdetection's RetinaNet, of 2.x and 3.x, whose tensors have the same names.

Conventions (open-mmlab/mmdetection): in `pytorch` style images in RGB with ImageNet's mean and std and a stride in the
3x3 convolution, in `caffe` style BGR less a mean and a stride in 1x1 (retinanet_r50_caffe_fpn_1x_coco.py in
configs/retinanet/); statistics of the backbone's norms fixed (`norm_eval`); short side 800, long side at most 1333,
padded to multiples of 32; P6 of C5, and no ReLU before P7 (`add_extra_convs` and `relu_before_extra_convs` in
mmdet/models/necks/fpn.py); anchors [ratio scale] around (column, row) x stride, not rounded
(mmdet/models/task_modules/prior_generators/anchor_generator.py; mmdet/core/anchor/ in 2.x); classes from 0, no row for
the background; score above 0.05, 1000 candidates per level, NMS at 0.5, 100 detections
(configs/_base_/models/retinanet_r50_fpn.py).

No tensor tells the style. The settings that mmcv and mmengine store as text beside the weights do: they are searched
for single values and never run. Early 2.x stores the text of base files before that of the file that changes them, so
of several values the last counts.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from retina.interop.foreign import Conventions, Foreign, Source, refusal, rename, resnet_rules, tower_rules

NAMES = {"backbone.conv1.weight", "bbox_head.retina_cls.weight"}
"""Tensors by which a file is recognised."""
_BRACKET = re.compile(r"[\[({\])}]")
_NUMBERS = r"[\[(]([\d.,\se+-]+)[\])]"


def read(source: Source) -> Foreign:
    state = source.state
    has_norm = any(key.startswith("bbox_head.cls_convs.0.gn.") for key in state)
    levels = sum(bool(re.fullmatch(r"neck\.lateral_convs\.\d\.conv\.weight", key)) for key in state)

    def output(match: re.Match[str]) -> str:
        i = int(match[1])
        return f"fpn.output.{i}.{match[2]}" if i < levels else f"fpn.extra.{i - levels}.{match[2]}"

    foreign = rename(
        state,
        [
            *resnet_rules(r"backbone\."),
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
    outputs = sum(bool(re.fullmatch(r"neck\.fpn_convs\.\d\.conv\.weight", key)) for key in state)
    conventions, notes = style(source, tuple(2.0**level for level in range(6 - levels, 6 - levels + outputs)))
    program, names = "mmdetection's RetinaNet", classes(source.other)
    return replace(foreign, program=program, conventions=conventions, classes=names, notes=notes)


@dataclass
class _Settings:
    """Settings as text, in which single values are looked up."""

    text: str
    notes: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def find(self, name: str, value: str, default: Any, convert: Callable[[str], Any], *, inside: str = "") -> Any:
        """The last value of that name, in sections called `inside` where that is given."""
        text = "\n".join(self._sections(inside)) if inside else self.text
        shown = re.sub(r"\(\?:.*?\)\??", "", name)
        try:
            values = [convert(text) for text in re.findall(rf"\b{name}['\"]?\s*[=:]\s*{value}", text)]
        except (ValueError, OverflowError):
            raise ValueError(f"{shown} with numbers that are none") from None
        if not values:
            self.absent.append(shown)
            return default
        if any(value != values[-1] for value in values):
            before = ", ".join(dict.fromkeys(map(str, values[:-1])))
            self.notes.append(f"{shown}: the settings beside it say {before} and then {values[-1]}, which is taken")
        return values[-1]

    def _sections(self, name: str) -> list[str]:
        """What stands in the brackets after each `name=`."""
        sections = []
        for start in re.finditer(rf"\b{name}['\"]?\s*[=:]\s*(?:dict)?(?=[\[({{])", self.text):
            depth = 0
            for bracket in _BRACKET.finditer(self.text, start.end()):
                depth += 1 if bracket[0] in "[({" else -1
                if not depth:
                    sections.append(self.text[start.end() : bracket.end()])
                    break
        return sections


def _numbers(values: str) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values.split(",") if value.strip())
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError
    return numbers


def style(source: Source, strides: tuple[float, ...] = (8, 16, 32, 64, 128)) -> tuple[Conventions, list[str]]:
    """What the settings beside the weights say, or the name of the file, or by default `pytorch` style.

    strides: of the levels that the weights are for. Raises CheckpointError for settings that nothing here does."""
    meta = source.other.get("meta")
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "") if meta else ""
    if not text:
        caffe = "caffe" in source.file.name
        why = "its name says caffe" if caffe else "nothing in it says otherwise"
        notes = [f"no settings lie beside the weights: {'caffe' if caffe else 'pytorch'} style, because {why}"]
        return _conventions(caffe=caffe), notes
    settings = _Settings(re.sub(r"#.*", "", text))
    try:
        conventions = _read_settings(settings)
        _refuse_others(settings, strides)
    except ValueError as fault:
        raise refusal(source.file, f"its settings say {fault} - give another file", code="unsupported") from None
    read = "caffe" if conventions.stride_in_1x1 else "pytorch"
    notes = [f"{read} style, {'BGR' if conventions.bgr else 'RGB'}: by the settings beside it", *settings.notes]
    if settings.absent:
        notes.append(f"not in the settings beside it, so as usual: {', '.join(settings.absent)}")
    return conventions, notes


def _read_settings(settings: _Settings) -> Conventions:
    """Raises ValueError for numbers that are none."""
    find = settings.find
    caffe = find("style", r"['\"](\w+)", "pytorch", str, inside="backbone") == "caffe"
    bgr = find("(?:bgr_)?to_rgb", "(True|False)", str(not caffe), str) == "False"
    usual = _conventions(caffe=caffe)
    turn = -1 if bgr else 1
    mean = find("mean", _NUMBERS, usual.mean[::turn], _numbers)
    std = find("std", _NUMBERS, usual.std[::turn], _numbers)
    anchors: dict[str, Any] = {"inside": "anchor_generator"}
    strides = find("strides", _NUMBERS, (8.0, 16.0, 32.0, 64.0, 128.0), _numbers, **anchors)
    base = find("octave_base_scale", r"([\d.]+)", 4.0, float, **anchors)
    octaves = find("scales_per_octave", r"(\d+)", 3, int, **anchors)
    sides = find("(?:img_)?scale", _NUMBERS, (usual.long_side, usual.short_side), _numbers, inside="test_pipeline")
    detect: dict[str, Any] = {"inside": "test_cfg"}
    return Conventions(
        bgr=bgr,
        mean=mean[::turn],
        std=std[::turn],
        stride_in_1x1=caffe,
        norm_fixed=find("norm_eval", "(True|False)", "True", str, inside="backbone") == "True",
        p7_relu=find("relu_before_extra_convs", "(True|False)", "False", str) == "True",
        anchor_sizes=None if base == 4 else [base * stride for stride in strides],
        anchor_scales=[2 ** (i / octaves) for i in range(octaves)],
        anchor_ratios=find("ratios", _NUMBERS, usual.anchor_ratios, _numbers, **anchors),
        anchor_offset=find("center_offset", r"([\d.]+)", 0.0, float, **anchors),
        anchors_by_scale=find("scale_major", "(True|False)", "True", str, **anchors) == "False",
        delta_std=find("target_stds", _NUMBERS, usual.delta_std, _numbers),
        short_side=int(min(sides)),
        long_side=int(max(sides)),
        pad_multiple=find("(?:pad_)?size_divisor", r"(\d+)", usual.pad_multiple, int),
        score_threshold=find("score_thr", r"([\d.e-]+)", usual.score_threshold, float, **detect),
        candidates_per_level=find("nms_pre", r"(\d+)", usual.candidates_per_level, int, **detect),
        nms_iou=find("iou_thr(?:eshold)?", r"([\d.]+)", usual.nms_iou, float, **detect),
        max_detections=find("max_per_img", r"(\d+)", usual.max_detections, int, **detect),
    )


def _refuse_others(settings: _Settings, strides: tuple[float, ...]) -> None:
    """Raises ValueError naming the first setting that nothing here does."""
    checks: list[tuple[str, str, str, Callable[[str], Any], Callable[[Any], bool], str]] = [
        ("add_extra_convs", r"['\"]?(\w+)", "", str, lambda v: v != "on_lateral", "P6 made of a lateral map"),
        ("use_sigmoid", "(True|False)", "loss_cls", str, lambda v: v == "True", "a softmax over classes"),
        ("target_means", _NUMBERS, "", _numbers, lambda v: not any(v), "deltas with a mean"),
        ("type", r"['\"](\w+)", "bbox_coder", str, lambda v: v == "DeltaXYWHBBoxCoder", "boxes coded otherwise"),
        ("scales", r"([\[(])", "anchor_generator", str, lambda v: False, "anchors without octave_base_scale"),
        ("strides", _NUMBERS, "anchor_generator", _numbers, lambda v: v == strides, "strides of other levels"),
        ("num_groups", r"(\d+)", "bbox_head", int, lambda v: v == 32, "a GroupNorm of other groups"),
        ("keep_ratio", "(True|False)", "test_pipeline", str, lambda v: v == "True", "images of another aspect ratio"),
    ]
    searched = _Settings(settings.text)  # that most of these are absent is nothing to tell
    for name, value, inside, convert, fits, what in checks:
        setting = searched.find(name, value, None, convert, inside=inside)
        if setting is not None and not fits(setting):
            raise ValueError(f"{name} {setting}: {what}, which no setting here does")


def _conventions(*, caffe: bool) -> Conventions:
    if caffe:
        return Conventions(bgr=True, std=(1.0, 1.0, 1.0), stride_in_1x1=True, norm_fixed=True, p7_relu=False)
    return Conventions(norm_fixed=True, p7_relu=False)


def classes(other: dict[str, Any]) -> list[str | None] | None:
    """Of mmcv's `CLASSES` or mmengine's `dataset_meta`."""
    meta = other.get("meta")
    if not isinstance(meta, dict):
        return None
    inner = meta.get("dataset_meta")
    lists = [m.get(key) for m in (meta, inner) if isinstance(m, dict) for key in ("CLASSES", "classes")]
    names = next((list(value) for value in lists if isinstance(value, (list, tuple))), None)
    return names if names and all(isinstance(name, str) for name in names) else None
