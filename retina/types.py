"""The tensors that flow through a detector, and the legend of their shapes.

Legend, used in every signature of the library:

    B  images of a batch                 K  classes, labels are 0..K-1
    A  anchors over all levels           A_l  anchors of one pyramid level
    M  objects of one image (padded)     D  detections of one image
    C  channels                          H W  height and width in pixels or cells

Boxes are `xyxy`, absolute pixels, float32, in the coordinates of the image tensor they stand beside. Whether something
is positive, negative, ignored, a real object or padding is said by a bool mask, never by a magic integer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor


class Targets(NamedTuple):
    """Objects of a batch, padded to the largest count M of any image (M may be 0)."""

    boxes: Float[Tensor, "B M 4"]
    labels: Int64[Tensor, "B M"]
    valid: Bool[Tensor, "B M"]
    """True for an object to detect; False for padding and for crowd regions."""
    crowd: Bool[Tensor, "B M"]
    """True for a region with uncounted objects (COCO's `iscrowd`): nothing is learned inside it."""


class Batch(NamedTuple):
    """What a loader yields: images on one canvas, their content at the top left."""

    images: UInt8[Tensor, "B C H W"]
    sizes: Int64[Tensor, "B 2"]
    """(height, width) of the content inside the canvas; the rest is padding."""
    targets: Targets
    indices: Int64[Tensor, "B"]
    """Position of each image in the annotations, from 0."""
    original_sizes: Int64[Tensor, "B 2"]
    """(height, width) of the image file after EXIF rotation, before any resize."""


class Assignment(NamedTuple):
    """What every anchor is trained to be. An anchor that is neither positive nor negative is ignored."""

    matched: Int64[Tensor, "B A"]
    """The object an anchor belongs to, 0..M-1; meaningful at positive anchors only."""
    positive: Bool[Tensor, "B A"]
    negative: Bool[Tensor, "B A"]
    target_scores: Float[Tensor, "B A"] | None = None
    """The score in [0, 1] that a positive anchor should reach; None: 1. Only soft classification losses read it."""


class Predictions(NamedTuple):
    """Raw outputs of a detector, one entry per pyramid level, finest first. The same in training and evaluation."""

    logits: tuple[Float[Tensor, "B A_l K"], ...]
    deltas: tuple[Float[Tensor, "B A_l 4"], ...]
    anchors: tuple[Float[Tensor, "A_l 4"], ...]
    """A plain tuple, or `retina.ops.anchors.Anchors`, which also holds the grid of each level."""
    quality: tuple[Float[Tensor, "B A_l"], ...] | None = None
    """Logits of how well each box fits (centerness or IoU), where the head has such a branch."""
    bins: tuple[Float[Tensor, "B A_l 4 _"], ...] | None = None
    """Logits over the distances 0, 1, 2, ... strides from an anchor's centre to the left, top, right and bottom of the
    box, where the head predicts distributions; `deltas` then hold the boxes of their means."""
    sizes: Int64[Tensor, "B 2"] | None = None
    """(height, width) of the images' content, as the model was told: what is predicted beyond it is not trained. None:
    they fill the canvas."""


class Losses(NamedTuple):
    """Sums over a batch, and what to divide them by: the sum of it over ranks and accumulation, at least 1."""

    classification: Float[Tensor, ""]
    box: Float[Tensor, ""]
    num_positives: Float[Tensor, ""]
    """The positive anchors, or the sum of their target scores where the assigner gives those."""
    box_normalizer: Float[Tensor, ""] | None = None
    """The sum of the positives' weights in the box loss; None: that is divided by `num_positives` too."""

    def total(self) -> Float[Tensor, ""]:
        """The loss of this batch alone, to call `backward` on."""
        divisor = self.num_positives.clamp(min=1)
        box_divisor = divisor if self.box_normalizer is None else self.box_normalizer.clamp(min=1)
        return self.classification / divisor + self.box / box_divisor


class Detections(NamedTuple):
    """Detections of one image, best score first."""

    boxes: Float[Tensor, "D 4"]
    scores: Float[Tensor, "D"]
    labels: Int64[Tensor, "D"]


DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the word `precision` means: the type in which convolutions are computed. Weights and losses stay float32."""
Criterion = Callable[[Predictions, Targets], Losses]
Postprocess = Callable[[Predictions, Tensor], list[Detections]]
"""From the predictions and `Batch.sizes` to the detections of each image."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`. A copy from pinned memory does not wait for the device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    images, sizes, targets, indices, original_sizes = batch
    return Batch(move(images), move(sizes), Targets(*map(move, targets)), move(indices), move(original_sizes))
