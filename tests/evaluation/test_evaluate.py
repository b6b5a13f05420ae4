"""Evaluation of models that are known to be right, or known to fail, so that the answer is known too."""

import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranks import in_processes
from retina.cli.data import DataConfig
from retina.cli.loaders import build_eval_loader
from retina.data.coco import Annotations, read_coco
from retina.data.loader import Canvas
from retina.data.shapes import write_shapes
from retina.detections import postprocess
from retina.errors import DataError, StoppedError
from retina.evaluation.evaluate import Evaluation, evaluate
from retina.losses.detection import DetectionLoss
from retina.types import Batch, Losses, Predictions, Targets


class Oracle(nn.Module):
    """Predicts the objects of every image it is shown: anchors are the objects, deltas nothing.

    It cannot see, so its loader tells it which images come. They are of twice the size of their files."""

    def __init__(self, annotations: Annotations) -> None:
        super().__init__()
        self.annotations = annotations
        self.next: list[int] = []

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        rows = [slice(*self.annotations.offsets[i : i + 2]) for i in self.next]
        boxes = [torch.from_numpy(self.annotations.boxes[row]).float() * 2 for row in rows]
        labels = [torch.from_numpy(self.annotations.labels[row]) for row in rows]
        num_anchors = sum(map(len, boxes))
        logits = torch.full((len(images), num_anchors, len(self.annotations.classes)), -20.0)
        first = 0
        for image, own in enumerate(labels):
            logits[image, torch.arange(first, first + len(own)), own] = 10.0
            first += len(own)
        return Predictions((logits,), (torch.zeros(len(images), num_anchors, 4),), (torch.cat(boxes),))


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Annotations:
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, num_train=1, num_val=7, image_size=(64, 96))
    return read_coco(root / "annotations" / "instances_val.json", root / "val")


def loader(annotations: Annotations, batch_size: int = 2, **options: Any) -> Any:
    data = DataConfig(name="shapes", short_side=128, long_side=192, num_workers=0, **options)
    return build_eval_loader(annotations, data, Canvas(32, (0, 0, 0)), batch_size=batch_size)


def run(annotations: Annotations, batches: Iterable[Batch], model: Oracle | None = None, **options: Any) -> Any:
    oracle = model or Oracle(annotations)

    def shown() -> Iterator[Batch]:
        for batch in batches:
            oracle.next = batch.indices.tolist()
            yield batch

    return evaluate(oracle, shown(), annotations, **options)


def test_a_perfect_model_scores_one(annotations: Annotations) -> None:
    result = run(annotations, loader(annotations))
    assert result.metrics["AP"] == pytest.approx(1.0)
    assert result.losses == {}
    assert len(result.detections.scores) == annotations.num_objects
    boxes = result.detections.boxes[np.lexsort(result.detections.boxes.T)]
    np.testing.assert_allclose(boxes, annotations.boxes[np.lexsort(annotations.boxes.T)], atol=0.01)


def test_a_perfect_model_has_no_box_loss(annotations: Annotations) -> None:
    """Image by image: anchors are shared by a batch, and those of another image's objects may come near one's own."""
    losses = run(annotations, loader(annotations, 1), criterion=DetectionLoss()).losses
    assert losses["loss_box"] == pytest.approx(0, abs=1e-6)
    assert losses["loss"] == losses["loss_classification"] + losses["loss_box"]


def test_losses_are_per_positive_of_the_whole_set(annotations: Annotations) -> None:
    told: list[Losses] = []

    def criterion(predictions: Predictions, targets: Targets) -> Losses:
        told.append(DetectionLoss()(predictions, targets))
        return told[-1]

    losses = run(annotations, loader(annotations), criterion=criterion).losses
    classification, box, positives = (float(sum(values)) for values in list(zip(*told, strict=True))[:3])
    assert len(told) == 4
    assert len({float(one.num_positives) for one in told}) > 1  # a mean of means would be another number
    assert losses["loss_box"] == pytest.approx(box / positives, rel=1e-6)
    assert losses["loss_classification"] == pytest.approx(classification / positives, rel=1e-6)
    assert losses["loss"] == losses["loss_classification"] + losses["loss_box"]


def test_a_box_loss_may_have_a_divisor_of_its_own(annotations: Annotations) -> None:
    def criterion(predictions: Predictions, targets: Targets) -> Losses:
        return Losses(*map(torch.tensor, (1.5, 0.25, 3.0, 0.5)))

    losses = run(annotations, loader(annotations), criterion=criterion).losses
    assert losses == {"loss": 1.0, "loss_classification": 0.5, "loss_box": 0.5}


