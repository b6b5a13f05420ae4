"""Each rule against its published form, written out for one image with whole matrices and a loop over objects."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou

import matching_cases
from retina.ops.adaptive_assigners import _nearest_cells
from retina.ops.anchors import AnchorGenerator, Anchors
from retina.ops.assigners import ATSS, MaxIoU, TaskAligned
from retina.ops.boxes import decode, encode
from retina.types import Assignment, Predictions, Targets

K = 4


def pyramid(*, scales: tuple[float, ...] = (2.0,), ratios: tuple[float, ...] = (1.0,)) -> Anchors:
    """Three levels over 96 x 128 pixels."""
    return AnchorGenerator((32.0, 64.0, 128.0), scales, ratios)(((12, 16), (6, 8), (3, 4)), (8, 16, 32), "cpu")


def predict(anchors: tuple[Tensor, ...], num_images: int, *, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = tuple(torch.randn(num_images, len(level), K, generator=generator) for level in anchors)
    deltas = tuple(0.3 * torch.randn(num_images, len(level), 4, generator=generator) for level in anchors)
    return Predictions(logits, deltas, anchors)


def random_targets(seed: int, *, shape: tuple[int, int] = (3, 7)) -> Targets:
    """Objects, some of them twice, padding and crowds over 96 x 128 pixels."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(*shape, 2, generator=generator) * torch.tensor([128, 96])
    half = 3 + torch.rand(*shape, 2, generator=generator) ** 2 * 50
    boxes = torch.cat((centre - half, centre + half), dim=-1)
    boxes[:, 1] = boxes[:, 0]
    kind = torch.rand(shape, generator=generator)
    labels = torch.randint(0, K, shape, generator=generator)
    valid = kind > 0.3
    return Targets(boxes, torch.where(valid, labels, -1), valid, kind < 0.1)


def of_objects(*boxes: tuple[float, float, float, float], label: int = 0) -> Targets:
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    return Targets(torch.tensor([boxes]), torch.full((1, len(boxes)), label), valid, ~valid)


