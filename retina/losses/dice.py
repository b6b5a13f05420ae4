"""Dice losses of masks, from logits: overlap of a whole mask, where the focal loss looks at pixels one by one.

    D = (2 sum p t + smooth) / (sum p + sum t + smooth)         per mask, sums over its pixels
    loss = mean over masks of 1 - D^(1 / beta)                  beta 1 is Dice, above it is focal Dice

A beta above 1 flattens the loss of masks that are found already (D near 1) beside that of masks that are missed, as
focusing does with pixels. `smooth` counts as so many pixels found, which keeps a mask without any pixel finite: its
loss goes to 0 with the predicted area.

float32 inside for narrower dtypes. All raise ValueError for shapes that do not fit and values out of range.

Sources: Milletari, Navab and Ahmadi, V-Net, 3DV 2016, section 3 (there with squares in the denominator); Wang and
Chung, Focal Dice Loss and Image Dilation for Brain Tumor Segmentation, DLMIA 2018 (beta).
"""

import math

import torch
from torch import Tensor, nn

from retina.losses.common import (
    LossModule,
    at_least_float32,
    check_range,
    class_axis,
    class_indices,
    element_targets,
    reduce_loss,
)


def sigmoid_dice_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    beta: float = 1.0,
    smooth: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Binary: one mask per image, whatever the axes after the first. For C masks per image: `logits.flatten(0, 1)`.

    Args:
        logits: (N, d1, ...) or (N, 1, d1, ...).
        targets: of the same shape: in [0, 1], bool, or integers 0 and 1.
        ignore_index: pixels whose integer target has this value count for nothing.
        reduction: "none" for one value per image, "sum", or "mean" over them.
    """
    check_dice(beta, smooth)
    if targets.shape != logits.shape or logits.dim() < 2:
        raise ValueError(
            f"masks must be (N, d1, ...), logits and targets of one shape, got {list(logits.shape)} and "
            f"{list(targets.shape)}"
        )
    logits = at_least_float32(logits)
    targets, counted = element_targets(logits, targets, ignore_index)
    return _loss(torch.sigmoid(logits), targets, counted, 1, beta, smooth, reduction)


def softmax_dice_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    beta: float = 1.0,
    smooth: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Multi-class: every class of every image is a mask, the background too.

    Args:
        logits: (N, C, d1, ...).
        targets: class indices (N, d1, ...) or (N, 1, d1, ...), or one-hot (N, C, d1, ...).
        ignore_index: pixels whose target has this value count for nothing.
        reduction: "none" for (N, C), "sum", or "mean" over all of them, also of classes that an image does not show.
    """
    check_dice(beta, smooth)
    if logits.dim() < 3:
        raise ValueError(f"logits of masks must be (N, C, d1, ...), got {list(logits.shape)}")
    axis = class_axis(logits)
    p = at_least_float32(logits).softmax(axis)
    if targets.shape == logits.shape:
        targets, elements = element_targets(p, targets, ignore_index)
        counted = None if elements is None else elements.all(axis, keepdim=True)
        targets = targets if counted is None else targets * counted
    else:
        index, counted = class_indices(logits, targets, ignore_index)
        classes = torch.arange(p.shape[axis], device=p.device).reshape(-1, *[1] * (p.dim() - 2))
        # A byte per logit; a scatter of the true classes' probabilities would need none, but add up pixel by pixel.
        targets = (index == classes) & counted
    return _loss(p, targets, counted, 2, beta, smooth, reduction)


def _loss(
    p: Tensor, targets: Tensor, counted: Tensor | None, num_axes: int, beta: float, smooth: float, reduction: str
) -> Tensor:
    """The loss of masks, given probabilities and targets whose first `num_axes` axes say which mask, and what counts
    of their pixels (None: all)."""
    if counted is not None:
        p = p * counted
    p, targets = p.flatten(num_axes), targets.flatten(num_axes)
    mass, area = p.sum(-1), targets.sum(-1, dtype=p.dtype)
    loss = 1 - ((2 * (p * targets).sum(-1) + smooth) / (mass + area + smooth)) ** (1 / beta)
    return reduce_loss(loss, reduction, loss.numel())


def check_dice(beta: float, smooth: float) -> None:
    """Raises ValueError unless beta is finite and at least 1, and smooth finite and above 0."""
    check_range("beta", beta, 1)
    if not 0 < smooth < math.inf:
        raise ValueError(f"smooth must be finite and above 0, got {smooth}")


class SigmoidDiceLoss(LossModule):
    """`sigmoid_dice_loss`, 1 - Dice^(1 / beta): one mask per image. Focal Dice with a beta above 1."""

    function = staticmethod(sigmoid_dice_loss)

    def __init__(
        self, beta: float = 1.0, *, smooth: float = 1.0, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        check_dice(beta, smooth)
        super().__init__(beta=beta, smooth=smooth, ignore_index=ignore_index, reduction=reduction)


class SoftmaxDiceLoss(SigmoidDiceLoss):
    """`softmax_dice_loss`, 1 - Dice^(1 / beta): one mask per image and class. Focal Dice with a beta above 1."""

    function = staticmethod(softmax_dice_loss)


class FocalPlusDiceLoss(nn.Module):
    """focal(logits, targets) + dice_weight dice(logits, targets): pixels and their overlap.

    Source: Zhu et al., AnatomyNet, Medical Physics 2019.
    """

    def __init__(self, focal: nn.Module, dice: nn.Module, *, dice_weight: float = 1.0) -> None:
        super().__init__()
        check_range("dice_weight", dice_weight)
        self.focal, self.dice, self.dice_weight = focal, dice, dice_weight

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        focal, dice = self.focal(logits, targets), self.dice(logits, targets)
        if focal.shape != dice.shape:
            raise ValueError("there is no sum of one focal loss per pixel and one Dice loss per mask: reduce both")
        return focal + self.dice_weight * dice