def test_without_positives_the_divisor_is_one(annotations: Annotations) -> None:
    def criterion(predictions: Predictions, targets: Targets) -> Losses:
        return Losses(torch.tensor(1.5), torch.tensor(0.25), torch.tensor(0.0))

    losses = run(annotations, loader(annotations), criterion=criterion).losses
    assert losses == {"loss": 7.0, "loss_classification": 6.0, "loss_box": 1.0}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_keeps_its_mode(annotations: Annotations, fails: bool) -> None:
    def batches() -> Iterator[Batch]:
        if fails:
            raise DataError("broken")
        yield from ()

    for training in (True, False):
        model = nn.BatchNorm1d(1).train(training)
        try:
            evaluate(model, batches(), annotations, postprocess=postprocess, device=torch.device("cpu"))
        except DataError:
            assert fails
        assert model.training is training


def test_nothing_found_is_zero(annotations: Annotations) -> None:
    class Blind(Oracle):
        def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
            predictions = super().forward(images, sizes)
            return predictions._replace(logits=(predictions.logits[0] - 40,))

    for batches in ([], loader(annotations)):
        result = run(annotations, batches, Blind(annotations))
        assert result.metrics["AP"] == 0.0
        assert result.detections.boxes.shape == (0, 4)


def test_images_left_out_by_the_loader_are_missed(annotations: Annotations) -> None:
    whole = [batch for batch in loader(annotations, 1) if int(batch.indices) != 3]
    metrics = run(annotations, whole).metrics
    missed = annotations.offsets[4] - annotations.offsets[3]
    assert missed > 0
    assert metrics["AR100"] < 1
    objects = sum(values["num_objects"] for values in metrics["per_class"].values())
    assert objects == annotations.num_objects


def test_numbers_that_are_not_finite_are_refused(annotations: Annotations) -> None:
    class Diverged(Oracle):
        def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
            predictions = super().forward(images, sizes)
            predictions.logits[0][0, 0, 0] = float("nan")
            predictions.deltas[0][-1, -1, 0] = float("inf")
            return predictions

    with pytest.raises(
        DataError, match=r"instances_val\.json: 8 predicted boxes have .* not a finite number"
    ) as caught:
        run(annotations, loader(annotations), Diverged(annotations))  # two in each of four batches
    assert "\n" not in str(caught.value)


def test_told_to_stop_it_stops(annotations: Annotations) -> None:
    asked: list[int] = []

    def stopping() -> int:
        asked.append(len(asked))
        return signal.SIGTERM if len(asked) == 3 else 0

    with pytest.raises(StoppedError):
        run(annotations, loader(annotations), stopping=stopping)
    assert asked == [0, 1, 2]
    assert isinstance(run(annotations, loader(annotations), stopping=lambda: 0), Evaluation)


def test_two_processes_know_what_one_would(annotations: Annotations, tmp_path: Path) -> None:
    def task(rank: int) -> None:
        result = run(annotations, loader(annotations), criterion=DetectionLoss())
        torch.save([result.metrics, result.detections.scores.tolist()], tmp_path / f"{rank}.pt")

    assert in_processes(task, tmp_path) == [0, 0]
    expected = run(annotations, loader(annotations))
    for rank in range(2):
        metrics, scores = torch.load(tmp_path / f"{rank}.pt")
        assert metrics == expected.metrics
        assert len(scores) == (0 if rank else annotations.num_objects)


def test_both_stop_when_one_is_told_to(annotations: Annotations, tmp_path: Path) -> None:
    def task(rank: int) -> None:
        with pytest.raises(StoppedError):
            run(annotations, loader(annotations, 1), stopping=lambda: signal.SIGTERM * rank)

    assert in_processes(task, tmp_path) == [0, 0]


def told(folder: Path, rank: int, *arguments: Any) -> None:
    """Evaluates; a DataError is written down, and makes 3 the exit code."""
    try:
        run(*arguments)
    except DataError as fault:
        (folder / f"{rank}.txt").write_text(str(fault))
        raise SystemExit(3) from None


def test_both_end_when_the_loader_of_one_fails(annotations: Annotations, tmp_path: Path) -> None:
    def task(rank: int) -> None:
        def batches() -> Iterator[Batch]:
            yield from loader(annotations, 1)
            if rank == 1:
                raise DataError("photo.jpg: gone")

        told(tmp_path, rank, annotations, batches())

    assert in_processes(task, tmp_path) == [2, 3]
    assert [file.name for file in tmp_path.glob("*.txt")] == ["1.txt"]
    assert (tmp_path / "1.txt").read_text() == "photo.jpg: gone"


def test_both_end_when_numbers_of_one_are_not_finite(annotations: Annotations, tmp_path: Path) -> None:
    class Diverged(Oracle):
        def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
            predictions = super().forward(images, sizes)
            predictions.logits[0][:, :1, 0] = float("nan") if dist.get_rank() == 1 else 0.0
            return predictions

    def task(rank: int) -> None:
        told(tmp_path, rank, annotations, loader(annotations, 7), Diverged(annotations))

    assert in_processes(task, tmp_path) == [3, 2]
    assert ": 3 predicted boxes" in (tmp_path / "0.txt").read_text()  # one for each image of rank 1
