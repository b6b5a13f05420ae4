import itertools
import math
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, generalized_box_iou_loss

from programs import Program
from retina.cli.build import build
from retina.cli.compose import compose
from retina.detections import postprocess
from retina.losses.boxes import giou, smooth_l1
from retina.losses.classification import GHM, OHEM, Focal, QualityFocal, Varifocal
from retina.losses.detection import DetectionLoss
from retina.losses.soft_targets import distribution_focal_loss
from retina.ops.anchors import AnchorGenerator, Anchors
from retina.ops.assigners import ATSS, MaxIoU, TaskAligned
from retina.ops.boxes import decode, encode, encode_distances
from retina.ops.distributions import distances_to_deltas, mean_distances
from retina.types import Assignment, Losses, Predictions, Targets

ROOT = Path(__file__).parents[2]
K = 5
BINS = 17
ANCHORS = AnchorGenerator((32.0, 64.0))(((16, 24), (8, 12)), (8, 16), "cpu")  # a pyramid of 2 levels over 128 x 192


def random_predictions(num_images: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Predictions:
    generator = torch.Generator().manual_seed(seed)

    def level(anchors: Tensor, columns: int) -> Tensor:
        return torch.randn(num_images, len(anchors), columns, generator=generator).to(dtype).requires_grad_()

    return Predictions(tuple(level(a, K) for a in ANCHORS), tuple(level(a, 4) for a in ANCHORS), ANCHORS)


def with_branches(predictions: Predictions, *, quality: bool = True, bins: bool = True, seed: int = 1) -> Predictions:
    """The same head with a quality branch and distributions, at random; the deltas are those of the distributions."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [level.shape[:2] for level in predictions.logits]
    if quality:
        branch = tuple(torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes)
        predictions = predictions._replace(quality=branch)
    if bins:
        levels = tuple(torch.randn(*shape, 4, BINS, generator=generator).requires_grad_() for shape in shapes)
        predictions = predictions._replace(bins=levels, deltas=deltas_of(levels, predictions.anchors))
    return predictions


def deltas_of(bins: tuple[Tensor, ...], anchors: Anchors) -> tuple[Tensor, ...]:
    """What the model does."""
    return tuple(
        distances_to_deltas(stride * mean_distances(level), box[:, 2:] - box[:, :2])
        for level, box, stride in zip(bins, anchors, anchors.strides, strict=True)
    )


def make_targets(*images: list[tuple[float, ...]], pad_to: int = 0) -> Targets:
    """Targets from rows (x1, y1, x2, y2, label) per image."""
    num_objects = max(pad_to, *map(len, images))
    boxes, labels = torch.zeros(len(images), num_objects, 4), torch.zeros(len(images), num_objects, dtype=torch.int64)
    valid = torch.zeros(len(images), num_objects, dtype=torch.bool)
    for b, rows in enumerate(images):
        for m, (*box, label) in enumerate(rows):
            boxes[b, m], labels[b, m], valid[b, m] = torch.tensor(box), int(label), True
    return Targets(boxes, labels, valid, torch.zeros_like(valid))


def random_objects(count: int, seed: int = 0) -> list[tuple[float, ...]]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([120, 70])
    side = 12 + torch.rand(count, 2, generator=generator) * 55
    labels = torch.randint(0, K, (count, 1), generator=generator)
    return [tuple(row) for row in torch.cat((corner, corner + side, labels), dim=1).tolist()]


def gradients(losses: Losses, predictions: Predictions) -> list[Tensor]:
    tensors = [*predictions.logits, *predictions.deltas]
    return list(torch.autograd.grad(losses.classification + losses.box, tensors))


@pytest.mark.parametrize("seed", range(3))
def test_equals_torchvision(seed: int):
    """One image, since torchvision divides each image by its own positives."""
    predictions = random_predictions(1, seed=seed)
    targets = make_targets(random_objects(6, seed))
    losses = DetectionLoss()(predictions, targets)

    anchors = torch.cat(ANCHORS)
    iou = box_iou(targets.boxes[0], anchors)
    assert (iou.amax(dim=1) > 0).all()
    matched = Matcher(0.5, 0.4, allow_low_quality_matches=True)(iou)
    outputs = {"cls_logits": torch.cat(predictions.logits, 1), "bbox_regression": torch.cat(predictions.deltas, 1)}
    theirs = RetinaNetHead(8, 9, K).compute_loss(
        [{"boxes": targets.boxes[0], "labels": targets.labels[0]}], outputs, [anchors], [matched]
    )
    num_positives = (matched >= 0).sum()
    assert losses.num_positives == num_positives > 0
    torch.testing.assert_close(losses.classification, theirs["classification"] * num_positives, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.box, theirs["bbox_regression"] * num_positives, rtol=1e-5, atol=0)
    ours = gradients(losses, predictions)
    total = num_positives * (theirs["classification"] + theirs["bbox_regression"])
    expected = torch.autograd.grad(total, [*predictions.logits, *predictions.deltas])
    torch.testing.assert_close(ours, list(expected), rtol=1e-4, atol=1e-6)


def test_a_batch_is_the_sum_of_its_images():
    predictions = random_predictions(3)
    images = [random_objects(4, 1), [], random_objects(9, 2)]
    batch = DetectionLoss(box_weighting="centerness")(predictions, make_targets(*images))
    alone = [
        DetectionLoss(box_weighting="centerness")(
            Predictions(*(tuple(t[b : b + 1] for t in ts) for ts in predictions[:2]), ANCHORS), targets
        )
        for b, targets in enumerate(make_targets(image) for image in images)
    ]
    for total, parts in zip(batch, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(total, torch.stack(parts).sum())


def test_padding_changes_nothing():
    predictions = random_predictions(2)
    images = [random_objects(3, 1), random_objects(5, 2)]
    tight = DetectionLoss(box_weighting="centerness")(predictions, make_targets(*images))
    padded_targets = make_targets(*images, pad_to=20)
    padded_targets.boxes[~padded_targets.valid] = torch.tensor([0.0, 0, 32, 32])  # not even boxes that look real
    padded_targets.labels[~padded_targets.valid] = -1
    padded = DetectionLoss(box_weighting="centerness")(predictions, padded_targets)
    assert all(torch.equal(one, other) for one, other in zip(tight, padded, strict=True))
    for one, other in zip(gradients(tight, predictions), gradients(padded, predictions), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pad_to", [0, 4])
def test_without_objects_all_is_finite_and_the_box_loss_is_zero(pad_to: int):
    predictions = random_predictions(2)
    losses = DetectionLoss(box_loss=giou)(predictions, make_targets([], [], pad_to=pad_to))
    assert losses.num_positives == 0
    assert losses.box == 0
    assert losses.classification > 0
    for grad in gradients(losses, predictions):
        assert grad.isfinite().all()
    assert all(grad.abs().max() == 0 for grad in gradients_of_box(predictions, pad_to))


def gradients_of_box(predictions: Predictions, pad_to: int) -> tuple[Tensor, ...]:
    """The box loss is connected to the graph even if it is 0: DDP would otherwise wait for the regression head."""
    losses = DetectionLoss()(predictions, make_targets([], [], pad_to=pad_to))
    return torch.autograd.grad(losses.box, predictions.deltas)


def test_anchors_inside_a_crowd_are_ignored():
    """The region is so large that no anchor has IoU 0.5 with it: coverage of the anchor's own area is what counts."""
    predictions = random_predictions(1)
    targets = make_targets([(0.0, 0.0, 120.0, 120.0, 1)])
    region = Targets(targets.boxes, targets.labels, ~targets.valid, ~targets.crowd)
    losses = DetectionLoss()(predictions, region)
    assert losses.num_positives == 0
    grads = gradients(losses, predictions)
    for anchors, grad in zip(ANCHORS, grads[:2], strict=True):
        low, high = anchors[:, :2].clamp(0, 120), anchors[:, 2:].clamp(0, 120)
        inside = (high - low).prod(dim=1) / (anchors[:, 2:] - anchors[:, :2]).prod(dim=1)
        assert (inside < 0.5).any()
        assert torch.equal(grad[0].abs().sum(dim=1) == 0, inside >= 0.5)


def test_a_crowd_does_not_take_away_the_anchors_of_an_object():
    predictions = random_predictions(1)
    targets = make_targets([(40.0, 40.0, 80.0, 80.0, 1), (0.0, 0.0, 192.0, 128.0, 0)])
    valid, crowd = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    alone = DetectionLoss()(predictions, targets._replace(valid=valid))
    both = DetectionLoss()(predictions, targets._replace(valid=valid, crowd=crowd))
    assert alone.num_positives == both.num_positives > 0
    assert alone.box == both.box
    assert alone.classification > both.classification


def test_an_object_takes_its_best_anchor_over_all_levels():
    """A tiny object overlaps anchors of both levels below 0.4; only the finer level's is its best."""
    predictions = random_predictions(1)
    losses = DetectionLoss()(predictions, make_targets([(60.0, 60.0, 68.0, 68.0, 2)]))
    fine, coarse = torch.autograd.grad(losses.box, predictions.deltas)
    assert losses.num_positives >= 1
    assert fine.abs().sum() > 0
    assert coarse.abs().sum() == 0
    assert (
        DetectionLoss(assigner=MaxIoU(low_quality=False))(
            predictions, make_targets([(60.0, 60.0, 68.0, 68.0, 2)])
        ).num_positives
        == 0
    )


@pytest.mark.parametrize("compiling", [False, True])
def test_wild_predictions_of_other_anchors_leave_the_box_loss_alone(compiling: bool, monkeypatch):
    """Also in the form for GPUs and compilers, which takes every anchor along."""
    predictions = random_predictions(2)
    targets = make_targets(random_objects(2), random_objects(3, 1))
    expected = DetectionLoss(box_loss=giou)(predictions, targets).box
    expected_grads = torch.autograd.grad(expected, predictions.deltas)
    deltas = tuple(
        torch.where(grad.abs().sum(dim=-1, keepdim=True) > 0, delta, torch.inf).detach().requires_grad_()
        for grad, delta in zip(expected_grads, predictions.deltas, strict=True)
    )
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    loss = DetectionLoss(box_loss=giou)(predictions._replace(deltas=deltas), targets).box
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, deltas), expected_grads)


