"""What is predicted of an image depends on that image alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from retina.detections import postprocess
from retina.losses.boxes import giou
from retina.losses.classification import QualityFocal
from retina.losses.detection import DetectionLoss
from retina.model.content import Content
from retina.model.retinanet import RetinaNet, retinanet
from retina.ops.assigners import ATSS, TaskAligned
from retina.types import Detections, Predictions, Targets

TINY = {"num_classes": 3, "backbone": "resnet18", "fpn_channels": 32, "head_convs": 2}
ONE_ANCHOR = {"anchor_scales": (2.0,), "anchor_ratios": (1.0,)}
NORMS = {
    "default": {"norm": "frozen", "head_norm": "group"},
    "group": {"norm": "group", "head_norm": "group", "neck": "pafpn", "p6_from": "p5", "head_quality": True},
    "none": {"norm": "frozen", "levels": (2, 3, 4, 5, 6), "anchor_offset": 0.5, "box_bins": 6},
    "guided": {"norm": "frozen", "box_bins": 6, "guided_quality": True},
    "task aligned": {"norm": "group", "head": "task_aligned", "head_norm": "group", "head_scales": True, **ONE_ANCHOR},
    "bottlenecks": {"norm": "group", "backbone": "resnet50", "levels": (3, 4), "head_convs": 1},
    "half": {"norm": "frozen", "backbone": "resnet18_half"},
    "mobilenet_v2": {"norm": "frozen", "backbone": "mobilenet_v2"},
    "mobilenet_v3": {"norm": "group", "backbone": "mobilenet_v3_large", "levels": (2, 3, 4, 5)},
    "efficientnet": {"norm": "batch", "backbone": "efficientnet_b0", "head_norm": "group"},
}
SIZES = [(90, 130), (128, 128), (33, 200), (64, 64), (100, 31), (1, 129)]


def signalling(**settings: Any) -> RetinaNet:
    """A detector whose numbers differ from place to place."""
    torch.manual_seed(0)
    model = retinanet(**TINY | settings).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("head.", "backbone.features.")) and parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
            elif parameter.ndim == 1 and not name.startswith("head.classification.predict"):
                parameter.add_(torch.randn_like(parameter).mul_(0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
        model.head.classification.predict.bias.fill_(-2.0)
        if settings.get("head"):
            model.head.align_classes.predict.bias.fill_(0.0)
    return model


def image(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    low = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(low, size=SIZES[number], mode="bicubic").clamp(0, 1)
    noise = 0.2 * torch.rand(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).byte()[0]


def together(numbers: list[int], multiple: int = 128, pad: int = 117) -> tuple[Tensor, Tensor]:
    """A batch of these images on a common canvas, and their sizes."""
    sizes = torch.tensor([SIZES[number] for number in numbers])
    height, width = (-(-int(side) // multiple) * multiple for side in sizes.amax(dim=0))
    canvas = torch.full((len(numbers), 3, height, width), pad, dtype=torch.uint8)
    for row, number in enumerate(numbers):
        canvas[row, :, : sizes[row, 0], : sizes[row, 1]] = image(number)
    return canvas, sizes


def covered(model: RetinaNet, predictions: Predictions, row: int, size: tuple[int, ...]) -> list[Tensor]:
    """What is predicted in the cells of each level that an image covers."""
    outputs = [predictions.logits, predictions.deltas]
    outputs += [levels for levels in (predictions.quality, predictions.bins) if levels is not None]
    found = []
    for level, stride in enumerate(model.strides):
        height, width = predictions.anchors.shapes[level]  # type: ignore[attr-defined]
        for output in outputs:
            cells = output[level][row].unflatten(0, (height, width, -1))
            found.append(cells[: -(-size[0] // stride), : -(-size[1] // stride)].flatten())
    return found


COMPANIES = [[0, 1], [2, 0], [3, 4, 0, 2], [0, 0, 5], [1, 2, 3, 0, 4]]


@torch.no_grad()
@pytest.mark.parametrize("name", NORMS)
def test_detections_of_an_image_alone_and_in_company_agree(name: str) -> None:
    model = signalling(**NORMS[name]).eval()

    def of_first(numbers: list[int], **canvas: int) -> tuple[Detections, Tensor]:
        images, sizes = together(numbers, **canvas)
        predictions, row = model(images, sizes), numbers.index(0)
        found = postprocess(predictions, sizes, score_threshold=0.2)[row]
        return found, torch.cat(covered(model, predictions, row, SIZES[0]))

    alone, numbers_alone = of_first([0])
    assert len(alone.scores) > 20
    assert numbers_alone.std() > 0.1
    for company, canvas in [*((company, {}) for company in COMPANIES), ([0], {"multiple": 32, "pad": 0})]:
        found, numbers = of_first(company, **canvas)
        torch.testing.assert_close(numbers, numbers_alone, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.labels, alone.labels)
        torch.testing.assert_close(found.scores, alone.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.boxes, alone.boxes, rtol=1e-3, atol=1e-2)


def test_without_sizes_the_padding_takes_part() -> None:
    """So the test above tests something."""
    model = signalling(**NORMS["default"]).eval()
    images, _ = together([0])
    wider, _ = together([0], multiple=384)
    with torch.no_grad():
        alone, company = model(images), model(wider)
    one, other = (torch.cat(covered(model, found, 0, SIZES[0])) for found in (alone, company))
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("head_norm", [None, "group"])
def test_images_that_fill_the_canvas_are_as_without_sizes(head_norm: str | None) -> None:
    model = signalling(norm="batch", head_norm=head_norm).double().train()
    twin = copy.deepcopy(model)
    images = torch.stack([image(1), image(1).flip(-1)])
    outputs = []
    for net, sizes in ((model, None), (twin, torch.tensor([[128, 128]] * 2))):
        found = net(images, sizes)
        torch.cat([x.flatten() for x in (*found.logits, *found.deltas)]).square().mean().backward()
        outputs.append([*found.logits, *found.deltas, *(p.grad for p in net.parameters())])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    for (key, one), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"])
def test_trained_batch_norm_learns_from_content_alone(backbone: str) -> None:
    """The same two images on a tight and a wide canvas: the same outputs, gradients and running statistics."""
    settings: dict[str, Any] = {"backbone": backbone, "norm": "batch", "head_norm": "group", "levels": (3, 4)}
    tight, wide = (signalling(**settings).double().train() for _ in range(2))
    results = []
    for model, multiple in ((tight, 32), (wide, 256)):
        images, sizes = together([0, 4], multiple)
        found = model(images, sizes)
        cells = torch.cat([torch.cat(covered(model, found, row, SIZES[n])) for row, n in enumerate((0, 4))])
        cells.square().mean().backward()
        statistics = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
        results.append([cells, *(p.grad for p in model.parameters() if p.grad is not None), *statistics])
    assert len(results[0]) == len(results[1]) >= 100
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_anchors_beyond_the_content_are_no_candidates() -> None:
    model = signalling(norm="frozen", levels=(3,)).eval()
    with torch.no_grad():
        model.head.classification.predict.bias.fill_(2.0)
        predictions = model(*together([3, 2]))
    sizes = torch.tensor([SIZES[3], SIZES[2]])
    found = postprocess(predictions, sizes, nms_iou=1.0, max_detections=10**6, candidates_per_level=10**6)
    counts = [model.anchors.num_per_cell * 3 * (-(-h // 8)) * (-(-w // 8)) for h, w in sizes.tolist()]
    assert [len(one.scores) for one in found] == counts


CRITERIA = {
    "gfl": (
        {**ONE_ANCHOR, "box_bins": 6},
        DetectionLoss(
            assigner=ATSS(),
            classification=QualityFocal(),
            box_loss=giou,
            box_weighting="score",
            distribution_weight=0.25,
        ),
    ),
    "max iou": ({"anchor_sizes": (8.0, 16.0, 32.0, 64.0, 128.0)}, DetectionLoss()),
    "tal": (
        ONE_ANCHOR,
        DetectionLoss(assigner=TaskAligned(), classification=QualityFocal(), box_loss=giou),
    ),
}


def objects_of(numbers: list[int]) -> Targets:
    """Some anywhere in each image, and slivers at its right and lower edges, whose best anchors are in the padding."""
    boxes = []
    for number in numbers:
        height, width = SIZES[number]
        places = torch.rand(6, 4, generator=torch.Generator().manual_seed(number))
        low = places[:, :2] * torch.tensor([0.8 * width, 0.8 * height])
        high = torch.minimum(low + 2 + 60 * places[:, 2:], torch.tensor([width, height]))
        right = torch.tensor([[width - 3.0, 0.0, width, min(40.0, height)]])
        lower = torch.tensor([[0.0, height - 2.0, min(50.0, width), height]]).clamp(min=0)
        boxes.append(torch.cat((torch.cat((low, high), dim=1), right, lower)))
    valid = torch.ones(len(numbers), 8, dtype=torch.bool)
    return Targets(torch.stack(boxes), torch.arange(8).remainder(3).expand(len(numbers), -1), valid, ~valid)


@torch.no_grad()
@pytest.mark.parametrize("name", CRITERIA)
def test_the_loss_of_an_image_alone_is_its_share_in_company(name: str) -> None:
    settings, criterion = CRITERIA[name]
    model = signalling(norm="frozen", head_norm="group", **settings).double().eval()

    def losses_of(numbers: list[int], **canvas: int) -> Tensor:
        losses = criterion(model(*together(numbers, **canvas)), objects_of(numbers))
        return torch.stack([one for one in losses if one is not None])

    alone = [losses_of([number], multiple=32) for number in range(len(SIZES))]
    assert all(losses[2] > 0 for losses in alone[:5])  # the last is one row high: no centre lies inside
    for company in [*COMPANIES, [5, 5]]:
        expected = torch.stack([alone[number] for number in company]).sum(dim=0)
        torch.testing.assert_close(losses_of(company), expected, rtol=1e-5, atol=1e-8)


def test_masks_are_ceilings() -> None:
    content = Content(torch.tensor([[90, 130], [1, 129]]), (128, 256))
    for stride in (1, 2, 4, 8, 16, 32, 64, 128):
        mask = content.mask(stride)
        assert mask is not None
        assert mask.shape == (2, 1, -(-128 // stride), -(-256 // stride))
        for row, (height, width) in enumerate([(90, 130), (1, 129)]):
            assert mask[row].sum() == -(-height // stride) * -(-width // stride)
            assert mask[row, 0, : -(-height // stride), : -(-width // stride)].eq(1).all()
    assert Content(None, (128, 256)).mask(8) is None


def test_maps_of_one_cell_have_no_statistics_and_are_no_fault() -> None:
    """torch's norms raise for them: one image, levels of one cell, and a GroupNorm with a group for each channel."""
    model = signalling(norm="batch", head_norm="group").train()
    found = model(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8), torch.tensor([[32, 32]]))
    outputs = torch.cat([x.flatten() for x in (*found.logits, *found.deltas)])
    outputs.square().mean().backward()
    assert outputs.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
