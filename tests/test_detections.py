import pytest
import torch
import torchvision.ops
from torch import Tensor

from retina.detections import count_non_finite, grouped_nms, postprocess, refuse_non_finite, to_original
from retina.errors import DataError
from retina.ops.anchors import AnchorGenerator
from retina.ops.boxes import decode
from retina.types import Detections, Predictions

ANCHORS = AnchorGenerator((32.0, 64.0))(((16, 24), (8, 12)), (8, 16), "cpu")
SIZES = torch.tensor([[128, 192], [100, 150], [128, 80]])


def random_predictions(
    num_images: int, num_classes: int, *, bias: float = -2.0, seed: int = 0, quality: bool = False
) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = tuple(torch.randn(num_images, len(a), num_classes, generator=generator) * 1.5 + bias for a in ANCHORS)
    deltas = tuple(torch.randn(num_images, len(a), 4, generator=generator) * 0.5 for a in ANCHORS)
    fits = tuple(torch.randn(num_images, len(a), generator=generator) * 2 for a in ANCHORS)
    return Predictions(logits, deltas, ANCHORS, fits if quality else None)


def nothing(num_images: int = 1, num_classes: int = 3) -> Predictions:
    """Predictions without a candidate, to write single ones into."""
    logits = tuple(torch.full((num_images, len(a), num_classes), -20.0) for a in ANCHORS)
    return Predictions(logits, tuple(torch.zeros(num_images, len(a), 4) for a in ANCHORS), ANCHORS)


def slow_reference(
    predictions: Predictions, sizes: Tensor, threshold: float, limit: int, nms_iou: float, count: int, agnostic: bool
) -> list[Detections]:
    """torchvision's steps, image by image and level by level, with the anchors of the cells that an image covers."""
    detections = []
    for b, (height, width) in enumerate(sizes.tolist()):
        boxes, scores, labels = [], [], []
        quality = predictions.quality or [None] * len(predictions.logits)
        grids = zip(predictions.anchors.shapes, predictions.anchors.strides, strict=True)
        for logits, deltas, anchors, fits, ((_, columns), stride) in zip(*predictions[:3], quality, grids, strict=True):
            flat = logits[b].flatten().sigmoid()
            candidates = (flat > threshold).nonzero().squeeze(1)
            cell = candidates // (9 * logits.shape[-1])
            covered = (cell // columns * stride < height) & (cell % columns * stride < width)
            candidates = candidates[covered]
            candidates = candidates[flat[candidates].argsort(descending=True, stable=True)[:limit]]
            anchor = candidates // logits.shape[-1]
            box = decode(deltas[b, anchor], anchors[anchor])
            boxes.append(torchvision.ops.clip_boxes_to_image(box, (height, width)))
            scores.append(flat[candidates] if fits is None else flat[candidates] * fits[b, anchor].sigmoid())
            labels.append(candidates % logits.shape[-1])
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        group = torch.zeros_like(label) if agnostic else label
        keep = torchvision.ops.batched_nms(box, score, group, nms_iou)[:count]
        detections.append(Detections(box[keep], score[keep], label[keep]))
    return detections


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("num_classes", [1, 7])
@pytest.mark.parametrize(
    ("threshold", "limit", "count"), [(0.05, 1000, 100), (0.05, 50, 300), (0.6, 1000, 100), (0.0, 100, 20)]
)
def test_equals_the_slow_reference(num_classes: int, threshold: float, limit: int, count: int, agnostic: bool):
    predictions = random_predictions(3, num_classes)
    settings = {"score_threshold": threshold, "candidates_per_level": limit, "max_detections": count}
    ours = postprocess(predictions, SIZES, nms_iou=0.5, class_agnostic=agnostic, **settings)
    expected = slow_reference(predictions, SIZES, threshold, limit, 0.5, count, agnostic)
    assert len(ours) == 3
    for one, other in zip(ours, expected, strict=True):
        assert len(one.scores) > 0
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes)
        torch.testing.assert_close(one.scores, other.scores)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("limit", [50, 1000])
