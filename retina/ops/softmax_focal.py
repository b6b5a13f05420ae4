"""The softmax focal loss: one of C classes, for classifiers and for dense tasks (pixels, voxels)."""

import torch
from torch import Tensor

from retina.ops.focal import check_focal, clear_of_zero
from retina.ops.loss_common import (
    along_classes,
    at_least_float32,
    class_axis,
    class_indices,
    element_targets,
    per_class,
    reduce_loss,
)


def softmax_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "none",
) -> Tensor:
    """w_y (1 - p_y)^gamma (-log p_y), with p the softmax over the classes and y the true class; one value per position.

    Args:
        logits: (N, C), dense (N, C, d1, d2, ...), or (C) alone. Log-probabilities are logits too.
        targets: class indices (N, d1, ...) or (N, 1, d1, ...); or labels (N, C, d1, ...) of the logits' shape: one-hot,
            soft, or multi-hot. Several labels of a position count as their mean: the sum over classes of
            t_c w_c (1 - p_c)^gamma (-log p_c) with t scaled to the sum 1. A position without any counts for nothing.
        weight: of each class, >= 0.
        gamma: focusing exponent >= 0; 0 is the weighted cross entropy (with indices and no reduction, to the last bit).
        ignore_index: a position whose target has this value counts for nothing.
        reduction: "none", "sum", or "mean", which as in `F.cross_entropy` with class indices divides by the sum of the
            weights w_y of the positions that count, not by their number; 0 if none counts. Labels are divided by the
            same, so that one-hot and index are one loss. (`F.cross_entropy` divides those by the number of positions.)

    float32 inside for narrower dtypes. Value and gradient are finite for logits of any size and any gamma >= 0. Indices
    build no one-hot tensor.

    Raises ValueError for shapes that do not fit, values out of range, and a weight of the wrong length. Targets are
    looked at on a CPU only; see `retina.ops.loss_common` for what happens elsewhere.

    Sources: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5 and footnote 1 (many classes);
    Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, ECCV 2018 (1 / k for each of k labels).
    """
    check_focal(None, gamma)
    axis = class_axis(logits)
    log_p = at_least_float32(logits).log_softmax(axis)
    if weight is not None:
        per_class(weight, "weight")
        weight = along_classes(weight, log_p, "weight").expand_as(log_p)
    if targets.shape == logits.shape:
        labels, counted = element_targets(log_p, targets, ignore_index)
        if counted is not None:
            labels = labels * counted.all(axis, keepdim=True)
        share = labels / labels.sum(axis, keepdim=True).clamp(min=torch.finfo(labels.dtype).tiny)
    else:
        index, counted = class_indices(logits, targets, ignore_index)
        share, log_p = counted.to(log_p.dtype), log_p.gather(axis, index)
        weight = None if weight is None else weight.gather(axis, index)
    if weight is not None:
        share = share * weight
    log_p = torch.where(share > 0, log_p, 0)  # infinite for a class that is masked out, and 0 times that is NaN
    # -expm1(log p) is 1 - p without the cancellation.
    loss = (share * clear_of_zero(-log_p.expm1()) ** gamma * -log_p).sum(axis)
    return reduce_loss(loss, reduction, share.sum())
