"""From raw predictions to detections: threshold, best candidates per level, decode, clip, NMS."""

import math
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import nms

from retina.errors import DataError
from retina.ops.anchors import on_covered_cells
from retina.ops.boxes import clip_boxes, decode
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

    A candidate is an (anchor, class) pair with score sigmoid(logit) > `score_threshold`, whose anchor stands on a cell
    that the image covers (`on_covered_cells`). The best
    `candidates_per_level` of each level are decoded and clipped to the image's content `sizes` (height, width), not to
    the padded canvas. With `predictions.quality`, scores are then multiplied by sigmoid(quality) of their anchor, and
    may fall below the threshold. Of the candidates of one class that overlap by more than `nms_iou`, the best stays;
    then the best `max_detections` of the image.

    Ties of score go to the finer level, then the higher score before quality, then the lower anchor, then the lower
    class. Boxes that are NaN, and anchors with a NaN logit or quality, never survive; `count_non_finite` tells of them.
    float32 inside; boxes and scores are float32.

    Args:
        class_agnostic: suppress overlapping candidates whatever their class.

    Raises ValueError for settings out of range.
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4 "Inference"; for quality, Zhang et
    al., ATSS, CVPR 2020, as mmdetection applies it.
    """
    if not 0 <= score_threshold < 1:
        raise ValueError(f"score_threshold must be in [0, 1), got {score_threshold}")
    if not 0 <= nms_iou <= 1:
        raise ValueError(f"nms_iou must be in [0, 1], got {nms_iou}")
    for limit in (candidates_per_level, max_detections):  # NaN would repeat the search for survivors for ever
        if not isinstance(limit, int) or not 1 <= limit < 2**31:
            limits = f"{candidates_per_level} and {max_detections}"
            raise ValueError(f"candidates and detections must be integers from 1 to 2^31 - 1, got {limits}")

    sizes = sizes.to(predictions.logits[0].device)
    boxes, scores, labels, image = _candidates(predictions, sizes, score_threshold, candidates_per_level)
    boxes = clip_boxes(boxes, sizes[image])
    sound = (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)  # False for NaN
    if predictions.quality is not None:
        sound &= scores >= 0
    keep = sound.nonzero().squeeze(1)
    keep = keep[_best_first(scores[keep], image[keep])]
    boxes, scores, labels, image = boxes[keep], scores[keep], labels[keep], image[keep]
    groups = image if class_agnostic else image * predictions.logits[0].shape[-1] + labels
    survivors = _best_after_nms(boxes, scores, groups, image, len(sizes), nms_iou, max_detections)
    return [Detections(boxes[index], scores[index], labels[index]) for index in survivors]


def count_non_finite(predictions: Predictions) -> Int64[Tensor, ""]:
    """How many anchors, over all images, have a logit, delta or quality that is NaN or infinite. Stays on the device.

    A distribution that is not finite shows in the deltas of its mean."""
    logits, deltas, quality = predictions.logits, predictions.deltas, predictions.quality or ()
    if logits[0].device.type == "cpu" and all(bool(x.sum().isfinite()) for x in (*logits, *deltas, *quality)):
        return torch.zeros((), dtype=torch.int64)  # a sum is finite only if all its terms are; and it is the cheaper
    # Finite float32 numbers add up to a finite float64 sum.
    wide = torch.float32 if logits[0].device.type == "mps" else torch.float64
    sums = [x.sum(dim=-1, dtype=wide) + y.sum(dim=-1, dtype=wide) for x, y in zip(logits, deltas, strict=True)]
    sums = [level + fit for level, fit in zip(sums, quality, strict=True)] if quality else sums
    return torch.stack([(~level.isfinite()).sum() for level in sums]).sum()


def refuse_non_finite(count: int, where: object) -> None:
    """Raises DataError if `count` is not 0, because the detections of the other anchors cannot be trusted either."""
    if count:
        raise DataError(
            f"{where}: {count} predicted boxes have a score or side that is not a finite number - the model has "
            "diverged (take an earlier checkpoint or a lower learning rate) or needs precision=fp32",
            code="not-finite",
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


def _candidates(
    predictions: Predictions, sizes: Int64[Tensor, "B 2"], threshold: float, limit: int
) -> tuple[Float[Tensor, "N 4"], Float[Tensor, "N"], Int64[Tensor, "N"], Int64[Tensor, "N"]]:
    """Decoded boxes, scores, labels and image of the best pairs of every level, by level, image and then best first
    (before quality).

    Shapes that depend on the data make a GPU wait: there are two here, whatever the number of images and levels."""
    num_images, num_classes = len(predictions.logits[0]), predictions.logits[0].shape[-1]
    inside = [on_covered_cells(anchors, sizes) for anchors in predictions.anchors]
    lowest = [_lowest_logit(*level, threshold, limit) for level in zip(predictions.logits, inside, strict=True)]
    candidates = torch.cat([(best >= low).flatten() for best, low in lowest]).nonzero().squeeze(1)
    ends = torch.tensor([0, *(best.numel() for best, _ in lowest)]).cumsum(0)
    bounds = torch.searchsorted(candidates, ends.to(candidates.device)).tolist()
    rows, deltas, anchors, groups, fits = [], [], [], [], []
    for level, (first, last) in enumerate(pairwise(bounds)):
        row = candidates[first:last] - ends[level]
        num_anchors = len(predictions.anchors[level])
        rows.append(predictions.logits[level].reshape(-1, num_classes)[row].float())
        deltas.append(predictions.deltas[level].reshape(-1, 4)[row].float())
        anchors.append(predictions.anchors[level][row % num_anchors])
        groups.append(row // num_anchors + level * num_images)
        if predictions.quality is not None:
            fits.append(predictions.quality[level].flatten()[row].float())
    logits, group = torch.cat(rows), torch.cat(groups)
    low = torch.cat([low.flatten() for _, low in lowest])
    pair, label = ((logits >= low[group, None]) & (logits.sigmoid() > threshold)).nonzero(as_tuple=True)
    scores, group = logits[pair, label].sigmoid(), group[pair]
    best = _best_first(scores, group, limit)
    pair, group = pair[best], group[best]
    scores = scores[best] * torch.cat(fits)[pair].sigmoid() if fits else scores[best]
    boxes = decode(torch.cat(deltas)[pair], torch.cat(anchors)[pair])
    return boxes, scores, label[best], group % num_images


def _lowest_logit(
    logits: Float[Tensor, "B A_l K"], inside: Bool[Tensor, "B A_l"], threshold: float, limit: int
) -> tuple[Float[Tensor, "B A_l"], Float[Tensor, "B 1"]]:
    """The highest logit of every anchor, found with one pass over the logits and no sigmoid, and for each image the
    one below which nothing can be a candidate. Anchors that are not `inside` have -inf."""
    # float32 before comparing: bfloat16 would round the threshold
    best = logits.amax(dim=-1).float().masked_fill(~inside, -math.inf)
    # A hair below the threshold, since log and sigmoid round; the scores decide.
    lowest = math.log(threshold / (1 - threshold)) - 1e-3 if threshold > 0 else torch.finfo(best.dtype).min
    low = best.new_full((len(best), 1), lowest)
    if best.shape[1] > limit:
        # The best `limit` pairs lie within the `limit` anchors of highest logit: lower ones need not be looked at.
        low = torch.maximum(low, best.nan_to_num(nan=-math.inf).topk(limit).values[:, -1:])
    return best, low


def _best_after_nms(
    boxes: Float[Tensor, "N 4"],
    scores: Float[Tensor, "N"],
    groups: Int64[Tensor, "N"],
    image: Int64[Tensor, "N"],
    num_images: int,
    iou: float,
    limit: int,
) -> list[Int64[Tensor, "_"]]:
    """Indices of the best `limit` survivors of each image, best first, from candidates by image and best first.

    Only a better candidate can suppress one, so the best few of each image are looked at first, and more of an image
    only if too few of its own survive."""
    images = torch.arange(num_images + 1, device=image.device)
    available = torch.searchsorted(image, images).diff().tolist()
    rank, num_compared = _rank(image), 4 * limit
    survivors: dict[int, Tensor] = {}
    waiting = torch.ones_like(images, dtype=torch.bool)
    while len(survivors) < num_images:
        first = (waiting[image] & (rank < num_compared)).nonzero().squeeze(1)
        # A GPU would rather do all at once; a CPU compares each with every later one, also those of other images.
        sizes = [0 if number in survivors else min(n, num_compared) for number, n in enumerate(available)]
        parts = (first,) if first.is_cuda else first.split(sizes)
        best = torch.cat([part[grouped_nms(boxes[part], scores[part], groups[part], iou)] for part in parts])
        best = best.sort().values
        for number, part in enumerate(best.split(torch.searchsorted(image[best], images).diff().tolist())):
            if number not in survivors and (len(part) >= limit or available[number] <= num_compared):
                survivors[number] = part[:limit]
                waiting[number] = False
        num_compared *= 4
    return [survivors[number] for number in range(num_images)]


def _best_first(scores: Float[Tensor, "N"], group: Int64[Tensor, "N"], limit: int | None = None) -> Int64[Tensor, "_"]:
    """Indices by group and then descending score, ties by position; at most `limit` of each group."""
    bits = scores.view(torch.int32)  # ordered as the scores are, for none is negative
    order = (group * 2**31 - bits).argsort(stable=True)
    return order if limit is None else order[_rank(group[order]) < limit]


def _rank(group: Int64[Tensor, "N"]) -> Int64[Tensor, "N"]:
    """Position within the group, for groups that rise."""
    return torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)