def test_a_perfect_box_has_no_loss():
    anchors = ANCHORS[0][:3]
    boxes = anchors + torch.tensor([1.0, -2, 3, 4])
    deltas = encode(boxes, anchors)
    torch.testing.assert_close(smooth_l1(deltas, anchors, boxes), torch.zeros(3))
    torch.testing.assert_close(giou(deltas, anchors, boxes), torch.zeros(3), rtol=0, atol=1e-5)


def test_any_callable_is_a_box_loss_and_the_weight_scales_it():
    predictions, targets = random_predictions(1), make_targets(random_objects(3))
    plain = DetectionLoss(box_loss=partial(smooth_l1, beta=0.5))(predictions, targets)
    double = DetectionLoss(box_loss=partial(smooth_l1, beta=0.5), box_weight=2.0)(predictions, targets)
    assert double.box == 2 * plain.box
    assert double.classification == plain.classification
    assert plain.box < DetectionLoss()(predictions, targets).box


@pytest.mark.parametrize("box_loss", [smooth_l1, giou])
def test_bfloat16_predictions_are_computed_in_float32(box_loss):
    narrow = random_predictions(2, dtype=torch.bfloat16)
    wide = Predictions(*(tuple(t.detach().float() for t in tensors) for tensors in narrow[:3]))
    targets = make_targets(random_objects(3), random_objects(4, 1))
    with torch.autocast("cpu", torch.bfloat16):
        losses = DetectionLoss(box_loss=box_loss, box_weighting="score")(narrow, targets)
    for one, other in zip(losses, DetectionLoss(box_loss=box_loss, box_weighting="score")(wide, targets), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(losses, narrow))


