"""TOOD's head against its description, written out for one image in float64 with a loop over cells."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray
from torch import Tensor
from torchvision.ops import deform_conv2d

from faults import refused
from retina.errors import ConfigError
from retina.losses.boxes import giou
from retina.losses.classification import Focal, QualityFocal
from retina.losses.detection import DetectionLoss
from retina.model.retinanet import retinanet
from retina.model.task_aligned_head import TaskAlignedHead, _read_at
from retina.model.weights import DetectorCard, load_detector, save_detector
from retina.ops.anchors import AnchorGenerator
from retina.ops.assigners import ATSS, TaskAligned
from retina.ops.boxes import decode
from retina.types import Targets
from tiny import PREPROCESSING

CHANNELS, CLASSES, STRIDES = 8, 2, (8, 16)
GENERATOR = AnchorGenerator((64.0, 100.0), (1.0,), (1.0,))
CONTENT = [[(3, 4), (4, 6)], [(2, 2), (2, 3)]]
"""(height, width) of each image on each level, of maps 4 x 6 and 2 x 3."""


def a_head(norm: str | None, *, scaled: bool = True) -> TaskAlignedHead:
    torch.manual_seed(0)
    sides = GENERATOR.sides(STRIDES)
    settings = {"channels": CHANNELS, "num_convs": 2, "norm": norm, "prior": 0.3}
    head = TaskAlignedHead(
        6, num_classes=CLASSES, anchor_sides=sides, scaled_levels=2 if scaled else None, **settings
    ).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.3))
    return head


def conv(x: ndarray, layer: torch.nn.Conv2d) -> ndarray:
    weight = layer.weight.detach().numpy()
    reach, (_, height, width) = weight.shape[-1] // 2, x.shape
    out = np.zeros((len(weight), height, width))
    if layer.bias is not None:
        out += layer.bias.detach().numpy()[:, None, None]
    for i in range(height):
        for j in range(width):
            for di in range(-reach, reach + 1):
                for dj in range(-reach, reach + 1):
                    if 0 <= i + di < height and 0 <= j + dj < width:
                        out[:, i, j] += weight[:, :, di + reach, dj + reach] @ x[:, i + di, j + dj]
    return out


def finish(x: ndarray, norm: torch.nn.GroupNorm | None) -> ndarray:
    """GroupNorm and ReLU."""
    if norm is not None:
        size = len(x) // norm.num_groups
        for group in range(norm.num_groups):
            part = x[group * size : (group + 1) * size]
            x[group * size : (group + 1) * size] = (part - part.mean()) / math.sqrt(part.var() + norm.eps)
        weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
        x = x * weight[:, None, None] + bias[:, None, None]
    return np.maximum(x, 0)


def task(shared: list[ndarray], branch: torch.nn.Module) -> ndarray:
    """The 1x1 convolution of the layers, each times its attention: what weighing the kernel amounts to."""
    hidden = conv(np.concatenate(shared).mean(axis=(1, 2), keepdims=True), branch.attention[0])
    attention = 1 / (1 + np.exp(-conv(np.maximum(hidden, 0), branch.attention[2])))[:, 0, 0]
    weighed = np.concatenate([a * layer for a, layer in zip(attention, shared, strict=True)])
    return conv(finish(conv(weighed, branch.reduce.conv), branch.reduce.norm), branch.predict)


def alignment(shared: list[ndarray], branch: torch.nn.Module) -> ndarray:
    return conv(np.maximum(conv(np.concatenate(shared), branch.reduce), 0), branch.predict)


def read(x: ndarray, row: float, column: float) -> float:
    total = 0.0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            total += max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j)) * x[i, j]
    return total


def published(head: TaskAlignedHead, x: ndarray, scale: float) -> tuple[ndarray, ndarray]:
    """Scores [K H W], and boxes [4 H W] in strides."""
    shared = []
    for layer in head.convs:
        x = finish(conv(x, layer.conv), layer.norm)
        shared.append(x)
    sigmoid = lambda values: 1 / (1 + np.exp(-values))  # noqa: E731
    scores = np.sqrt(sigmoid(task(shared, head.classification)) * sigmoid(alignment(shared, head.align_classes)))
    distances = scale * np.exp(np.minimum(task(shared, head.box), math.log(62.5)))
    offsets = alignment(shared, head.align_box)
    _, height, width = x.shape
    boxes = np.zeros((4, height, width))
    for i in range(height):
        for j in range(width):
            left, top, right, bottom = distances[:, i, j]
            boxes[:, i, j] = j - left, i - top, j + right, i + bottom
    aligned = np.zeros_like(boxes)
    for i in range(height):
        for j in range(width):
            for side in range(4):
                row, column = i + offsets[2 * side, i, j], j + offsets[2 * side + 1, i, j]
                aligned[side, i, j] = read(boxes[side], row, column)
            if aligned[0, i, j] > aligned[2, i, j] or aligned[1, i, j] > aligned[3, i, j]:
                aligned[:, i, j] = boxes[:, i, j]
    return scores, aligned


def features(*, masked: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Maps of two images, zero beyond their content, and the masks."""
    generator = torch.Generator().manual_seed(1)
    maps, masks = [], []
    for sizes, shape in zip(CONTENT, ((4, 6), (2, 3)), strict=True):
        mask = torch.zeros(2, 1, *shape)
        for image, (height, width) in enumerate(sizes if masked else [shape, shape]):
            mask[image, :, :height, :width] = 1
        maps.append(torch.randn(2, 6, *shape, generator=generator, dtype=torch.float64) * mask)
        masks.append(mask)
    return tuple(maps), tuple(masks)