@pytest.mark.parametrize("threshold", [0.05, 0.0])
def test_quality_multiplies_the_scores_of_the_candidates(threshold: float, limit: int, agnostic: bool):
    """Candidates are chosen without it; it decides the order, what suppresses what, and what is kept."""
    predictions = random_predictions(3, 4, quality=True)
    settings = {"score_threshold": threshold, "candidates_per_level": limit, "max_detections": 100}
    ours = postprocess(predictions, SIZES, nms_iou=0.5, class_agnostic=agnostic, **settings)
    assert_same(ours, slow_reference(predictions, SIZES, threshold, limit, 0.5, 100, agnostic))
    without = postprocess(predictions._replace(quality=None), SIZES, class_agnostic=agnostic, **settings)
    for one, other in zip(ours, without, strict=True):
        assert len(one.scores) > 20
        assert one.scores.max() < other.scores.max()
    narrow = predictions._replace(quality=tuple(q.bfloat16() for q in predictions.quality))
    wide = predictions._replace(quality=tuple(q.float() for q in narrow.quality))
    assert_same(postprocess(narrow, SIZES), postprocess(wide, SIZES))


def test_quality_may_lift_a_box_over_a_better_classified_one_and_below_the_threshold():
    predictions = nothing(num_classes=1)._replace(quality=tuple(torch.zeros(1, len(a)) for a in ANCHORS))
    predictions.logits[0][0, 1839, 0], predictions.logits[0][0, 1840, 0] = 2.0, 1.0  # of one cell, overlapping
    predictions.quality[0][0, 1839], predictions.quality[0][0, 1840] = -5.0, -4.0
    (detections,) = postprocess(predictions, SIZES[:1], score_threshold=0.3, nms_iou=0.3)
    assert detections.scores.tolist() == pytest.approx([torch.tensor([1.0, -4.0]).sigmoid().prod().item()])
    assert detections.scores[0] < 0.3
    torch.testing.assert_close(detections.boxes[0], ANCHORS[0][1840].clamp(min=0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_quality_that_is_not_finite_is_counted_and_nan_never_survives(value: float):
    predictions = random_predictions(2, 3, bias=0.0, quality=True)
    predictions.quality[0][0, ::3] = value
    predictions.quality[1][1, 5] = value
    assert int(count_non_finite(predictions)) == len(ANCHORS[0][::3]) + 1
    predictions.logits[1][1, 5, 0] = torch.nan  # the same anchor
    assert int(count_non_finite(predictions)) == len(ANCHORS[0][::3]) + 1
    for one in postprocess(predictions, SIZES[:2], max_detections=5000):
        assert len(one.scores) > 20
        assert one.scores.isfinite().all()


def assert_same(ours: list[Detections], expected: list[Detections]) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes)
        torch.testing.assert_close(one.scores, other.scores)


def test_looks_on_until_enough_survive():
    """Hundreds of boxes of one spot come first, then an image without anything, then one with few."""
    predictions = random_predictions(3, 2, bias=-4.0)
    anchors = ANCHORS[0]
    for level, (logits, deltas, boxes) in enumerate(zip(*predictions[:3], strict=True)):
        logits[1] = -20.0
        if level == 0:
            logits[0, 600:1200, 1] = torch.linspace(2, 3, 600)
            side, centre = boxes[600:1200, 2:] - boxes[600:1200, :2], (boxes[600:1200, :2] + boxes[600:1200, 2:]) / 2
            deltas[0, 600:1200, :2] = (torch.tensor([90.0, 60.0]) - centre) / side
            deltas[0, 600:1200, 2:] = (torch.tensor([40.0, 30.0]) / side).log()
        logits[2, 5:] = -20.0
    assert len(anchors) > 1200
    for count in (1, 3, 40):
        settings = (0.05, 700, 0.4, count)
        expected = slow_reference(predictions, SIZES, *settings, False)
        names = ("score_threshold", "candidates_per_level", "nms_iou", "max_detections")
        assert_same(postprocess(predictions, SIZES, **dict(zip(names, settings, strict=True))), expected)
        assert [len(one.scores) for one in expected] == [count, 0, min(count, len(expected[2].scores))]


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_ties_at_the_limit_of_a_level_go_to_the_lower_anchor_and_class(limit: int):
    """bfloat16 has so few numbers near each other that ties are the rule."""
    predictions = random_predictions(2, 3, bias=0.0)
    rounded = Predictions(tuple((x * 2).round() / 2 for x in predictions.logits), *predictions[1:])
    settings = {"candidates_per_level": limit, "max_detections": 2 * limit, "nms_iou": 1.0}
    ours = postprocess(rounded, SIZES[:2], **settings)
    assert_same(ours, slow_reference(rounded, SIZES[:2], 0.05, limit, 1.0, 2 * limit, False))
    assert len(ours[0].scores) == 2 * limit


def test_infinite_logits_are_no_trouble():
    predictions = nothing(num_classes=2)
    predictions.logits[0][0, 1500] = torch.tensor([torch.inf, -torch.inf])
    predictions.logits[0][0, 100, 1] = torch.inf
    (detections,) = postprocess(predictions, SIZES[:1], candidates_per_level=100)
    assert detections.scores.tolist() == [1.0, 1.0]
    assert detections.labels.tolist() == [1, 0]


def test_best_first_above_the_threshold_and_inside_the_content():
    for (height, width), detections in zip(
        SIZES.tolist(), postprocess(random_predictions(3, 4), SIZES, score_threshold=0.3), strict=True
    ):
        boxes, scores, labels = detections
        assert (scores > 0.3).all()
        assert torch.equal(scores, scores.sort(descending=True).values)
        assert (boxes >= 0).all()
        assert boxes[:, 2].max() == width  # some box reached beyond: the content, not the canvas of 128 x 192, cuts it
        assert boxes[:, 3].max() == height
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert boxes.dtype == scores.dtype == torch.float32
        assert labels.dtype == torch.int64


def test_no_detection_has_the_right_shapes():
    for detections in postprocess(nothing(2), SIZES[:2]):
        assert detections.boxes.shape == (0, 4)
        assert detections.scores.shape == detections.labels.shape == (0,)
        assert (detections.boxes.dtype, detections.scores.dtype, detections.labels.dtype) == (
            torch.float32, torch.float32, torch.int64
        )  # fmt: skip


def test_images_do_not_suppress_each_other():
    predictions = nothing(2)
    predictions.logits[0][:, 1000, 1] = 3.0
    assert [len(detections.scores) for detections in postprocess(predictions, SIZES[:2])] == [1, 1]


def test_classes_suppress_each_other_only_if_asked():
    predictions = nothing()
    predictions.logits[0][0, 1500] = torch.tensor([1.0, 3.0, 2.0])
    (detections,) = postprocess(predictions, SIZES[:1])
    assert detections.labels.tolist() == [1, 2, 0]
    (detections,) = postprocess(predictions, SIZES[:1], class_agnostic=True)
    assert detections.labels.tolist() == [1]


def test_the_threshold_is_strict_and_sees_no_rounding():
    predictions = nothing(num_classes=1)
    score = torch.tensor(-2.9444).sigmoid().item()
    predictions.logits[1][0, 300] = -2.9444
    assert len(postprocess(predictions, SIZES[:1], score_threshold=score)[0].scores) == 0
    assert len(postprocess(predictions, SIZES[:1], score_threshold=score * (1 - 1e-6))[0].scores) == 1


def test_ties_go_to_the_finer_level_then_anchor_then_class():
    predictions = nothing()
    predictions.logits[1][0, 300, 0] = 2.0
    predictions.logits[0][0, 1500, 2] = 2.0
    predictions.logits[0][0, 1500, 1] = 2.0
    predictions.logits[0][0, 200, 2] = 2.0
    (detections,) = postprocess(predictions, SIZES[:1])
    areas = (detections.boxes[:, 2:] - detections.boxes[:, :2]).prod(dim=1)
    assert detections.labels.tolist() == [2, 1, 2, 0]
    assert areas[3] > areas[:3].max()
    (first,) = postprocess(predictions, SIZES[:1], candidates_per_level=1)
    assert torch.equal(first.boxes[0], detections.boxes[0])


def test_nan_never_survives():
    predictions = random_predictions(1, 3, bias=0.0)
    predictions.logits[0][0, ::3, 1] = torch.nan
    predictions.deltas[0][0, ::5] = torch.nan
    predictions.logits[1].fill_(torch.nan)
    (detections,) = postprocess(predictions, SIZES[:1], max_detections=5000, candidates_per_level=100)
    assert len(detections.scores) > 20
    assert detections.scores.isfinite().all()
    assert detections.boxes.isfinite().all()


def test_bfloat16_predictions_give_float32_detections():
    predictions = random_predictions(2, 3)
    narrow = Predictions(*(tuple(t.bfloat16() for t in tensors) for tensors in predictions[:2]), ANCHORS)
    wide = Predictions(*(tuple(t.float() for t in tensors) for tensors in narrow[:2]), ANCHORS)
    for one, other in zip(postprocess(narrow, SIZES[:2]), postprocess(wide, SIZES[:2]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("count", [0, 1, 300, 3000])  # torchvision takes another path above 1000 boxes
def test_grouped_nms_equals_torchvision(count: int):
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 1000 - 100
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 300), dim=1)
    scores = torch.rand(count, generator=generator)
    groups = torch.randint(0, 9, (count,), generator=generator) * 1000
    ours = grouped_nms(boxes, scores, groups, 0.5)
    kept = torch.zeros(count, dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        kept[members[torchvision.ops.nms(boxes[members], scores[members], 0.5)]] = True
    expected = kept.nonzero().squeeze(1)
    assert torch.equal(ours, expected[scores[expected].argsort(descending=True)])
    if count > 1000:
        assert torch.equal(ours, torchvision.ops.batched_nms(boxes, scores, groups, 0.5))


def test_grouped_nms_keeps_the_first_of_equals():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    assert grouped_nms(boxes, torch.ones(4), torch.tensor([1, 0, 1, 0]), 0.5).tolist() == [0, 1]


def test_to_original_scales_each_axis_and_clips():
    detections = Detections(torch.tensor([[10.0, 20, 100, 50]]), torch.tensor([0.9]), torch.tensor([3]))
    mapped = to_original(detections, torch.tensor([50, 100]), torch.tensor([100, 150]))
    assert mapped.boxes.tolist() == [[15, 40, 150, 100]]
    assert mapped.scores is detections.scores
    assert mapped.labels is detections.labels
    assert detections.boxes[0, 0] == 10  # not in place
    beyond = to_original(detections, torch.tensor([50, 90]), torch.tensor([100, 150]))
    assert beyond.boxes[0, 2] == 150


@pytest.mark.parametrize(
    "settings",
    [{"score_threshold": 1.0}, {"score_threshold": -0.1}, {"nms_iou": 1.5}, {"candidates_per_level": 0},
     {"max_detections": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict):
    with pytest.raises(ValueError, match=r"must be in|at least 1"):
        postprocess(nothing(), SIZES[:1], **settings)


def test_what_is_not_finite_is_counted_by_anchor():
    predictions = random_predictions(3, 4)
    assert int(count_non_finite(predictions)) == 0
    predictions.logits[0][0, 5, 1] = float("nan")
    predictions.logits[0][0, 5, 2] = float("inf")
    predictions.deltas[0][0, 5, 0] = float("nan")  # the same anchor
    predictions.logits[1][2, 7, 0] = -float("inf")
    predictions.deltas[1][1, 7, 3] = float("inf")
    assert int(count_non_finite(predictions)) == 3
    refuse_non_finite(0, "gt.json")
    with pytest.raises(DataError, match=r"gt\.json: 3 predicted boxes have .* not a finite number - the model has"):
        refuse_non_finite(3, "gt.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_are_finite_though_their_sum_is_not(dtype: torch.dtype):
    logits = torch.zeros(1, 50, 80, dtype=dtype)
    logits[0, 3] = torch.finfo(dtype).max
    logits[0, 7, :40], logits[0, 7, 40:] = torch.finfo(dtype).max, torch.finfo(dtype).min
    predictions = Predictions((logits,), (torch.full((1, 50, 4), 3e38),), (torch.zeros(50, 4),))
    assert int(count_non_finite(predictions)) == 0
    logits[0, 9, 0], logits[0, 9, 1] = torch.inf, -torch.inf
    assert int(count_non_finite(predictions)) == 1


@pytest.mark.parametrize("which", range(4))
def test_one_bad_number_among_all_levels_is_counted(which: int):
    predictions = random_predictions(2, 3)
    tensor = (*predictions.logits, *predictions.deltas)[which]
    tensor[1, 2, 0] = -torch.inf
    assert int(count_non_finite(predictions)) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("count", [5, 300])
def test_a_gpu_finds_the_same(count: int, agnostic: bool):
    """There, one NMS serves the whole batch."""
    predictions = random_predictions(3, 7, quality=True)
    settings = {"max_detections": count, "nms_iou": 0.3, "class_agnostic": agnostic, "candidates_per_level": 200}
    expected = postprocess(predictions, SIZES, **settings)
    there = Predictions(*(tuple(t.cuda() for t in tensors) for tensors in predictions[:4]))
    found = postprocess(there, SIZES.cuda(), **settings)
    assert_same([Detections(*(t.cpu() for t in one)) for one in found], expected)
    assert int(count_non_finite(there)) == 0
    there.logits[1][2, 7, 0] = torch.nan
    assert int(count_non_finite(there)) == 1
