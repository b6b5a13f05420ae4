import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from retina.losses.boxes import giou, smooth_l1
from retina.losses.detection import DetectionLoss
from retina.ops.anchors import AnchorGenerator
from retina.ops.assigners import MaxIoU
from retina.ops.coding import encode
from retina.types import Losses, Predictions, Targets

K = 5
ANCHORS = AnchorGenerator((32.0, 64.0))(((16, 24), (8, 12)), (8, 16), "cpu")  # a pyramid of 2 levels over 128 x 192


def random_predictions(num_images: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Predictions:
    generator = torch.Generator().manual_seed(seed)

    def level(anchors: Tensor, columns: int) -> Tensor:
        return torch.randn(num_images, len(anchors), columns, generator=generator).to(dtype).requires_grad_()

    return Predictions(tuple(level(a, K) for a in ANCHORS), tuple(level(a, 4) for a in ANCHORS), ANCHORS)


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
    batch = DetectionLoss()(predictions, make_targets(*images))
    alone = [
        DetectionLoss()(Predictions(*(tuple(t[b : b + 1] for t in ts) for ts in predictions[:2]), ANCHORS), targets)
        for b, targets in enumerate(make_targets(image) for image in images)
    ]
    for total, parts in zip(batch, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(total, torch.stack(parts).sum())


def test_padding_changes_nothing():
    predictions = random_predictions(2)
    images = [random_objects(3, 1), random_objects(5, 2)]
    tight = DetectionLoss()(predictions, make_targets(*images))
    padded_targets = make_targets(*images, pad_to=20)
    padded_targets.boxes[~padded_targets.valid] = torch.tensor([0.0, 0, 32, 32])  # not even boxes that look real
    padded_targets.labels[~padded_targets.valid] = -1
    padded = DetectionLoss()(predictions, padded_targets)
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
        losses = DetectionLoss(box_loss=box_loss)(narrow, targets)
    for one, other in zip(losses, DetectionLoss(box_loss=box_loss)(wide, targets), strict=True):
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


@pytest.mark.parametrize("box_loss", [smooth_l1, giou])
def test_no_waiting_and_the_same_operations_for_any_batch(box_loss, monkeypatch):
    monkeypatch.setattr("retina.ops.focal._CHUNK", 2**20)  # on a CPU the loss goes chunk by chunk: one is enough here
    counts = []
    for num_images in (2, 5):
        predictions = random_predictions(num_images)
        targets = make_targets(*(random_objects(3 + b, b) for b in range(num_images)))
        with CountOperations() as operations:
            losses = DetectionLoss(box_loss=box_loss)(predictions, targets)
            (losses.classification + losses.box).backward()
        counts.append(operations.calls)
        for waiting in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "item"):
            assert operations.calls[waiting] == 0, waiting
        assert operations.masked == 0
    assert counts[0] == counts[1]
    assert counts[0].total() > 50  # the counter did count


def test_the_counter_sees_what_it_forbids():
    values = torch.rand(5)
    with CountOperations() as operations:
        values[values > 0.5].sum().item()
    assert operations.masked == 1
    assert operations.calls["_local_scalar_dense"] == 1


@pytest.mark.slow
def test_compiles_into_one_graph():
    """In a process of its own: here, every function is wrapped in type checks that a compiler cannot trace."""
    subprocess.run([sys.executable, __file__], check=True, timeout=200)


def compile_and_compare() -> None:
    predictions, targets = random_predictions(2), make_targets(random_objects(3), random_objects(4, 1))
    criterion = DetectionLoss()
    expected = criterion(predictions, targets)
    compiled = torch.compile(lambda *arguments: criterion(*arguments), fullgraph=True, backend="aot_eager")
    losses = compiled(predictions, targets)
    torch.testing.assert_close(list(losses), list(expected))
    torch.testing.assert_close(gradients(losses, predictions), gradients(expected, predictions))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits_and_the_result_is_the_same():
    predictions, targets = random_predictions(2), make_targets(random_objects(3), random_objects(4, 1))
    expected = DetectionLoss()(predictions, targets)
    there = Predictions(*(tuple(t.detach().cuda() for t in tensors) for tensors in predictions[:3]))
    for tensor in (*there.logits, *there.deltas):
        tensor.requires_grad_()
    targets_there = Targets(*(t.cuda() for t in targets))
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = DetectionLoss()(there, targets_there)
        grads = gradients(losses, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([loss.cpu() for loss in losses], list(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close([grad.cpu() for grad in grads], gradients(expected, predictions), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"box_weight": -1.0}, "box_weight"),
        ({"box_weight": float("nan")}, "box_weight"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(settings: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        DetectionLoss(**settings)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    compile_and_compare()