def centres(anchors: Anchors) -> Tensor:
    """From the grids: those of the corners are rounded."""
    rows = []
    for level, (height, width), stride in zip(anchors, anchors.shapes, anchors.strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        rows.append(torch.stack((x, y), dim=-1).reshape(-1, 2).repeat_interleave(len(level) // (height * width), dim=0))
    return torch.cat(rows).float()


def inside(centre: Tensor, box: Tensor) -> Tensor:
    return torch.cat((centre - box[:2], box[2:] - centre), dim=1).amin(dim=1) > 0.01


def published_atss(anchors: Anchors, boxes: Tensor, topk: int) -> Tensor:
    """The object of every anchor, -1 for none. `topk` anchors per level, as in mmdetection."""
    iou, centre = box_iou(torch.cat(list(anchors)), boxes), centres(anchors)
    owner, highest = torch.full((len(iou),), -1), torch.full((len(iou),), -1.0)
    for m, box in enumerate(boxes):
        distance = ((centre - (box[:2] + box[2:]) / 2) ** 2).sum(dim=1)
        candidates, first = [], 0
        for level in anchors:
            order = distance[first : first + len(level)].sort(stable=True).indices
            candidates.append(order[:topk] + first)
            first += len(level)
        chosen = torch.cat(candidates)
        overlap = iou[chosen, m]
        spread = overlap.std() if len(overlap) > 1 else 0
        threshold = min(overlap.mean() + spread, overlap.max() * (1 - 1e-4))
        chosen = chosen[(overlap >= threshold) & inside(centre[chosen], box)]
        chosen = chosen[iou[chosen, m] > highest[chosen]]
        owner[chosen], highest[chosen] = m, iou[chosen, m]
    return owner


def published_tal(
    centre: Tensor, predicted: Tensor, scores: Tensor, boxes: Tensor, labels: Tensor, rule: TaskAligned
) -> tuple[Tensor, Tensor]:
    """The object of every anchor, -1 for none, and its normalised alignment."""
    iou = box_iou(predicted, boxes)
    aligned = scores[:, labels] ** rule.alpha * iou**rule.beta
    owner, highest = torch.full((len(iou),), -1), torch.full((len(iou),), -1.0)
    for m, box in enumerate(boxes):
        chosen = aligned[:, m].topk(min(rule.topk, len(aligned))).indices
        chosen = chosen[(aligned[chosen, m] > 0) & inside(centre[chosen], box)]
        chosen = chosen[iou[chosen, m] > highest[chosen]]
        owner[chosen], highest[chosen] = m, iou[chosen, m]
    quality = torch.zeros(len(iou))
    for m in range(len(boxes)):
        own = owner == m
        if own.any():
            quality[own] = aligned[own, m] / (aligned[own, m].max() + 1e-7) * iou[own, m].max()
    return owner, quality


def in_crowd(anchors: tuple[Tensor, ...], targets: Targets, b: int) -> Tensor:
    boxes, crowds = torch.cat(list(anchors)), targets.boxes[b][targets.crowd[b]]
    low, high = torch.maximum(boxes[:, None, :2], crowds[:, :2]), torch.minimum(boxes[:, None, 2:], crowds[:, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return ((high - low).clamp(min=0).prod(dim=-1) >= 0.5 * area[:, None]).any(dim=1)


def assert_owners(assigned: Assignment, b: int, owner: Tensor, targets: Targets, ignored: Tensor) -> None:
    """`owner` counts the valid objects only."""
    positive = owner >= 0
    objects = targets.valid[b].nonzero().squeeze(1)
    assert torch.equal(assigned.positive[b], positive)
    assert torch.equal(assigned.negative[b], ~positive & ~ignored)
    assert torch.equal(assigned.matched[b][positive], objects[owner[positive]])
    assert ((assigned.matched >= 0) & (assigned.matched < targets.boxes.shape[1])).all()


@pytest.mark.parametrize(
    ("scales", "ratios"), [((2.0,), (1.0,)), ((1.0, 2 ** (1 / 3), 2 ** (2 / 3)), (0.5, 1.0, 2.0))], ids=["one", "nine"]
)
@pytest.mark.parametrize("seed", range(12))
def test_atss_equals_its_published_form(seed: int, scales: tuple[float, ...], ratios: tuple[float, ...]):
    anchors, targets = pyramid(scales=scales, ratios=ratios), random_targets(seed)
    assigned = ATSS()(predict(anchors, 3), targets)
    assert assigned.target_scores is None
    for b in range(3):
        owner = published_atss(anchors, targets.boxes[b][targets.valid[b]], 9 * len(scales) * len(ratios))
        assert_owners(assigned, b, owner, targets, in_crowd(anchors, targets, b))
    assert assigned.positive.sum() > 10


@pytest.mark.parametrize("topk", [1, 4, 9, 30])
def test_atss_on_grids_of_any_size_and_objects_of_any_kind(topk: int):
    """Between cells and on them, outside of the image, without area; grids that are narrower than the candidates."""
    found = 0
    for seed in range(25):
        case = matching_cases.random_case(seed, largest=120, most_objects=8)
        boxes, num_images = case.boxes, len(case.boxes)
        if boxes.shape[1] == 0:
            continue
        targets = Targets(boxes, torch.zeros(boxes.shape[:2], dtype=torch.int64), case.valid, case.crowd)
        assigned = ATSS(topk=topk)(predict(case.anchors, num_images), targets)
        per_cell = len(case.anchors[0]) // (case.anchors.shapes[0][0] * case.anchors.shapes[0][1])
        for b in range(num_images):
            owner = published_atss(case.anchors, boxes[b][case.valid[b]], topk * per_cell)
            assert torch.equal(assigned.positive[b], owner >= 0), seed
            objects = case.valid[b].nonzero().squeeze(1)
            assert torch.equal(assigned.matched[b][owner >= 0], objects[owner[owner >= 0]]), seed
            found += int((owner >= 0).sum())
    assert found > 20


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (2, 20), (3, 3), (7, 25), (20, 20)])
@pytest.mark.parametrize("topk", [1, 4, 9])
def test_the_nearest_cells_are_those_of_the_whole_grid(shape: tuple[int, int], topk: int):
    """Inside and outside of it, at random, on cells and halfway between them."""
    stride, (height, width) = 6, shape
    size = stride * torch.tensor([width, height])
    positions = (torch.rand(1, 300, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.3) * size
    positions[:, 100:] = (positions[:, 100:] / 3).round() * 3
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    distance = (x.flatten() - positions[..., :1]) ** 2 + (y.flatten() - positions[..., 1:]) ** 2
    expected = distance.sort(dim=-1, stable=True).indices[..., :topk]
    sizes = torch.tensor([[stride * height, stride * width - 1]])
    found, exists = _nearest_cells(positions, sizes, (height + 3, width + 2), stride, topk)
    assert exists.all(dim=(0, 1)).tolist() == [n < height * width for n in range(found.shape[-1])]
    found = found // (width + 2) * width + found % (width + 2)
    assert torch.equal(found[exists].view_as(expected), expected)


def test_atss_between_cells_takes_the_first_of_equally_near_ones():
    """16 cells, an object centred between four of them: with 3 candidates, the last of the four is none."""
    anchors = AnchorGenerator((16.0,), (1.0,), (1.0,))(((4, 4),), (16,), "cpu")
    assigned = ATSS(topk=3)(predict(anchors, 1), of_objects((8.0, 8, 40, 40)))
    assert assigned.positive.nonzero()[:, 1].tolist() == [5, 6, 9]


def test_atss_takes_more_than_one_cells_anchors_where_cells_have_several():
    """The nearest 9 anchors would be those of one cell, the 9 nearest cells have 81."""
    anchors = pyramid(scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))
    assigned = ATSS()(predict(anchors, 1), of_objects((40.0, 24, 72, 56)))
    cells = assigned.positive[0, : len(anchors[0])].nonzero().squeeze(1) // 9
    assert len(cells.unique()) > 1


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("scales", [(2.0,), (1.0, 2 ** (1 / 3), 2 ** (2 / 3))], ids=["one", "three"])
def test_atss_leaves_no_tiny_object_without_a_positive(levels: int, scales: tuple[float, ...]):
    """All candidates of a level overlap it alike, so that mean + deviation may exceed the highest IoU."""
    shapes, strides = ((100, 160), (50, 80), (25, 40))[:levels], (8, 16, 32)[:levels]
    anchors = AnchorGenerator((32.0, 64.0, 128.0)[:levels], scales, (1.0,))(shapes, strides, "cpu")
    corners = 8 * torch.randint(1, 90, (40, 2), generator=torch.Generator().manual_seed(0)) - 1.7
    boxes = torch.cat((corners, corners + 4.1), dim=1)
    for box in boxes:
        assigned = ATSS()(predict(anchors, 1), of_objects(tuple(box.tolist())))
        assert assigned.positive.sum() >= 1


@pytest.mark.parametrize("rule", [ATSS(), TaskAligned()], ids=["atss", "tal"])
def test_of_equal_objects_the_first_gets_all(rule):
    box = (40.0, 24.0, 72.0, 56.0)
    assigned = rule(predict(pyramid(), 1), of_objects((0.0, 60, 30, 90), box, box))
    assert 1 in assigned.matched[assigned.positive]
    assert 2 not in assigned.matched[assigned.positive]


@pytest.mark.parametrize("rule", [ATSS(), TaskAligned()], ids=["atss", "tal"])
def test_an_anchor_goes_to_the_object_it_overlaps_most(rule):
    """Two objects around one point want the same anchors; those of the other size lose."""
    anchors = pyramid()
    small, large = (48.0, 32.0, 80.0, 64.0), (32.0, 16.0, 96.0, 80.0)
    predictions = predict(anchors, 1)
    predictions = predictions._replace(deltas=tuple(torch.zeros_like(deltas) for deltas in predictions.deltas))
    assigned = rule(predictions, of_objects(small, large))
    iou = box_iou(torch.cat(list(anchors)), torch.tensor([small, large]))
    positive = assigned.positive[0]
    alone = [rule(predictions, of_objects(box)).positive[0] for box in (small, large)]
    contested = alone[0] & alone[1]
    assert contested.any()
    assert torch.equal(positive, alone[0] | alone[1])
    assert torch.equal(assigned.matched[0][contested], iou[contested].argmax(dim=1))


@pytest.mark.parametrize("rule", [ATSS(), TaskAligned()], ids=["atss", "tal"])
@pytest.mark.parametrize("num_objects", [1, 3])
def test_without_objects_all_is_negative_and_finite(rule, num_objects: int):
    nothing = torch.zeros(2, num_objects, dtype=torch.bool)
    targets = Targets(torch.rand(2, num_objects, 4), nothing.long() - 1, nothing, nothing)
    assigned = rule(predict(pyramid(), 2), targets)
    assert assigned.negative.all()
    assert not assigned.positive.any()
    assert assigned.target_scores is None or (assigned.target_scores == 0).all()
    assert (assigned.matched >= 0).all()


@pytest.mark.parametrize("rule", [ATSS(), TaskAligned()], ids=["atss", "tal"])
def test_a_crowd_ignores_what_is_not_positive(rule):
    objects = of_objects((40.0, 24.0, 72.0, 56.0), (0.0, 0.0, 100.0, 90.0))
    crowd = torch.tensor([[False, True]])
    predictions = predict(pyramid(), 1)
    alone = rule(predictions, objects._replace(valid=~crowd))
    both = rule(predictions, objects._replace(valid=~crowd, crowd=crowd))
    assert torch.equal(both.positive, alone.positive)
    assert both.positive.any()
    covered = in_crowd(predictions.anchors, objects._replace(crowd=crowd), 0)
    assert torch.equal(both.negative[0], ~both.positive[0] & ~covered)
    assert (~both.negative & ~both.positive).any()


@pytest.mark.parametrize("rule", [ATSS(), TaskAligned()], ids=["atss", "tal"])
def test_boxes_that_are_not_finite_do_no_harm(rule):
    """The step is skipped for them, which needs a result."""
    assigned = rule(predict(pyramid(), 1), of_objects((float("nan"),) * 4, (float("inf"),) * 4, (8.0, 8, 60, 60)))
    assert (assigned.matched[assigned.positive] == 2).all()
    assert assigned.positive.any()


@pytest.mark.parametrize("ratios", [(1.0,), (0.5, 1.0, 2.0)], ids=["one", "three"])
@pytest.mark.parametrize("seed", range(12))
def test_task_aligned_equals_its_published_form(seed: int, ratios: tuple[float, ...], monkeypatch):
    monkeypatch.setattr(
        "retina.ops.adaptive_assigners._PAIRS", [2**18, 21 * 40][seed % 2]
    )  # whole levels; chunks of 40 anchors
    anchors, targets = pyramid(ratios=ratios), random_targets(seed)
    predictions = predict(anchors, 3, seed=seed)
    rule = TaskAligned(topk=[13, 5][seed % 2], alpha=[1.0, 0.5][seed % 2], beta=[6.0, 2.0][seed % 2])
    assigned = rule(predictions, targets)
    boxes = decode(torch.cat(predictions.deltas, dim=1), torch.cat(list(anchors)))
    scores = torch.cat(predictions.logits, dim=1).sigmoid()
    for b in range(3):
        valid = targets.valid[b]
        objects = targets.boxes[b][valid], targets.labels[b][valid]
        owner, quality = published_tal(centres(anchors), boxes[b], scores[b], *objects, rule)
        assert_owners(assigned, b, owner, targets, in_crowd(anchors, targets, b))
        torch.testing.assert_close(assigned.target_scores[b], quality, rtol=1e-5, atol=1e-9)
    assert assigned.positive.sum() > 10


def test_the_best_aligned_anchor_of_an_object_has_its_highest_iou_as_quality():
    """With every box perfect and one anchor surer than all others, quality is the share of its score."""
    anchors = pyramid()
    predictions, targets = predict(anchors, 1), of_objects((40.0, 24, 72, 56), label=2)
    deltas = tuple(encode(targets.boxes[:, :1], level).float() for level in anchors)
    logits = tuple(torch.zeros_like(level) for level in predictions.logits)
    logits[0][0, 16 * 5 + 7, 2] = 4.0
    assigned = TaskAligned()(predictions._replace(logits=logits, deltas=deltas), targets)
    assert assigned.positive.sum() <= 13
    assert assigned.target_scores[0, 16 * 5 + 7].item() == pytest.approx(1, abs=1e-4)
    others = assigned.target_scores[assigned.positive].sort().values[:-1]
    torch.testing.assert_close(others, torch.full_like(others, 0.5 / torch.tensor(4.0).sigmoid()), rtol=1e-4, atol=0)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_task_aligned_holds_no_matrix_of_all_anchors_and_many_objects():
    """It grew with both: 3,000 objects in each of 4 images took 6 GB."""
    anchors = AnchorGenerator((32.0, 64.0), (2.0,), (1.0,))(((64, 64), (32, 32)), (8, 16), "cpu")
    targets = random_targets(0, shape=(1, 1000))
    with LargestTensor() as largest:
        TaskAligned()(predict(anchors, 1), targets)
    assert largest.elements <= 2**18 + 13 * 1000, "a chunk, or what is left of two"
    assert largest.elements < sum(map(len, anchors)) * 1000 / 10


def test_task_aligned_is_not_differentiated():
    predictions = predict(pyramid(), 3)
    for tensor in (*predictions.logits, *predictions.deltas):
        tensor.requires_grad_()
    assert not TaskAligned()(predictions, random_targets(0)).target_scores.requires_grad


def test_atss_needs_a_grid():
    with pytest.raises(ValueError, match="know their grid"):
        ATSS()(predict(tuple(pyramid()), 1), of_objects((8.0, 8, 60, 60)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxIoU(positive_iou=0.3), "negative_iou <= positive_iou"),
        (lambda: ATSS(topk=0), "topk"),
        (lambda: TaskAligned(topk=0), "topk"),
        (lambda: TaskAligned(alpha=-1.0), "alpha"),
        (lambda: TaskAligned(beta=float("nan")), "beta"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
