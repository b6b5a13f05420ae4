"""From raw predictions to detections: threshold, best candidates per level, decode, clip, NMS."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import nms

from retina.errors import DataError
from retina.ops.boxes import clip_boxes
from retina.ops.coding import decode
from retina.types import Detections, Predictions


@torch.no_grad()
def postprocess(
    predictions: Predictions,
    sizes: Int64[Tensor, "B 2"],
    *,
    score_threshold: float = 0.05,
    candidates_per_level: int = 1000,
    nms_iou: float = 0.5,
    max_detections: int = 100,
    class_agnostic: bool = False,
) -> list[Detections]:
    """Detections of every image, best score first, in pixels of the images the model saw.

    A candidate is an (anchor, class) pair with score sigmoid(logit) > `score_threshold`. The best
    `candidates_per_level` of each level are decoded and clipped to the image's content `sizes` (height, width), not to
    the padded canvas. Of the candidates of one class that overlap by more than `nms_iou`, the best stays; then the best
    `max_detections` of the image.

    Ties of score go to the finer level, then the lower anchor, then the lower class. Boxes that are NaN, and
    anchors with a NaN logit, never survive; `count_non_finite` tells of them. float32 inside; boxes and scores are
    float32.

    Args:
        class_agnostic: suppress overlapping candidates whatever their class.

    Raises ValueError for settings out of range.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4 "Inference".
    """
    if not 0 <= score_threshold < 1:
        raise ValueError(f"score_threshold must be in [0, 1), got {score_threshold}")
    if not 0 <= nms_iou <= 1:
        raise ValueError(f"nms_iou must be in [0, 1], got {nms_iou}")
    if candidates_per_level < 1 or max_detections < 1:
        raise ValueError(f"need at least 1 candidate and detection, got {candidates_per_level} and {max_detections}")

    num_images = len(sizes)
    levels = [
        _level_candidates(*level, score_threshold, candidates_per_level) for level in zip(*predictions, strict=True)
    ]
    boxes, scores, labels, image = (torch.cat(parts) for parts in zip(*levels, strict=True))
    boxes = clip_boxes(boxes, sizes.to(boxes.device)[image])
    keep = (boxes[:, 2:] >= boxes[:, :2]).all(dim=1).nonzero().squeeze(1)  # False for NaN
    keep = keep[_best_first(scores[keep], image[keep])]
    counts = image[keep].bincount(minlength=num_images).tolist()

    detections = []
    for one in keep.split(counts):
        groups = torch.zeros_like(one) if class_agnostic else labels[one]
        one = one[grouped_nms(boxes[one], scores[one], groups, nms_iou)[:max_detections]]
        detections.append(Detections(boxes[one], scores[one], labels[one]))
    return detections


def count_non_finite(predictions: Predictions) -> Int64[Tensor, ""]:
    """How many anchors, over all images, have a logit or delta that is NaN or infinite. Stays on the device."""
    finite = [
        logits.isfinite().all(dim=-1) & deltas.isfinite().all(dim=-1)
        for logits, deltas in zip(predictions.logits, predictions.deltas, strict=True)
    ]
    return torch.stack([(~one).sum() for one in finite]).sum()


def refuse_non_finite(count: int, where: object) -> None:
    """Raises DataError if there are any, for what `postprocess` makes of the others is no result to be trusted."""
    if count:
        raise DataError(
            f"{where}: {count} predicted boxes have a score or side that is not a finite number - the model has "
            "diverged (take an earlier checkpoint or a lower learning rate) or needs precision=fp32"
        )


def to_original(detections: Detections, size: Int64[Tensor, "2"], original_size: Int64[Tensor, "2"]) -> Detections:
    """Detections of a resized image in the pixels of its file: each axis scaled on its own, then clipped.

    Args:
        size: (height, width) of the content the model saw, a row of `Batch.sizes`.
        original_size: (height, width) of the file, a row of `Batch.original_sizes`.
    """
    boxes = detections.boxes
    scale = (original_size.to(boxes) / size.to(boxes)).flip(0).repeat(2)
    return detections._replace(boxes=clip_boxes(boxes * scale, original_size))


def grouped_nms(
    boxes: Float[Tensor, "N 4"], scores: Float[Tensor, "N"], groups: Int64[Tensor, "N"], iou: float
) -> Int64[Tensor, "D"]:
    """Indices that survive non-maximum suppression within each group, best score first, ties by position.

    Equal to `torchvision.ops.batched_nms`, without its loop over groups. Each group is moved to a place of its own, so
    that one plain NMS does; in float64, because at the far places float32 would round the overlaps.
    """
    if len(boxes) == 0:
        return groups
    if boxes.device.type == "mps":  # knows no float64
        return grouped_nms(boxes.cpu(), scores.cpu(), groups.cpu(), iou).to(boxes.device)
    boxes = boxes.double()
    place = groups * (boxes.max() - boxes.min() + 1)
    return nms(boxes + place[:, None], scores.double(), iou)


def _level_candidates(
    logits: Float[Tensor, "B A_l K"],
    deltas: Float[Tensor, "B A_l 4"],
    anchors: Float[Tensor, "A_l 4"],
    threshold: float,
    limit: int,
) -> tuple[Float[Tensor, "N 4"], Float[Tensor, "N"], Int64[Tensor, "N"], Int64[Tensor, "N"]]:
    """Decoded boxes, scores, labels and image of the best pairs of one level, by image and then best first."""
    image, anchor = _promising_anchors(logits, threshold, limit).nonzero(as_tuple=True)
    scores = logits[image, anchor].float().sigmoid()
    pair, label = (scores > threshold).nonzero(as_tuple=True)
    image, anchor, scores = image[pair], anchor[pair], scores[pair, label]
    best = _best_first(scores, image, limit)
    image, anchor = image[best], anchor[best]
    return decode(deltas[image, anchor].float(), anchors[anchor]), scores[best], label[best], image


def _promising_anchors(logits: Float[Tensor, "B A_l K"], threshold: float, limit: int) -> Bool[Tensor, "B A_l"]:
    """The few anchors that can hold a candidate, found with one pass over the logits and no sigmoid."""
    best = logits.amax(dim=-1).float()  # float32 before comparing: bfloat16 would round the threshold
    # A hair below the threshold, since log and sigmoid round; the scores decide.
    lowest = math.log(threshold / (1 - threshold)) - 1e-3 if threshold > 0 else -math.inf
    promising = best > lowest
    if best.shape[1] > limit:
        # The best `limit` pairs lie within the `limit` anchors of highest logit: lower ones need not be looked at.
        promising &= best >= best.nan_to_num(nan=-math.inf).topk(limit).values[:, -1:]
    return promising


def _best_first(scores: Float[Tensor, "N"], image: Int64[Tensor, "N"], limit: int | None = None) -> Int64[Tensor, "_"]:
    """Indices by image and then descending score, ties by position; at most `limit` of each image."""
    order = scores.argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    if limit is None:
        return order
    image = image[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(image, image)
    return order[rank < limit]
