"""Runs a detector over a data set and scores it."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from retina import distributed
from retina.data.coco import Annotations
from retina.data.tiled import TiledAnnotations
from retina.detections import count_non_finite, postprocess, refuse_non_finite, to_original
from retina.errors import StoppedError
from retina.evaluation.metrics import COCO, DetectionArrays, Scoring, coco_metrics
from retina.evaluation.tiles import merge_tiles
from retina.types import Batch, Criterion, Detections, Postprocess, to_device


class Evaluation(NamedTuple):
    """Result over all ranks, the same on every rank except `detections`."""

    metrics: dict[str, Any]
    """See `coco_metrics`."""
    detections: DetectionArrays
    """On rank 0; those of the others have no rows."""
    losses: dict[str, float]
    """`loss`, `loss_classification`, `loss_box`, each over its divisor of the whole set; empty without a criterion."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    annotations: Annotations,
    *,
    postprocess: Postprocess = postprocess,
    device: torch.device | None = None,
    criterion: Criterion | None = None,
    dtype: torch.dtype = torch.float32,
    stopping: Callable[[], int] = lambda: 0,
    scoring: Scoring = COCO,
    tiles: Annotations | None = None,
) -> Evaluation:
    """Detections of this rank's images, gathered from all ranks and scored against `annotations`.

    model: any module that maps `Batch.images` and `Batch.sizes` to `Predictions`.
        It is left in the mode, training or evaluation, it came in.
    loader: any iterable of batches. An image that it leaves out counts as one without detections.
    postprocess: with other thresholds: `functools.partial(retina.postprocess, score_threshold=0.01)`.
    device: None takes that of the model's first parameter.
    criterion: None computes no losses.
    tiles: those of the loader, where it may show tiles (`TiledAnnotations`): what they show is put together.
    stopping: asked once per batch for the number of a signal to stop, 0 for none.

    Raises any error of the loader or the model on this rank (the other ranks then exit with code 2), DataError on rank
    0 if predicted numbers are not finite, and `StoppedError` on every rank, without a score, if `stopping` asks any to.
    """
    device = device or next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    collector = DetectionCollector()
    losses = torch.zeros(4, device=device)
    non_finite = torch.zeros((), dtype=torch.int64, device=device)
    stop, fault = 0, None
    was_training = model.training
    model.eval()
    try:
        for batch in loader:
            if stop := stopping():
                break
            on_device = to_device(batch, device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                predictions = model(on_device.images, on_device.sizes)
                if criterion is not None:
                    *sums, box_normalizer = criterion(predictions, on_device.targets)
                    losses += torch.stack([*sums, sums[2] if box_normalizer is None else box_normalizer])
            non_finite += count_non_finite(predictions)
            detections = postprocess(predictions, on_device.sizes)
            shapes = zip(detections, on_device.sizes, on_device.original_sizes, strict=True)
            collector.add(batch.indices, [to_original(*row) for row in shapes])
    except StoppedError as stopped:  # while the loader waited
        stop = stopped.signal
    except Exception as caught:  # raised below, after the other ranks know: they would wait for this one
        fault = caught
    model.train(was_training)
    verdict = distributed.agree(stop=stop, error=fault is not None)
    if fault is not None:
        raise fault
    if verdict.error:
        sys.exit(2)
    if verdict.stop:
        raise StoppedError(verdict.stop)
    count = int(distributed.all_reduce_sum(non_finite))
    gathered = collector.gather()
    if isinstance(tiles, TiledAnnotations):
        gathered = merge_tiles(gathered, tiles, **getattr(postprocess, "keywords", {}))

    def score() -> dict[str, Any]:
        refuse_non_finite(count, annotations.file)
        return coco_metrics(annotations, gathered, scoring)

    metrics = distributed.on_main(score)
    per_positive = {} if criterion is None else _per_positive(distributed.all_reduce_sum(losses))
    return Evaluation(metrics, gathered, per_positive)


def _per_positive(sums: Tensor) -> dict[str, float]:
    classification, box, positives, box_normalizer = sums.tolist()
    classification, box = classification / max(positives, 1), box / max(box_normalizer, 1)
    return {"loss": classification + box, "loss_classification": classification, "loss_box": box}


_DTYPES = (torch.int64, torch.int64, torch.float64, torch.float64, torch.int64)


class DetectionCollector:
    """Keeps the detections of this rank's images on the CPU until `gather` puts those of all ranks together."""

    def __init__(self) -> None:
        shapes = ((0,), (0,), (0, 4), (0,), (0,))
        self._batches = [[torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, _DTYPES, strict=True)]]
        """Of each batch the image indices, the counts of detections, and their boxes, scores and labels."""

    def add(self, indices: Int64[Tensor, "B"], detections: Sequence[Detections]) -> None:
        """Add a batch: record indices of its images, and their detections in pixels of the original images.

        An image without detections is added like any other. Copies to the CPU once per batch, not once per image.
        """
        if len(indices) != len(detections):
            raise ValueError(f"{len(indices)} indices for the detections of {len(detections)} images")
        if detections:
            counts = torch.tensor([len(image.scores) for image in detections])
            fields = (indices, counts, *(torch.cat(images) for images in zip(*detections, strict=True)))
            self._batches.append([field.cpu().to(dtype) for field, dtype in zip(fields, _DTYPES, strict=True)])

    def gather(self) -> DetectionArrays:
        """Detections of all ranks on rank 0, sorted by image and then in the order they were added; none on the others.

        An image added more than once (a sampler repeats some so that ranks have equally many) counts once: the first
        time on the lowest rank.
        """
        ranks = distributed.gather_arrays([torch.cat(batches).numpy() for batches in zip(*self._batches, strict=True)])
        ranks = ranks or [[batches[0].numpy() for batches in zip(*self._batches, strict=True)]]  # the first has no rows
        images, counts, boxes, scores, labels = (np.concatenate(arrays) for arrays in zip(*ranks, strict=True))
        unique, first = np.unique(images, return_index=True)
        lengths = counts[first]
        begins = np.repeat((np.cumsum(counts) - counts)[first] - (np.cumsum(lengths) - lengths), lengths)
        rows = np.arange(len(begins)) + begins
        return DetectionArrays(np.repeat(unique, lengths), boxes[rows], scores[rows], labels[rows])
