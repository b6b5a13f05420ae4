"""Runs a detector over a data set and scores it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retina.data.coco import Annotations
from retina.distributed import all_reduce_sum
from retina.evaluation.collect import DetectionCollector
from retina.evaluation.metrics import DetectionArrays, coco_metrics
from retina.postprocess import to_original
from retina.types import Batch, Detections, Losses, Predictions, Targets, to_device

Postprocess = Callable[[Predictions, Tensor], list[Detections]]
Criterion = Callable[[Predictions, Targets], Losses]


class Evaluation(NamedTuple):
    """Result over all ranks, the same on every rank."""

    metrics: dict[str, Any]
    """See `coco_metrics`."""
    detections: DetectionArrays
    losses: dict[str, float]
    """`loss`, `loss_classification`, `loss_box`, per positive anchor; empty without a criterion."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    annotations: Annotations,
    *,
    postprocess: Postprocess,
    device: torch.device,
    criterion: Criterion | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Detections of this rank's share of images, gathered from all ranks and scored against `annotations`.

    The model is left in the mode it came in."""
    was_training = model.training
    model.eval()
    collector = DetectionCollector()
    sums = torch.zeros(3, device=device)
    for batch in loader:
        on_device = to_device(batch, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predictions = model(on_device.images)
            if criterion is not None:
                sums += torch.stack(criterion(predictions, on_device.targets))
        found = postprocess(predictions, on_device.sizes)
        shapes = zip(found, batch.sizes, batch.original_sizes, strict=True)
        collector.add(batch.indices, [to_original(one, size, original) for one, size, original in shapes])
    model.train(was_training)
    detections = collector.gather()
    losses = {}
    if criterion is not None:
        classification, box, positives = all_reduce_sum(sums).tolist()
        classification, box = classification / max(positives, 1), box / max(positives, 1)
        losses = {"loss": classification + box, "loss_classification": classification, "loss_box": box}
    return Evaluation(coco_metrics(annotations, detections), detections, losses)