class CountOperations(TorchDispatchMode):
    """Counts what reaches the device, backward included, and notes what would make it wait for Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.masked = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        if function.overloadpacket.__name__ in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.masked += any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


RECIPES = {
    "paper": DetectionLoss(),
    "giou": DetectionLoss(box_loss=giou),
    "ohem": DetectionLoss(classification=OHEM(batch_size=8, one_to_three=True)),
    "ghm": DetectionLoss(classification=GHM()),
    "varifocal": DetectionLoss(classification=Varifocal(), quality="iou"),
    "atss": DetectionLoss(assigner=ATSS(), box_loss=giou, box_weighting="centerness", quality="centerness"),
    "gfl": DetectionLoss(
        assigner=ATSS(),
        classification=QualityFocal(),
        box_loss=giou,
        box_weighting="score",
        distribution_weight=0.25,
    ),
    "tal": DetectionLoss(assigner=TaskAligned(), classification=QualityFocal(), box_loss=giou),
    "tal and all branches": DetectionLoss(
        assigner=TaskAligned(), classification=QualityFocal(), quality="iou", distribution_weight=0.25
    ),
}


def predictions_for(recipe: DetectionLoss, num_images: int) -> Predictions:
    bins = recipe.distribution_weight is not None
    return with_branches(random_predictions(num_images), quality=recipe.quality is not None, bins=bins)


def leaves(predictions: Predictions) -> list[Tensor]:
    """What a head would learn: no deltas where they come from distributions."""
    parts = (predictions.logits, predictions.bins or predictions.deltas, predictions.quality or ())
    return [level for part in parts for level in part]


FORMS = [(name, compiling) for name in RECIPES for compiling in (False, True)]
FORMS.remove(("ohem", False))  # on a CPU, the NMS compares as many as it takes


@pytest.mark.parametrize(("name", "compiling"), FORMS)
def test_no_waiting_and_the_same_operations_for_any_batch(name: str, compiling: bool, monkeypatch):
    """Also in the form for GPUs and compilers."""
    monkeypatch.setattr(
        "retina.ops.kernels.focal_cpu.CHUNK", 2**20
    )  # on a CPU the loss goes by chunks: one is enough here
    counts = []
    for num_images in (2, 5):
        predictions = predictions_for(RECIPES[name], num_images)
        targets = make_targets(*(random_objects(3 + b, b) for b in range(num_images)))
        with monkeypatch.context() as patch, CountOperations() as operations:
            patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
            losses = RECIPES[name](predictions, targets)
            (losses.classification + losses.box).backward()
        counts.append(operations.calls)
        for waiting in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "item"):
            assert operations.calls[waiting] == 0, waiting
        assert operations.masked == 0
    assert counts[0] == counts[1]
    assert counts[0].total() > 50  # the counter did count


@pytest.mark.parametrize("name", RECIPES)
def test_the_form_for_gpus_gives_the_same(name: str, monkeypatch):
    targets = make_targets(random_objects(3), random_objects(5, 1))
    results = []
    for compiling in (False, True):
        predictions = predictions_for(RECIPES[name], 2)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
            losses = RECIPES[name](predictions, targets)
        results.append((list(losses), torch.autograd.grad(losses.classification + losses.box, leaves(predictions))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("pad_to", [0, 3])
def test_every_recipe_is_finite_without_objects_and_its_box_loss_zero(name: str, pad_to: int):
    predictions = predictions_for(RECIPES[name], 2)
    losses = RECIPES[name](predictions, make_targets([], [], pad_to=pad_to))
    assert losses.num_positives == losses.box == 0
    assert losses.classification > 0
    for grad in torch.autograd.grad(losses.classification + losses.box, leaves(predictions)):
        assert grad.isfinite().all()  # and connected, or DDP would wait for that part of the head


def at_positives(predictions: Predictions, targets: Targets, assigned: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted boxes, anchors and objects' boxes of the positives."""
    anchors = torch.cat(list(predictions.anchors))
    image, anchor = assigned.positive.nonzero(as_tuple=True)
    boxes = decode(torch.cat(predictions.deltas, dim=1)[image, anchor], anchors[anchor])
    return boxes, anchors[anchor], targets.boxes[image, assigned.matched[image, anchor]]


