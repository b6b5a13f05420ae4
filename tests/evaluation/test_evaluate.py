"""Evaluation of a model that is known to be right, so that the answer is known too."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retina.data.coco import Annotations, read_coco
from retina.data.shapes import write_shapes
from retina.engine.data import build_eval_loader
from retina.evaluation.evaluate import evaluate
from retina.losses import DetectionLoss
from retina.postprocess import postprocess
from retina.types import Predictions, Targets


class Oracle(nn.Module):
    """Predicts the objects of every image it is shown: anchors are the objects, deltas nothing."""

    def __init__(self, annotations: Annotations, score: float) -> None:
        super().__init__()
        self.annotations, self.score = annotations, score
        self.seen: list[int] = []
        self.next: list[int] = []

    def forward(self, images: Tensor) -> Predictions:
        rows = [self.annotations.offsets[i : i + 2] for i in self.next]
        boxes = [torch.from_numpy(self.annotations.boxes[begin:end]).float() for begin, end in rows]
        labels = [torch.from_numpy(self.annotations.labels[begin:end]) for begin, end in rows]
        num_anchors = sum(len(b) for b in boxes)
        logits = torch.full((len(images), num_anchors, len(self.annotations.classes)), -20.0)
        first = 0
        for image, own in enumerate(labels):
            logits[image, torch.arange(first, first + len(own)), own] = self.score
            first += len(own)
        return Predictions((logits,), (torch.zeros(len(images), num_anchors, 4),), (torch.cat(boxes),))


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Annotations:
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, num_train=1, num_val=7, image_size=(64, 96))
    return read_coco(root / "annotations" / "instances_val.json", root / "val")


def run(annotations: Annotations, **options: object) -> object:
    # twice the size of the files, so that boxes must be mapped back
    loader = build_eval_loader(
        annotations,
        short_side=128,
        long_side=192,
        batch_size=2,
        num_workers=0,
        divisor=32,
        pad_value=(0, 0, 0),
        pin_memory=False,
    )
    oracle = Oracle(annotations, score=10.0)

    def shown():  # tells the oracle which images come, in the resized coordinates
        for batch in loader:
            oracle.next = batch.indices.tolist()
            oracle.seen += oracle.next
            yield batch

    class Scaled(nn.Module):
        def forward(self, images: Tensor) -> Predictions:
            logits, deltas, anchors = oracle(images)
            return Predictions(logits, deltas, tuple(a * 2 for a in anchors))

    result = evaluate(
        Scaled().train(), shown(), annotations, postprocess=postprocess, device=torch.device("cpu"), **options
    )
    assert sorted(oracle.seen) == list(range(7))
    return result


def test_a_perfect_model_scores_one(annotations: Annotations) -> None:
    result = run(annotations)
    assert result.metrics["AP"] == pytest.approx(1.0)
    assert result.losses == {}
    assert len(result.detections.scores) == annotations.num_objects
    boxes = result.detections.boxes[np.lexsort(result.detections.boxes.T)]
    np.testing.assert_allclose(boxes, annotations.boxes[np.lexsort(annotations.boxes.T)], atol=0.01)


def test_losses_are_per_positive(annotations: Annotations) -> None:
    def criterion(predictions: Predictions, targets: Targets) -> object:
        losses = DetectionLoss()(predictions, targets)
        return losses._replace(
            classification=2 * targets.valid.sum().float(), num_positives=targets.valid.sum().float()
        )

    losses = run(annotations, criterion=criterion).losses
    assert losses["loss_classification"] == pytest.approx(2.0)
    assert (
        losses["loss_box"] < 0.1
    )  # anchors on the objects themselves, and a few on those of their batch's other images
    assert losses["loss"] == losses["loss_classification"] + losses["loss_box"]


def test_the_model_keeps_its_mode(annotations: Annotations) -> None:
    model = nn.BatchNorm1d(1).train()
    evaluate(model, [], annotations, postprocess=postprocess, device=torch.device("cpu"))
    assert model.training
