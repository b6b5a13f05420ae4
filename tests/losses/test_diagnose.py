import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from retina.engine.optim import build_optimizer
from retina.engine.step import train_step
from retina.losses.classification import GHM, OHEM, ClassLoss, Focal, QualityFocal, Varifocal
from retina.losses.detection import DetectionLoss
from retina.losses.diagnose import diagnose, prior_is_lost, summarize, with_diagnosis
from retina.losses.focal import sigmoid_focal_loss
from retina.losses.soft_targets import quality_focal_loss, varifocal_loss
from retina.model.retinanet import RetinaNet, retinanet
from retina.types import Assignment, Batch, Predictions, Targets

CLASSES, LEVELS, PRIOR = 5, [3, 4, 5], 0.01


def tiny_model(**arguments: object) -> RetinaNet:
    torch.manual_seed(0)
    sizes = {"fpn_channels": 16, "head_convs": 1, "levels": LEVELS, "backbone": "resnet18_half", "norm": "group"}
    return retinanet(num_classes=CLASSES, **sizes | arguments)


def some_batch(images: int = 4, objects: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(images, objects, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 12 + 20 * torch.rand(images, objects, 2, generator=generator)], dim=-1)
    valid = torch.ones(images, objects, dtype=torch.bool)
    sizes = torch.full((images, 2), 64)
    pixels = torch.randint(0, 256, (images, 3, 64, 64), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (images, objects), generator=generator)
    return Batch(pixels, sizes, Targets(boxes, labels, valid, ~valid), torch.arange(images), sizes)


def some_assignment(dtype: torch.dtype = torch.float32) -> tuple[Predictions, Tensor, Assignment]:
    """Two images, two levels, anchors of all three kinds; boxes play no part."""
    torch.manual_seed(2)
    counts = (40, 10)
    kind = torch.randint(0, 3, (2, sum(counts)))
    labels = torch.randint(0, CLASSES, kind.shape)
    predictions = Predictions(
        logits=tuple((3 * torch.randn(2, count, CLASSES)).to(dtype) for count in counts),
        deltas=tuple(torch.zeros(2, count, 4) for count in counts),
        anchors=tuple(torch.rand(count, 4) for count in counts),
    )
    quality = torch.where(kind == 0, torch.rand(kind.shape), 0)
    return predictions, labels, Assignment(torch.zeros_like(labels), kind == 0, kind == 1, quality)


SUMS = [
    *(Focal(), Focal(alpha=None, gamma=0.5), Focal(alpha=[0.1, 0.2, 0.5, 0.7, 0.9])),
    *(QualityFocal(), QualityFocal(gamma=0.5), Varifocal(alpha=0.4), OHEM(), GHM()),
]


@pytest.mark.parametrize("classification", SUMS, ids=str)
def test_sums_are_those_of_the_plain_formula(classification: ClassLoss) -> None:
    predictions, labels, assigned = some_assignment()
    told = summarize(diagnose(classification, predictions, labels, assigned, prior=PRIOR).tolist(), levels=LEVELS[:2])
    logits = torch.cat(predictions.logits, dim=1).flatten(0, 1)
    yes = (assigned.positive[..., None] & (labels[..., None] == torch.arange(CLASSES))).flatten(0, 1)
    counted = (assigned.positive | assigned.negative).flatten()[:, None].expand_as(yes)
    no = counted & ~yes
    quality = yes * assigned.target_scores.flatten()[:, None]
    match classification:
        case QualityFocal(gamma=gamma):
            formula = partial(quality_focal_loss, targets=quality, gamma=gamma)
        case Varifocal(alpha=alpha, gamma=gamma):
            formula = partial(varifocal_loss, targets=quality, alpha=alpha, gamma=gamma)
        case Focal(alpha=alpha, gamma=gamma):
            formula = partial(sigmoid_focal_loss, targets=yes.float(), alpha=alpha, gamma=gamma)
        case _:
            formula = partial(sigmoid_focal_loss, targets=yes.float(), alpha=None, gamma=0.0)
    loss, start = formula(logits), formula(torch.full_like(logits, math.log(PRIOR / (1 - PRIOR))))
    expected = {
        "p_t_positives": logits[yes].sigmoid().mean(),
        "p_t_negatives": 1 - logits[no].sigmoid().mean(),
        "loss_share_of_positives": loss[yes].sum() / loss[counted].sum(),
        "loss_over_prior": loss[counted].sum() / start[counted].sum(),
        "positives_p3": assigned.positive[:, :40].sum(),
        "positives_p4": assigned.positive[:, 40:].sum(),
    }
    assert told == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-5)