@pytest.mark.parametrize("compiling", [False, True])
def test_any_classification_loss_can_ask_for_quality(compiling: bool, monkeypatch):
    class Asks:
        needs_target_scores = True

        def __call__(self, predictions: Predictions, labels: Tensor, assigned: Assignment) -> Tensor:
            assert torch.equal(assigned.target_scores > 0, assigned.positive)
            return assigned.target_scores.sum()

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    targets = make_targets(random_objects(3), random_objects(5, 1))
    small = tuple((0.1 * level).detach() for level in random_predictions(2).deltas)  # boxes stay on their objects
    losses = DetectionLoss(classification=Asks())(random_predictions(2)._replace(deltas=small), targets)
    assert 0.3 < losses.classification / losses.num_positives < 1


def test_soft_targets_are_the_iou_of_the_predicted_boxes():
    predictions, targets = random_predictions(2), make_targets(random_objects(3), random_objects(5, 1))
    assigned = MaxIoU()(predictions, targets)
    boxes, _, objects = at_positives(predictions, targets, assigned)
    quality = torch.zeros(assigned.positive.shape)
    quality[assigned.positive] = box_iou(boxes, objects).diagonal().detach()
    assert quality.amax() > 0.3
    labels = targets.labels.gather(1, assigned.matched)
    expected = QualityFocal()(predictions, labels, assigned._replace(target_scores=quality))
    losses = DetectionLoss(classification=QualityFocal())(predictions, targets)
    torch.testing.assert_close(losses.classification, expected)
    assert losses.num_positives == assigned.positive.sum()
    assert losses.box == DetectionLoss()(predictions, targets).box


@pytest.mark.parametrize("kind", ["centerness", "iou"])
def test_the_quality_branch_learns_how_well_a_box_fits(kind: str):
    predictions = with_branches(random_predictions(2), bins=False)
    targets = make_targets(random_objects(3), random_objects(5, 1))
    assigned = MaxIoU()(predictions, targets)
    boxes, anchors, objects = at_positives(predictions, targets, assigned)
    goal = box_iou(boxes, objects).diagonal().detach()
    if kind == "centerness":
        left, top, right, bottom = encode_distances(objects, anchors).unbind(-1)
        goal = (torch.minimum(left, right) / torch.maximum(left, right)).clamp(min=0)
        goal = (goal * torch.minimum(top, bottom).clamp(min=0) / torch.maximum(top, bottom)).sqrt()
    logits = torch.cat(predictions.quality, dim=1)[assigned.positive]
    expected = 3 * F.binary_cross_entropy_with_logits(logits, goal, reduction="sum")
    losses = DetectionLoss(quality=kind, quality_weight=3.0)(predictions, targets)
    plain = DetectionLoss()(predictions._replace(quality=None), targets)
    torch.testing.assert_close(losses.classification - plain.classification, expected, rtol=1e-4, atol=0)
    assert losses.box == plain.box


