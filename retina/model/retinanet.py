"""The detector: backbone, pyramid, head and anchors; and the builder that derives every size from a few numbers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from retina.errors import ConfigError, check_choice
from retina.model.backbone import ResNet
from retina.model.backbones import build_backbone
from retina.model.casting import weights_cast
from retina.model.content import Content
from retina.model.fpn import NECKS
from retina.model.head import Head
from retina.model.heads import build_head
from retina.model.input_channels import adapt_input
from retina.model.parts import check_backbone, make_part, run_part, takes_two
from retina.model.pretrained import load_backbone, read_weights
from retina.ops.anchors import AnchorGenerator
from retina.ops.distributions import distances_to_deltas, mean_distances
from retina.types import Predictions

MOST_CHANNELS, MOST_CONVS, MOST_ANCHORS = 4096, 64, 1000
"""Of a pyramid or head, of a head, per cell: more is a slip, which would take all the memory there is."""


class RetinaNet(nn.Module):
    """One-stage detector (Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002).

    Takes uint8 images, RGB unless `mean` has other channels; mean and std are applied on the device. Returns the same
    predictions in training and evaluation; the loss and `postprocess` are functions of them.
    """

    mean: Tensor
    std: Tensor
    sides: Tensor
    """Width and height of a cell's anchors on each level, in strides; only where the head predicts distributions."""

    def __init__(
        self,
        *,
        backbone: Any,
        fpn: Any,
        head: Any,
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
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.bins: int | None = getattr(head, "bins", None)
        if self.bins is not None:
            self.register_buffer("sides", anchors.sides(fpn.strides), persistent=False)
            head.start_from_anchors(self.sides.mean(dim=0))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level, finest first."""
        return self.fpn.strides

    @property
    def pad_value(self) -> tuple[int, ...]:
        """Of the padding around images, per channel: what is (nearly) zero after normalisation."""
        return tuple(round(value) for value in self.mean.flatten().tolist())

    def compile(self, **options: Any) -> None:
        """From now on, the network runs as one compiled graph per canvas, mode and precision.

        `options` go to `torch.compile`. Names in the state dict stay as they are. A copy made later is compiled too."""
        # Each canvas counts once in training and once in evaluation. Beyond the limit torch compiles no more.
        torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
        self._levels = torch.compile(RetinaNet._compute_levels, dynamic=False, **options)

    def forward(self, images: UInt8[Tensor, "B C H W"], sizes: Int64[Tensor, "B 2"] | None = None) -> Predictions:
        """sizes: (height, width) of the content of each image, at the top left; None: the whole canvas. With them, what
            is predicted within the content does not depend on the padding or the other images, except by rounding.

        Raises ValueError for images of another type or shape, because their predictions would be silently wrong."""
        channels = self.mean.numel()
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
            expected = f"uint8 [B {channels} H W]{', RGB' * (channels == 3)} from 0 to 255"
            problem = f"images must be {expected}, got {images.dtype} {list(images.shape)}"
            raise ValueError(f"{problem} - the model applies mean and std itself")
        with weights_cast(self._stages(), images.device):
            logits, deltas, quality, bins, shapes = self._levels(self, images, sizes)
        strides: Sequence[int | tuple[int, int]] = self.strides
        if self.arguments.get("canvas_strides"):
            strides = [(images.shape[2] // height, images.shape[3] // width) for height, width in shapes]
        anchors = self.anchors(shapes, strides, images.device)
        return Predictions(logits, deltas, anchors, quality or None, bins or None, sizes)

    def _stages(self) -> list[nn.Module]:
        """The parts whose weights autocast would cast one by one: those of our own, where nothing is compiled."""
        own = self._levels is RetinaNet._compute_levels
        parts = [part for part in (self.fpn, self.head) if type(part) in (*NECKS.values(), Head)]
        stages = self.backbone.children() if type(self.backbone) is ResNet else ()
        return [*stages, *parts] if own else []

    def _compute_levels(
        self, images: UInt8[Tensor, "B C H W"], sizes: Int64[Tensor, "B 2"] | None
    ) -> tuple[tuple[Any, ...], ...]:
        """Logits, deltas, quality and bins of every level (quality and bins empty without them), and its shape."""
        content = Content(sizes, (images.shape[2], images.shape[3]))
        features = run_part(self.backbone, content.keep(self.normalize(images), 1), content)
        pyramid = run_part(self.fpn, features, content)
        masks = tuple(map(content.mask_of, pyramid, self.strides))
        logits, deltas, quality = self.head(pyramid, masks) if takes_two(self.head) else self.head(pyramid)
        bins: tuple[Tensor, ...] = ()
        if self.bins is not None:
            bins = tuple(level.unflatten(-1, (4, self.bins)) for level in deltas)
            deltas = tuple(
                distances_to_deltas(mean_distances(level), sides.repeat(level.shape[1] // len(sides), 1))
                for level, sides in zip(bins, self.sides, strict=True)
            )
        return logits, deltas, quality, bins, tuple((level.shape[-2], level.shape[-1]) for level in pyramid)

    def normalize(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return (images - self.mean).div_(self.std)


def retinanet(
    *,
    num_classes: int,
    backbone: str | Mapping[str, Any] = "resnet50",
    weights: str | None = None,
    norm: str | None = None,
    frozen_stages: int | None = None,
    norm_eps: float = 1e-5,
    stride_in_1x1: bool = False,
    levels: Sequence[int] = (3, 4, 5, 6, 7),
    neck: str | Mapping[str, Any] = "fpn",
    fpn_channels: int = 256,
    p6_from: str = "c5",
    p7_relu: bool = True,
    head: str | Mapping[str, Any] | None = None,
    head_convs: int = 4,
    head_channels: int | None = None,
    head_norm: str | None = None,
    head_quality: bool = False,
    head_scales: bool = False,
    box_bins: int | None = None,
    guided_quality: bool = False,
    prior: float = 0.01,
    anchor_sizes: Sequence[float] | None = None,
    anchor_scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    anchors_rounded: bool = False,
    canvas_strides: bool = False,
    anchor_offset: float = 0.0,
    mean: Sequence[float] = (123.675, 116.28, 103.53),
    std: Sequence[float] = (58.395, 57.12, 57.375),
    plugins: Sequence[str] = (),
) -> RetinaNet:
    """Builds a RetinaNet; the defaults are the paper's.

    backbone: a ResNet (`resnet18_half` has half the channels), MobileNet or EfficientNet, or `timm:NAME` (see
        `TimmBackbone` for what `weights`, `norm` and `frozen_stages` mean there).
    weights: of the backbone: a torchvision name (ImageNet), a file, which may be that of a whole detector, or None for
        random weights.
    norm: `batch`, `frozen` (BatchNorm with fixed statistics) or `group`. None: `frozen` with weights, else `batch`.
    frozen_stages: stages without gradients, from the input. None: 2 (stem and C2) with weights, else 0.
    norm_eps: added to the variance in every norm of the ResNet.
    stride_in_1x1: bottlenecks halve the map in their first 1x1 convolution, for weights trained so (MSRA's, Caffe's).
    neck: `fpn` or `pafpn`.
    p7_relu: False for weights of mmdetection, which has no ReLU before P7.
    head: `task_aligned` (TOOD), or a section for a head of another package; None: the paper's.
    head_channels: None is `fpn_channels`.
    head_norm: `group`, or `group_bias`, whose convolutions have biases as detectron2's.
    head_quality: predict how well each box fits; `postprocess` multiplies scores by it.
    head_scales: multiply the box numbers of each level by a factor that is learned, as the heads of FCOS, ATSS and GFL.
    box_bins: predict each side of a box as a distribution over 0..box_bins - 1 strides from the anchor's centre, 17 in
        the paper of generalized focal loss. None: deltas.
    guided_quality: multiply scores by a quality read from these distributions, as generalized focal loss V2 does.
    anchor_sizes: one per level in pixels. None: four strides, which is 32..512 on P3..P7.
    anchors_rounded: whole-pixel anchors as torchvision makes them, for its weights.
    canvas_strides: anchors are canvas // cells pixels apart on each axis, as torchvision places them and has trained
        its published weights: on 800 rows, 13 cells of stride 64 are 61 pixels apart (its detection/anchor_utils.py).
    anchor_offset: of the anchors' centres, in strides: 0.5 for centres of cells.
    mean, std: per channel on the scale 0..255, whose number is that of the images; the defaults are ImageNet's in RGB.
    plugins: packages from which `backbone`, `neck` and `head` may be taken, as `{"_target_": "mylab.backbones.Tiny",
        "width": 16}`. See `retina.model.parts` for what they must be like.

    Raises ConfigError for values out of range or that contradict each other, CheckpointError for unusable weights.
    """
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in locals().items()}
    del arguments["plugins"]  # a file must not say what may be imported
    if head is None:
        del arguments["head"]
    norm = norm or ("frozen" if weights else "batch")
    frozen_stages = (2 if weights else 0) if frozen_stages is None else frozen_stages
    head_channels = head_channels or fpn_channels
    _check(num_classes >= 1, "num_classes", num_classes, "annotations must name at least one category")
    some, each = 1 <= len(mean) <= 256, f"a number for each of {len(mean)} channels, on the scale 0..255"
    _check(some and all(map(math.isfinite, mean)), "mean", mean, f"give {each}")
    _check(len(std) == len(mean) and all(0 < s < math.inf for s in std), "std", std, f"give {each}, above 0")
    _check(1 <= fpn_channels <= MOST_CHANNELS, "fpn_channels", fpn_channels, f"give 1 to {MOST_CHANNELS}")
    _check(1 <= head_channels <= MOST_CHANNELS, "head_channels", head_channels, f"give 1 to {MOST_CHANNELS}")
    _check(0 <= head_convs <= MOST_CONVS, "head_convs", head_convs, f"give 0 to {MOST_CONVS}")
    _check(0 <= anchor_offset <= 1, "anchor_offset", anchor_offset, "give 0 to 1 stride, 0.5 for centres of cells")
    if isinstance(neck, str):
        check_choice(neck, NECKS, "neck")
    if canvas_strides and box_bins is not None:
        problem = "distributions need anchors a stride apart - give false"
        raise ConfigError(problem, code="contradiction", key="canvas_strides")
    body: Any
    if isinstance(backbone, str):
        common: dict[str, Any] = {"channels": len(mean), "norm": norm, "frozen_stages": frozen_stages}
        body = build_backbone(backbone, weights, levels, norm_eps=norm_eps, stride_in_1x1=stride_in_1x1, **common)
    else:
        body = make_part(backbone, "backbone", plugins, last_level=min(5, max(levels, default=5)))
        check_backbone(body, levels)
        adapt_input(body, len(mean))
        if weights:
            load_backbone(body, read_weights(Path(weights)), name=str(backbone["_target_"]), weights=weights)
    common = {"in_channels": tuple(body.channels), "channels": fpn_channels, "levels": tuple(levels)}
    fpn: Any = (
        NECKS[neck](**common, p6_from=p6_from, p7_relu=p7_relu)
        if isinstance(neck, str)
        else make_part(neck, "neck", plugins, **common)
    )
    sizes = [4 * stride for stride in fpn.strides] if anchor_sizes is None else anchor_sizes
    per_level = f"give one size for each of {len(fpn.strides)} levels"
    _check(len(sizes) == len(fpn.strides), "anchor_sizes", sizes, per_level)
    num_anchors = len(anchor_scales) * len(anchor_ratios)
    _check(num_anchors <= MOST_ANCHORS, "anchor_ratios", num_anchors, f"give up to {MOST_ANCHORS} anchors per cell")
    sizes, scales, ratios = (tuple(map(float, values)) for values in (sizes, anchor_scales, anchor_ratios))
    anchors = AnchorGenerator(sizes, scales, ratios, rounded=anchors_rounded, offset=anchor_offset)
    common = {"in_channels": fpn_channels, "num_classes": num_classes, "num_anchors": anchors.num_per_cell}
    tower: Any
    if isinstance(head, Mapping):
        tower = make_part(head, "head", plugins, **common)
    else:
        common |= {"channels": head_channels, "num_convs": head_convs, "norm": head_norm, "prior": prior}
        common["scaled_levels"] = len(fpn.strides) if head_scales else None
        outputs = {"head_quality": head_quality, "box_bins": box_bins, "guided_quality": guided_quality}
        tower = build_head(head, outputs, anchors, fpn.strides, **common)
    mean, std = [float(m) for m in mean], [float(s) for s in std]  # whole numbers would make integer tensors
    arguments |= {"norm": norm, "frozen_stages": frozen_stages, "weights": None}
    return RetinaNet(backbone=body, fpn=fpn, head=tower, anchors=anchors, mean=mean, std=std, arguments=arguments)


def _check(ok: bool, key: str, value: object, fix: str) -> None:
    if not ok:
        raise ConfigError(f"{value} - {fix}", code="out-of-range", key=key)