def test_labels_of_other_anchors_and_their_logits_do_not_matter() -> None:
    predictions, labels, assigned = some_assignment()
    sums = diagnose(Focal(), predictions, labels, assigned, prior=PRIOR)
    labels = torch.where(assigned.positive, labels, 10_000)
    ignored = ~(assigned.positive | assigned.negative)
    parts = zip(predictions.logits, ignored.split([40, 10], dim=1), strict=True)
    wild = tuple(logits.masked_fill(mask[..., None], 50.0) for logits, mask in parts)
    again = diagnose(Focal(), predictions._replace(logits=wild), labels, assigned, prior=PRIOR)
    torch.testing.assert_close(again, sums)


def test_batches_add_up() -> None:
    predictions, labels, assigned = some_assignment()
    whole = diagnose(Focal(), predictions, labels, assigned, prior=PRIOR)
    parts = []
    for image in (slice(0, 1), slice(1, 2)):
        logits = tuple(level[image] for level in predictions.logits)
        own = Assignment(*(part[image] for part in assigned))
        parts.append(diagnose(Focal(), predictions._replace(logits=logits), labels[image], own, prior=PRIOR))
    torch.testing.assert_close(sum(parts), whole)


def test_what_a_criterion_tells_adds_up_too() -> None:
    batch = some_batch(2)
    with torch.no_grad():
        outputs = tiny_model()(batch.images)
    probed, diagnosis = with_diagnosis(DetectionLoss(), prior=PRIOR)
    sums = []
    for _ in range(3):
        probed(outputs, batch.targets)
        assert diagnosis.sums is not None
        sums.append(diagnosis.sums)
    torch.testing.assert_close(sums[2], 3 * sums[0])


def test_a_look_ahead_is_not_added() -> None:
    probed, diagnosis = with_diagnosis(DetectionLoss(), prior=PRIOR)
    batch = some_batch(2)
    with torch.no_grad():
        probed(tiny_model()(batch.images), batch.targets)
    assert diagnosis.sums is None