def test_centerness_of_literals():
    """An object of 40 x 40 px: an anchor in its middle, one at a quarter of its width, on its border, and outside."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [-10, 0, -2, 8], [-20, 0, -12, 8], [-30, 0, -22, 8]]) + 16
    anchors = Anchors([boxes], ((1, 4),), (8,))
    logits = torch.full((1, 4), 2.0)
    predictions = Predictions((torch.zeros(1, 4, K),), (torch.zeros(1, 4, 4),), anchors, quality=(logits,))
    everything = torch.ones(1, 4, dtype=torch.bool)
    assigned = Assignment(torch.zeros(1, 4, dtype=torch.int64), everything, ~everything)
    arguments = {"assigner": lambda predictions, targets: assigned, "box_weighting": "centerness"}
    losses, plain = (
        DetectionLoss(quality="centerness", quality_weight=weight, **arguments)(
            predictions, make_targets([(0.0, 0, 40, 40, 1)])
        )
        for weight in (1.0, 0.0)
    )
    goal = torch.tensor([[1, (1 / 3) ** 0.5, 0, 0]])
    expected = F.binary_cross_entropy_with_logits(logits, goal, reduction="sum").item()
    assert (losses.classification - plain.classification).item() == pytest.approx(expected, rel=1e-5)
    assert losses.box_normalizer.item() == pytest.approx(goal.sum().item())


def test_distributions_learn_the_distances_in_strides():
    predictions = with_branches(random_predictions(2), quality=False)
    targets = make_targets(random_objects(3), random_objects(5, 1))
    assigned = MaxIoU()(predictions, targets)
    _, anchors, objects = at_positives(predictions, targets, assigned)
    strides = torch.cat([torch.full((len(a),), s) for a, s in zip(ANCHORS, ANCHORS.strides, strict=True)])
    distances = encode_distances(objects, anchors) / strides[assigned.positive.nonzero()[:, 1], None]
    logits = torch.cat(predictions.bins, dim=1)[assigned.positive]
    expected = 0.5 * distribution_focal_loss(logits, distances).mean(dim=-1).sum()
    losses = DetectionLoss(distribution_weight=0.5)(predictions, targets)
    plain = DetectionLoss()(predictions._replace(bins=None), targets)
    torch.testing.assert_close(losses.box - plain.box, expected, rtol=1e-4, atol=0)


def test_the_quality_of_an_assigner_weighs_boxes_and_divides_all():
    predictions = with_branches(random_predictions(2), quality=False)
    targets = make_targets(random_objects(3), random_objects(5, 1))
    assigned = TaskAligned()(predictions, targets)
    boxes, anchors, objects = at_positives(predictions, targets, assigned)
    weights = assigned.target_scores[assigned.positive]
    recipe = {"assigner": TaskAligned(), "classification": QualityFocal(), "box_loss": giou, "box_weight": 2.0}
    losses = DetectionLoss(**recipe, distribution_weight=0.0)(predictions, targets)
    torch.testing.assert_close(losses.num_positives, weights.sum())
    assert 0 < losses.num_positives < assigned.positive.sum()
    expected = 2 * (weights * generalized_box_iou_loss(boxes, objects)).sum()
    torch.testing.assert_close(losses.box, expected)
    strides = torch.cat([torch.full((len(a),), s) for a, s in zip(ANCHORS, ANCHORS.strides, strict=True)])
    distances = encode_distances(objects, anchors) / strides[assigned.positive.nonzero()[:, 1], None]
    parts = distribution_focal_loss(torch.cat(predictions.bins, dim=1)[assigned.positive], distances)
    both = DetectionLoss(**recipe, distribution_weight=0.25)(predictions, targets).box
    torch.testing.assert_close(both, expected + 0.25 * (weights * parts.mean(dim=-1)).sum())
    labels = targets.labels.gather(1, assigned.matched)
    torch.testing.assert_close(losses.classification, QualityFocal()(predictions, labels, assigned))


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def cross_entropy(logit: float, target: float) -> float:
    return -target * math.log(sigmoid(logit)) - (1 - target) * math.log(sigmoid(-logit))


def overlaps(one: list[float], other: list[float]) -> tuple[float, float]:
    """IoU and generalized IoU."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    width, height = (max(one[i + 2], other[i + 2]) - min(one[i], other[i]) for i in (0, 1))
    return shared / union, shared / union - (width * height - union) / (width * height)