@torch.no_grad()
@pytest.mark.parametrize(("norm", "scaled"), [("group", True), (None, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_what_the_paper_describes(masked: bool, norm: str | None, scaled: bool) -> None:
    head = a_head(norm, scaled=scaled)
    maps, masks = features(masked=masked)
    logits, deltas, quality = head(maps, masks if masked else None)
    assert quality == ()
    anchors = GENERATOR(((4, 6), (2, 3)), STRIDES, "cpu")
    moved = 0
    for level, (x, mask) in enumerate(zip(maps, masks, strict=True)):
        shape = x.shape[-2:]
        scores = logits[level].sigmoid().unflatten(1, shape)
        boxes = decode(deltas[level], anchors[level]).unflatten(1, shape) / STRIDES[level]
        for image in range(2):
            height, width = (int(mask[image, 0].any(dim=d).sum()) for d in (1, 0))
            scale = float(head.scales[level]) if head.scales is not None else 1.0
            expected = published(head, x[image, :, :height, :width].numpy(), scale)
            assert expected[0].std() > 0.02
            moved += expected[1].size
            for found, one in zip((scores, boxes), expected, strict=True):
                inside = found[image, :height, :width].permute(2, 0, 1).numpy()
                np.testing.assert_allclose(inside, one, rtol=1e-5, atol=1e-5)
    assert moved > 100


@torch.no_grad()
def test_reading_beside_a_cell_is_a_deformable_convolution() -> None:
    torch.manual_seed(0)
    maps, offsets = torch.randn(2, 4, 5, 7).double(), 3 * torch.randn(2, 4, 2, 5, 7).double()
    weight = torch.ones(4, 1, 1, 1).double()
    torch.testing.assert_close(_read_at(maps, offsets), deform_conv2d(maps, offsets.flatten(1, 2), weight))


def test_every_parameter_learns_and_the_start_is_the_prior() -> None:
    model = a_model()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    found = model(images, torch.tensor([[64, 96], [50, 60]]))
    scores = torch.cat(found.logits, dim=1).sigmoid()
    torch.testing.assert_close(scores, torch.full_like(scores, 0.01), rtol=0.3, atol=0)
    torch.cat([x.flatten() for x in (*found.logits, *found.deltas)]).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def a_model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"backbone": "resnet18", "fpn_channels": 16, "levels": (3, 4), "head_convs": 2, "head_norm": "group"}
    one = {"anchor_scales": (2.0,), "anchor_ratios": (1.0,)}
    return retinanet(num_classes=3, head="task_aligned", head_scales=True, **sizes, **one)


def test_it_trains_from_the_warm_start_on_and_comes_back_from_its_file(tmp_path: Path) -> None:
    """With TOOD's losses: ATSS first, then TAL."""
    begin = DetectionLoss(
        assigner=ATSS(), classification=Focal(), box_loss=giou, box_weight=2.0, box_weighting="centerness"
    )
    options = {"assigner": TaskAligned(), "classification": QualityFocal(), "box_loss": giou, "box_weight": 2.0}
    criterion, model = DetectionLoss(warm_start=begin, warm_start_share=0.3, **options), a_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    boxes = torch.tensor([[[8.0, 8, 40, 56], [50, 10, 90, 40]], [[20.0, 20, 60, 50], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    targets = Targets(boxes, torch.tensor([[0, 1], [2, 0]]), valid, torch.zeros_like(valid))
    sizes, losses = torch.tensor([[64, 96], [50, 70]]), []
    for step in range(30):
        loss = criterion.at(step / 30)(model(images, sizes), targets).total()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[8] < 0.8 * losses[0], "ATSS"
    assert losses[-1] < 0.8 * losses[9], "TAL"

    card = DetectorCard(
        model=model.arguments, classes=["a", "b", "c"], category_ids=[1, 2, 3], preprocessing=PREPROCESSING,
        postprocess={"score_threshold": 0.05, "candidates_per_level": 100, "nms_iou": 0.5, "max_detections": 20},
    )  # fmt: skip
    file = tmp_path / "a.safetensors"
    save_detector(file, model.state_dict(), card)
    again, _ = load_detector(file, torch.device("cpu"))
    with torch.no_grad():
        for one, other in zip(model.eval()(images, sizes)[:2], again(images, sizes)[:2], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    for key, value in (("head_convs", 3), ("head_channels", 99), ("head", "other")):
        save_detector(file, model.state_dict(), DetectorCard(**vars(card) | {"model": model.arguments | {key: value}}))
        with refused("bad-header" if key == "head" else "other-model"):
            load_detector(file, torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "code", "key"),
    [
        ({"head_quality": True}, "contradiction", "head_quality"),
        ({"box_bins": 17}, "contradiction", "box_bins"),
        ({"anchor_ratios": (0.5, 1.0)}, "out-of-range", "head"),
        ({"head_convs": 0}, "out-of-range", "head_convs"),
        ({"head": "other"}, "unknown-value", "head"),
    ],
)
def test_what_it_does_not_have_is_refused(settings: dict[str, object], code: str, key: str) -> None:
    with refused(code, key, kind=ConfigError):
        retinanet(**{"num_classes": 2, "backbone": "resnet18", "head": "task_aligned", "anchor_scales": (2.0,),
                     "anchor_ratios": (1.0,)} | settings)  # fmt: skip
