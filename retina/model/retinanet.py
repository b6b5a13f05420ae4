"""The detector: backbone, pyramid, head and anchors; and the builder that derives every size from a few numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from retina.errors import ConfigError
from retina.model.backbone import ResNet
from retina.model.fpn import FPN
from retina.model.head import Head
from retina.ops.anchors import AnchorGenerator
from retina.types import Predictions


class RetinaNet(nn.Module):
    """One-stage detector (Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002).

    Takes uint8 RGB images; mean and std are applied on the device. Returns the same predictions in training and
    evaluation: loss and postprocess are functions beside it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        backbone: ResNet,
        fpn: FPN,
        head: Head,
        anchors: AnchorGenerator,
        mean: Sequence[float],
        std: Sequence[float],
        arguments: dict[str, Any],
    ) -> None:
        """`mean` and `std` per channel on the scale 0..255. `arguments` rebuild this model through `retinanet`."""
        super().__init__()
        self.backbone, self.fpn, self.head, self.anchors = backbone, fpn, head, anchors
        self.arguments = arguments
        self._levels = RetinaNet._compute_levels
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level, finest first."""
        return self.fpn.strides

    @property
    def pad_value(self) -> tuple[int, int, int]:
        """The colour that is (nearly) zero after normalisation, for the padding around images."""
        r, g, b = (round(value) for value in self.mean.flatten().tolist())
        return r, g, b

    def compile(self, **options: Any) -> None:
        """From now on, all that a forward computes runs as one compiled graph per canvas, mode and precision.

        `options` go to `torch.compile`. Names in the state dict stay as they are; a copy made later is compiled too."""
        # each canvas counts once in training and once in evaluation; beyond the limit, nothing is compiled any more
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._levels = torch.compile(RetinaNet._compute_levels, dynamic=False, **options)

    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> Predictions:
        logits, deltas, shapes = self._levels(self, images)
        return Predictions(logits, deltas, self.anchors(shapes, self.strides, images.device))

    def _compute_levels(
        self, images: UInt8[Tensor, "B 3 H W"]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[tuple[int, int], ...]]:
        """Logits and deltas of every level, and its height and width in cells."""
        pyramid = self.fpn(self.backbone(self.normalize(images)))
        logits, deltas = self.head(pyramid)
        return logits, deltas, tuple((level.shape[-2], level.shape[-1]) for level in pyramid)

    def normalize(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        return (images - self.mean).div_(self.std)


def retinanet(
    *,
    num_classes: int,
    backbone: str = "resnet50",
    weights: str | None = None,
    norm: str | None = None,
    frozen_stages: int | None = None,
    levels: Sequence[int] = (3, 4, 5, 6, 7),
    fpn_channels: int = 256,
    p6_from: str = "c5",
    head_convs: int = 4,
    head_channels: int | None = None,
    head_norm: str | None = None,
    prior: float = 0.01,
    anchor_sizes: Sequence[float] | None = None,
    anchor_scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    anchors_rounded: bool = False,
    mean: Sequence[float] = (123.675, 116.28, 103.53),
    std: Sequence[float] = (58.395, 57.12, 57.375),
) -> RetinaNet:
    """Builds a RetinaNet; the defaults are the paper's.

    weights: ImageNet weights of the backbone: a torchvision name, a file, or None for random ones.
    norm: `batch`, `frozen` (BatchNorm with fixed statistics) or `group`. None: `frozen` with weights, else `batch`.
    frozen_stages: stages without gradients, from the input. None: 2 (stem and C2) with weights, else 0.
    head_channels: None is `fpn_channels`.
    anchor_sizes: one per level in pixels. None: four strides, which is 32..512 on P3..P7.
    anchors_rounded: whole-pixel anchors as torchvision makes them, for its weights.
    mean, std: per RGB channel on the scale 0..255 (ImageNet's).

    Raises ConfigError for values that do not fit each other, CheckpointError for unusable weights.
    """
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in locals().items()}
    norm = norm or ("frozen" if weights else "batch")
    frozen_stages = (2 if weights else 0) if frozen_stages is None else frozen_stages
    if num_classes < 1:
        raise ConfigError(f"num_classes: {num_classes} - annotations must name at least one category")
    last_level = min(5, max(levels, default=5))
    body = ResNet(backbone, norm=norm, frozen_stages=frozen_stages, last_level=last_level)
    if weights:
        body.load_imagenet(backbone, weights)
    fpn = FPN(body.channels, channels=fpn_channels, levels=tuple(levels), p6_from=p6_from)
    sizes = [4 * stride for stride in fpn.strides] if anchor_sizes is None else anchor_sizes
    if len(sizes) != len(fpn.strides):
        raise ConfigError(
            f"model.anchor_sizes: {len(sizes)} sizes for {len(fpn.strides)} levels - give one size per level"
        )
    anchors = AnchorGenerator(
        sizes=tuple(float(s) for s in sizes),
        scales=tuple(float(s) for s in anchor_scales),
        ratios=tuple(float(r) for r in anchor_ratios),
        rounded=anchors_rounded,
    )
    head = Head(
        fpn_channels,
        num_classes=num_classes,
        num_anchors=anchors.num_per_cell,
        channels=head_channels or fpn_channels,
        num_convs=head_convs,
        norm=head_norm,
        prior=prior,
    )
    arguments |= {"norm": norm, "frozen_stages": frozen_stages, "weights": None}
    return RetinaNet(backbone=body, fpn=fpn, head=head, anchors=anchors, mean=mean, std=std, arguments=arguments)