def published(name: str, predictions: Predictions, targets: Targets, assigned: Assignment) -> dict[str, float]:
    """The sums of ATSS (atss_head.py of mmdetection), GFL (gfl_head.py) and TOOD (tood_head.py), anchor by anchor.

    Classes and centerness are divided by `positives`, boxes and distributions by `weights`."""
    sums = dict.fromkeys(("classes", "centerness", "box", "distribution", "positives", "weights"), 0.0)
    strides = [s for level, s in zip(predictions.anchors, predictions.anchors.strides, strict=True) for _ in level]
    anchors = torch.cat(list(predictions.anchors)).double().tolist()
    per_anchor = [
        [] if part is None else torch.cat([level.detach().double() for level in part], dim=1).tolist()
        for part in (predictions.logits, predictions.deltas, predictions.quality, predictions.bins)
    ]
    for b, a in itertools.product(range(len(targets.boxes)), range(len(anchors))):
        logits, deltas, fit, bins = (part[b][a] if part else None for part in per_anchor)
        positive, goals = bool(assigned.positive[b, a]), [0.0] * K
        if positive:
            anchor, m = anchors[a], int(assigned.matched[b, a])
            box, label = targets.boxes[b, m].double().tolist(), int(targets.labels[b, m])
            x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
            sides = [x - box[0], y - box[1], box[2] - x, box[3] - y]
            if bins is None:
                w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
                across, down = w * math.exp(deltas[2]) / 2, h * math.exp(deltas[3]) / 2
                x, y = x + deltas[0] * w, y + deltas[1] * h
                predicted = [x - across, y - down, x + across, y + down]
            else:
                parts = [[math.exp(z) / sum(map(math.exp, side)) for z in side] for side in bins]
                means = [strides[a] * sum(i * p for i, p in enumerate(side)) for side in parts]
                predicted = [x - means[0], y - means[1], x + means[2], y + means[3]]
            iou, generalized = overlaps(predicted, box)
            ratios = [min(sides[i], sides[i + 2]) / max(sides[i], sides[i + 2]) for i in (0, 1)]
            centerness = math.sqrt(ratios[0] * ratios[1])
            aligned = 0.0 if name != "tal" else float(assigned.target_scores[b, a])
            goals[label] = {"atss": 1.0, "gfl": iou, "tal": aligned}[name]
            weight = {"atss": centerness, "gfl": max(map(sigmoid, logits)), "tal": aligned}[name]
            sums["positives"] += aligned if name == "tal" else 1
            sums["weights"] += weight
            sums["box"] += weight * (1 - generalized)
            if fit is not None:
                sums["centerness"] += cross_entropy(fit, centerness)
            for distance, side in zip(sides, parts if bins else (), strict=False):
                y = min(max(distance / strides[a], 0), BINS - 1)
                left = min(int(y), BINS - 2)
                loss = (left + 1 - y) * math.log(side[left]) + (y - left) * math.log(side[left + 1])
                sums["distribution"] -= weight * loss / 4
        if positive or bool(assigned.negative[b, a]):
            for logit, goal in zip(logits, goals, strict=True):
                balance = 1.0 if name != "atss" else 0.25 if goal else 0.75
                sums["classes"] += balance * abs(goal - sigmoid(logit)) ** 2 * cross_entropy(logit, goal)
    return sums


@pytest.mark.parametrize("name", ["atss", "gfl", "tal"])
def test_recipes_are_as_published(name: str) -> None:
    """Those of the configs, against a plain loop in float64."""
    words = {"tal": ["loss.distribution_weight=0.25"]}.get(name, [])
    criterion = build(compose("train", ["experiment=paper", f"loss={name}", *words])["loss"], "loss")
    predictions = predictions_for(criterion, 2)
    targets = make_targets(random_objects(3), random_objects(5, 1))
    assigned = criterion.assigner(predictions, targets)
    sums = published(name, predictions, targets, assigned)
    losses = criterion(predictions, targets)
    assert 0 < sums["weights"] < assigned.positive.sum()
    scores, boxes = sums["classes"] + sums["centerness"], 2 * sums["box"] + 0.25 * sums["distribution"]
    divisors = [losses.num_positives, losses.num_positives if name == "tal" else losses.box_normalizer]
    results = [value.item() for value in (losses.classification, losses.box, *divisors, losses.total())]
    total = scores / max(sums["positives"], 1) + boxes / max(sums["weights"], 1)
    assert results == pytest.approx([scores, boxes, sums["positives"], sums["weights"], total], rel=1e-5)