def test_half_precision_is_summed_in_float32() -> None:
    single, half = (
        diagnose(Focal(), *some_assignment(dtype), prior=PRIOR) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("classification", [Focal(), QualityFocal()], ids=str)
def test_no_shape_depends_on_the_data_and_nothing_waits(classification: ClassLoss) -> None:
    predictions, labels, assigned = some_assignment()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # raises where a number would have to be known
        fake = predictions._replace(logits=tuple(mode.from_tensor(level) for level in predictions.logits))
        sums = diagnose(
            classification,
            fake,
            mode.from_tensor(labels),
            Assignment(*(mode.from_tensor(part) for part in assigned)),
            prior=PRIOR,
        )
        assert sums.shape == (9,)


LOSSES = [Focal(), Focal(gamma=0.0), QualityFocal(), Varifocal(), GHM(), OHEM(batch_size=16)]


@pytest.mark.parametrize("classification", LOSSES, ids=str)
def test_losses_and_gradients_are_the_same_to_the_last_bit(classification: ClassLoss) -> None:
    batch, plain = some_batch(), DetectionLoss(classification=classification)
    probed, diagnosis = with_diagnosis(plain, prior=PRIOR)
    with torch.no_grad():
        outputs = tiny_model()(batch.images)
    results = []
    for criterion in (plain, probed):
        leaves = [tuple(level.clone().requires_grad_() for level in part) for part in (outputs.logits, outputs.deltas)]
        losses = criterion(Predictions(*leaves, outputs.anchors), batch.targets)
        (losses.classification + losses.box).backward()
        results.append([*losses[:3], *(leaf.grad for part in leaves for leaf in part)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert diagnosis.sums is not None
    told = summarize(diagnosis.sums.tolist(), LEVELS)
    assert 0 < told["loss_share_of_positives"] < 1
    assert sum(told[f"positives_p{level}"] for level in LEVELS) == results[0][2]


def test_a_run_has_the_same_weights_with_it_and_without() -> None:
    weights, sums = [], None
    for looked_at in ((), (0, 1)):
        model = tiny_model()
        optimizer = build_optimizer(partial(torch.optim.SGD, lr=0.01, momentum=0.9), model)
        for step in range(2):
            criterion = DetectionLoss()
            if step in looked_at:
                criterion, diagnosis = with_diagnosis(criterion, prior=PRIOR)
            train_step(
                model,
                criterion,
                [some_batch(2), some_batch(1)],
                optimizer=optimizer,
                scaler=torch.amp.GradScaler("cpu", enabled=False),
                dtype=torch.float32,
                clip_norm=1.0,
            )
            sums = diagnosis.sums if step in looked_at else None
        weights.append(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(*(w.values() for w in weights), strict=True))
    assert sums is not None
    assert not sums.requires_grad


@pytest.mark.parametrize("objects", [0, 2])
def test_without_positives_less_is_told(objects: int) -> None:
    batch = some_batch(2, objects)
    targets = batch.targets._replace(valid=torch.zeros_like(batch.targets.valid))
    probed, diagnosis = with_diagnosis(DetectionLoss(), prior=PRIOR)
    probed(tiny_model()(batch.images), targets)
    assert diagnosis.sums is not None
    told = summarize(diagnosis.sums.tolist(), LEVELS)
    assert set(told) == {"p_t_negatives", "loss_over_prior", *(f"positives_p{level}" for level in LEVELS)}
    assert told["loss_over_prior"] == pytest.approx(1, abs=0.1)
    assert prior_is_lost(told, PRIOR) is None


def told_of(model: RetinaNet, prior: float, criterion: DetectionLoss | None = None) -> dict[str, float]:
    batch = some_batch()
    probed, diagnosis = with_diagnosis(criterion or DetectionLoss(), prior=prior)
    probed(model(batch.images), batch.targets)
    assert diagnosis.sums is not None
    return summarize(diagnosis.sums.tolist(), LEVELS)


@pytest.mark.parametrize("classification", LOSSES, ids=str)
@pytest.mark.parametrize("prior", [0.001, 0.01, 0.1])
def test_a_new_head_keeps_the_prior(prior: float, classification: ClassLoss) -> None:
    told = told_of(tiny_model(prior=prior, head_norm="group"), prior, DetectionLoss(classification=classification))
    assert told["loss_over_prior"] == pytest.approx(1, rel=0.2)
    assert told["p_t_positives"] == pytest.approx(prior, rel=0.2)
    assert told["p_t_negatives"] == pytest.approx(1 - prior, rel=0.01)
    assert prior_is_lost(told, prior) is None


@pytest.mark.parametrize("classification", LOSSES, ids=str)
@pytest.mark.parametrize("prior", [0.01, 0.1])
def test_a_head_initialised_anew_has_lost_it(prior: float, classification: ClassLoss) -> None:
    model = tiny_model(prior=prior)
    torch.nn.init.zeros_(model.head.classification.predict.bias)
    line = prior_is_lost(told_of(model, prior, DetectionLoss(classification=classification)), prior)
    assert line is not None
    assert "\n" not in line
    assert f"negatives score 0.5 instead of {prior:g}" in line


def test_outliers_among_the_logits_have_lost_it_too() -> None:
    model = tiny_model()
    telling = told_of(model, PRIOR)
    with torch.no_grad():
        model.head.classification.predict.weight.normal_(std=2.0)
    told = told_of(model, PRIOR)
    assert told["loss_over_prior"] > 10 * telling["loss_over_prior"]
    assert prior_is_lost(told, PRIOR) is not None


@pytest.mark.parametrize(
    ("ratio", "p_t", "lost"), [(1.0, 0.99, False), (9.0, 0.97, False), (11.0, 0.98, True), (2.0, 0.95, True)]
)
def test_either_the_loss_or_the_scores_tell(ratio: float, p_t: float, lost: bool) -> None:
    assert (prior_is_lost({"loss_over_prior": ratio, "p_t_negatives": p_t}, PRIOR) is not None) == lost


def test_numbers_that_are_none_are_left_to_others() -> None:
    told = summarize([math.nan] * 10, LEVELS)
    assert prior_is_lost(told, PRIOR) is None


def test_the_criterion_stays_what_it_is() -> None:
    criterion = DetectionLoss(box_weight=2.0)
    probed, diagnosis = with_diagnosis(criterion, prior=PRIOR)
    assert diagnosis.sums is None
    assert replace(probed, classification=criterion.classification) == criterion
