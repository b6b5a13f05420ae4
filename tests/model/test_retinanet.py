"""The detector against its oracle, torchvision's RetinaNet with the same weights and the same input."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

from retina.errors import ConfigError
from retina.losses import DetectionLoss
from retina.model.retinanet import RetinaNet, retinanet
from retina.postprocess import postprocess
from retina.types import Targets

TINY = {"num_classes": 3, "backbone": "resnet18", "fpn_channels": 16, "head_convs": 1}


def torchvision_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under torchvision's names (v1 layout)."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("backbone.stem.", "backbone.body.").replace("backbone.layer", "backbone.body.layer")
        for i in range(3):
            key = key.replace(f"fpn.lateral.{i}.", f"backbone.fpn.inner_blocks.{i}.0.")
            key = key.replace(f"fpn.output.{i}.", f"backbone.fpn.layer_blocks.{i}.0.")
        key = key.replace("fpn.extra.0.", "backbone.fpn.extra_blocks.p6.")
        key = key.replace("fpn.extra.1.", "backbone.fpn.extra_blocks.p7.")
        for i in range(4):
            key = key.replace(f"head.classification.convs.{2 * i}.", f"head.classification_head.conv.{i}.0.")
            key = key.replace(f"head.box.convs.{2 * i}.", f"head.regression_head.conv.{i}.0.")
        key = key.replace("head.classification.predict.", "head.classification_head.cls_logits.")
        key = key.replace("head.box.predict.", "head.regression_head.bbox_reg.")
        renamed[key] = value
    return renamed


@pytest.fixture(scope="module")
def pair() -> tuple[RetinaNet, torch.nn.Module]:
    torch.manual_seed(0)
    ours = retinanet(num_classes=7, norm="frozen", p6_from="p5", anchors_rounded=True).eval()
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7, trainable_backbone_layers=0)
    theirs.eval()
    with torch.no_grad():  # weights with a signal: at the start every score is the prior
        for tower in (ours.head.classification, ours.head.box):
            tower.predict.weight.normal_(std=0.05)
        ours.head.classification.predict.bias.fill_(-3.0)
        for name, buffer in ours.backbone.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    missing, unexpected = theirs.load_state_dict(torchvision_layout(ours.state_dict()), strict=False)
    assert [key for key in missing if not key.endswith("num_batches_tracked")] == []
    assert unexpected == []
    return ours, theirs


@torch.no_grad()
def test_equals_torchvision_on_the_same_input(pair: tuple[RetinaNet, torch.nn.Module]) -> None:
    ours, theirs = pair
    # sides that are multiples of the coarsest stride, where torchvision's guess of the strides is exact
    images = torch.randint(0, 256, (2, 3, 256, 384), dtype=torch.uint8)
    predictions = ours(images)
    features = list(theirs.backbone(ours.normalize(images)).values())
    raw = theirs.head(features)

    assert torch.allclose(torch.cat(predictions.logits, 1), raw["cls_logits"], atol=1e-4)
    assert torch.allclose(torch.cat(predictions.deltas, 1), raw["bbox_regression"], atol=1e-4)

    listed = ImageList(ours.normalize(images), [(256, 384)] * 2)
    anchors = theirs.anchor_generator(listed, features)
    assert torch.allclose(torch.cat(predictions.anchors), anchors[0], atol=1e-4)

    counts = [len(level) for level in predictions.anchors]
    split = {key: list(value.split(counts, dim=1)) for key, value in raw.items()}
    expected = theirs.postprocess_detections(split, [list(a.split(counts)) for a in anchors], listed.image_sizes)
    sizes = torch.tensor([[256, 384]] * 2)
    found = postprocess(predictions, sizes, max_detections=theirs.detections_per_img)
    assert min(len(one["scores"]) for one in expected) > 50
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other["labels"])
        assert torch.allclose(one.scores, other["scores"], atol=1e-4)
        assert torch.allclose(one.boxes, other["boxes"], atol=1e-4, rtol=1e-6)


def test_initial_classification_loss_is_the_analytic_one_of_the_prior() -> None:
    prior, alpha, gamma, k = 0.01, 0.25, 2.0, 3
    torch.manual_seed(0)
    model = retinanet(**TINY, prior=prior)
    torch.nn.init.zeros_(model.head.classification.predict.weight)  # leaves the bias alone to speak
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    predictions = model(images)
    objects = torch.tensor([[[10.0, 10.0, 60.0, 70.0]], [[40.0, 30.0, 100.0, 90.0]]])
    valid = torch.ones(2, 1, dtype=torch.bool)
    targets = Targets(objects, torch.zeros(2, 1, dtype=torch.int64), valid, ~valid)
    losses = DetectionLoss(alpha=alpha, gamma=gamma, negative_iou=0.5)(predictions, targets)  # nothing is ignored

    positives = losses.num_positives.item()
    elements = 2 * sum(len(anchors) for anchors in predictions.anchors) * k
    of_positive = alpha * (1 - prior) ** gamma * -math.log(prior)
    of_negative = (1 - alpha) * prior**gamma * -math.log(1 - prior)
    expected = positives * of_positive + (elements - positives) * of_negative
    assert positives > 0
    assert losses.classification.item() == pytest.approx(expected, rel=1e-5)


def test_random_initialisation_starts_near_the_prior() -> None:
    torch.manual_seed(0)
    model = retinanet(**TINY)
    scores = torch.cat(model(torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)).logits, 1).sigmoid()
    assert scores.mean().item() == pytest.approx(0.01, rel=0.2)


def test_forward_is_the_same_in_training_and_evaluation() -> None:
    model = retinanet(**TINY, norm="group")
    images = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    for ours, theirs in zip(model.train()(images), model.eval()(images), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("levels", [(3, 4, 5), (2, 3, 4, 5, 6), (4, 5, 6, 7, 8), (3, 4), (2,)])
def test_any_set_of_levels(levels: tuple[int, ...]) -> None:
    model = retinanet(**TINY, levels=levels, anchor_ratios=(1.0,))
    assert model.strides == tuple(2**level for level in levels)
    predictions = model(torch.zeros(1, 3, 256, 512, dtype=torch.uint8))
    for logits, anchors, stride in zip(predictions.logits, predictions.anchors, model.strides, strict=True):
        assert logits.shape == (1, math.ceil(256 / stride) * math.ceil(512 / stride) * 3, 3)
        assert anchors.shape == (logits.shape[1], 4)
    areas = [((a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])).min().sqrt().item() for a in predictions.anchors]
    assert areas == pytest.approx([4 * stride for stride in model.strides], rel=1e-4)


def test_head_outputs_are_views_in_channels_last_memory() -> None:
    model = retinanet(**TINY).to(memory_format=torch.channels_last)
    images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8).to(memory_format=torch.channels_last)
    assert all(logits.is_contiguous() and logits._base is not None for logits in model(images).logits)


def test_arguments_rebuild_the_model() -> None:
    model = retinanet(**TINY, anchor_ratios=(0.5, 2.0), levels=(3, 4, 5))
    again = retinanet(**model.arguments)
    assert again.arguments == model.arguments
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert again.anchors == model.anchors


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"backbone": "resnet19"}, "model.backbone"),
        ({"norm": "layer"}, "model.norm"),
        ({"frozen_stages": 6}, "model.frozen_stages"),
        ({"levels": (3, 5)}, "model.levels"),
        ({"levels": (1, 2)}, "model.levels"),
        ({"levels": (6, 7)}, "model.levels"),
        ({"levels": ()}, "model.levels"),
        ({"p6_from": "c4"}, "model.p6_from"),
        ({"head_norm": "batch"}, "model.head_norm"),
        ({"prior": 0.0}, "model.prior"),
        ({"anchor_sizes": (32.0, 64.0)}, "model.anchor_sizes"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_values_that_do_not_fit_are_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        retinanet(**(TINY | wrong))