def test_tal_begins_with_atss_as_published() -> None:
    """For four epochs of twelve; tood_head.py then divides and weighs like atss_head.py, without centerness."""
    criterion = build(compose("train", ["loss=tal", "loss.distribution_weight=0.25"])["loss"], "loss")
    first = criterion.at(0.0)
    assert criterion.at(0.33) == first != criterion
    assert criterion.at(0.34) is criterion.at(1.0) is criterion
    predictions = predictions_for(first, 2)
    targets = make_targets(random_objects(3), random_objects(5, 1))
    sums = published("atss", predictions, targets, ATSS()(predictions, targets))
    losses = first(predictions, targets)
    expected = [sums["classes"], 2 * sums["box"] + 0.25 * sums["distribution"], sums["positives"], sums["weights"]]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)


def test_a_warm_start_must_fit_the_head_and_the_classes_too() -> None:
    criterion = DetectionLoss(warm_start=DetectionLoss(quality="iou", classification=Focal(alpha=[0.1, 0.9])))
    with pytest.raises(ValueError, match="no quality branch"):
        criterion.check_head(quality=False, bins=False)
    with pytest.raises(ValueError, match="2 values for 3 classes"):
        criterion.check_classes(3)


def test_the_weights_of_boxes_have_no_gradient() -> None:
    """Or a box that is hard to find would be made harder to see."""
    criterion = DetectionLoss(box_weighting="score")
    predictions, targets = random_predictions(2), make_targets(random_objects(3), random_objects(5, 1))
    losses = criterion(predictions, targets)
    assert losses.box_normalizer is not None
    assert not losses.box_normalizer.requires_grad
    grads = torch.autograd.grad(losses.box, predictions.logits, allow_unused=True)
    assert grads == (None, None)


@pytest.mark.parametrize(
    ("settings", "branches", "message"),
    [
        ({"quality": "iou"}, {"quality": False, "bins": False}, "no quality branch"),
        ({}, {"bins": False}, "set quality"),
        ({"distribution_weight": 0.25}, {"quality": False, "bins": False}, "no distributions"),
        ({}, {"quality": False}, "set distribution_weight"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_in_one_line(settings: dict, branches: dict, message: str):
    predictions = with_branches(random_predictions(1), **branches)
    with pytest.raises(ValueError, match=message) as error:
        DetectionLoss(**settings)(predictions, make_targets(random_objects(2)))
    assert "\n" not in str(error.value)


def test_distributions_need_strides():
    predictions = with_branches(random_predictions(1), quality=False)._replace(anchors=tuple(ANCHORS))
    with pytest.raises(ValueError, match="strides"):
        DetectionLoss(distribution_weight=0.25)(predictions, make_targets(random_objects(2)))


def test_the_counter_sees_what_it_forbids():
    values = torch.rand(5)
    with CountOperations() as operations:
        values[values > 0.5].sum().item()
    assert operations.masked == 1
    assert operations.calls["_local_scalar_dense"] == 1


@pytest.mark.slow
def test_compiles_into_one_graph():
    """In a process of its own: here, every function is wrapped in type checks that a compiler cannot trace."""
    compile_in_a_process("paper", "atss", "tal and all branches")


def test_the_default_criterion_compiles_into_one_graph():
    """That of `configs/train.yaml`, likewise in a process of its own."""
    compile_in_a_process("default")


def compile_in_a_process(*names: str) -> None:
    program = Program(__file__, *names, cwd=Path(__file__).parent)
    _, err = program.communicate(timeout=1000)
    assert program.returncode == 0, err


def compile_and_compare(*names: str) -> None:
    default = build(compose("train", [])["loss"], "loss")
    for name in names:
        criterion = default if name == "default" else RECIPES[name]
        predictions = predictions_for(criterion, 2)
        targets = make_targets(random_objects(3), random_objects(4, 1))
        expected = criterion(predictions, targets)
        total = expected.classification + expected.box
        expected_grads = torch.autograd.grad(total, leaves(predictions), retain_graph=True)
        backend = "eager" if name == "default" else "aot_eager"  # the quick test needs no graph of the gradient
        compiled = torch.compile(criterion.__call__, fullgraph=True, backend=backend)
        losses = compiled(predictions, targets)
        torch.testing.assert_close(list(losses), list(expected))
        grads = torch.autograd.grad(losses.classification + losses.box, leaves(predictions))
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_on_a_gpu_nothing_waits_and_the_result_is_the_same(name: str):
    criterion, targets = RECIPES[name], make_targets(random_objects(3), random_objects(4, 1))
    predictions = predictions_for(criterion, 2)
    expected = criterion(predictions, targets)

    def move(levels: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        return levels and tuple(level.detach().cuda().requires_grad_() for level in levels)

    logits, deltas, anchors, quality, bins = predictions
    there = Predictions(move(logits), move(deltas), anchors, move(quality), move(bins))
    there = there._replace(anchors=Anchors([level.cuda() for level in anchors], anchors.shapes, anchors.strides))
    if bins:
        there = there._replace(deltas=deltas_of(there.bins, there.anchors))
    targets_there = Targets(*(t.cuda() for t in targets))
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = criterion(there, targets_there)
        grads = torch.autograd.grad(losses.classification + losses.box, leaves(there))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([loss.cpu() for loss in losses], list(expected), rtol=1e-5, atol=0)
    expected_grads = torch.autograd.grad(expected.classification + expected.box, leaves(predictions))
    torch.testing.assert_close([grad.cpu() for grad in grads], list(expected_grads), rtol=1e-4, atol=1e-6)


def commanded(name: str) -> tuple[DetectionLoss, dict[str, Any]]:
    """The loss of `loss=NAME`, and the model that the command in its header asks for."""
    from retina.cli.build import build
    from retina.cli.compose import compose

    header = (ROOT / "configs" / "loss" / f"{name}.yaml").read_text().partition("_target_")[0]
    words = re.findall(r"model[.=]\S+", header)
    settings = compose("train", ["experiment=paper", f"loss={name}", *words])
    return build(settings["loss"], "loss"), settings["model"]


CONFIGS = sorted(file.stem for file in (ROOT / "configs" / "loss").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_finds_its_objects(name: str):
    """With the outputs themselves as parameters: no step of a network is as quick."""
    criterion, model = commanded(name)
    generator = AnchorGenerator((32.0, 64.0), tuple(model["anchor_scales"]), tuple(model["anchor_ratios"]))
    anchors = generator(((16, 24), (8, 12)), (8, 16), "cpu")
    targets = make_targets(
        [(12.0, 20.0, 60.0, 75.0, 3), (100.0, 30.0, 190.0, 110.0, 1)], [(70.0, 40.0, 130.0, 90.0, 4)]
    )

    def zeros(*shape: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(2, len(level), *shape, requires_grad=True) for level in anchors)

    logits = tuple((level.detach() - 4.6).requires_grad_() for level in zeros(K))
    quality = zeros() if model["head_quality"] else None
    bins = zeros(4, model["box_bins"]) if model["box_bins"] else None
    deltas = zeros(4)
    groups = [{"params": [*logits, *(quality or ()), *(bins or ())], "lr": 0.5}, {"params": deltas, "lr": 0.1}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, total_iters=25)
    first = None
    for _ in range(25):
        optimizer.zero_grad()
        predictions = Predictions(logits, deltas_of(bins, anchors) if bins else deltas, anchors, quality, bins)
        losses = criterion(predictions, targets)
        total = losses.total()
        first = first or total.item()
        total.backward()
        optimizer.step()
        schedule.step()
    assert total < 0.5 * first
    for b, found in enumerate(postprocess(predictions, torch.tensor([[128, 192]] * 2))):
        objects, count = targets.boxes[b][targets.valid[b]], int(targets.valid[b].sum())
        overlap, match = box_iou(found.boxes[:count], objects).max(dim=1)
        assert sorted(match.tolist()) == list(range(count))
        assert (overlap > 0.85).all()
        assert torch.equal(found.labels[:count], targets.labels[b][match])
        assert (found.scores[:count] > 0.2).all()  # from 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"box_weight": -1.0}, "box_weight"),
        ({"box_weight": float("nan")}, "box_weight"),
        ({"quality_weight": -1.0}, "quality_weight"),
        ({"warm_start_share": 2.0}, "warm_start_share"),
        ({"distribution_weight": float("inf")}, "distribution_weight"),
        ({"box_loss": partial(smooth_l1, beta=-1.0)}, "beta must be finite and at least 0"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(settings: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        DetectionLoss(**settings)
    assert "\n" not in str(error.value)


def test_alphas_are_as_many_as_classes():
    criterion = DetectionLoss(classification=Focal(alpha=[0.1, 0.9]))
    criterion.check_classes(2)
    with pytest.raises(ValueError, match=r"classification\.alpha has 2 values for 3 classes"):
        criterion.check_classes(3)
    DetectionLoss().check_classes(3)


if __name__ == "__main__":
    compile_and_compare(*sys.argv[1:])
