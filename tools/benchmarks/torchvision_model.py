"""torchvision's RetinaNet with our weights: the reference of every measure that runs a whole model."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina.interop.torchvision import to_torchvision
from retina.model.retinanet import RetinaNet, retinanet
from retina.types import Detections, Targets


def pair(num_classes: int = 80, *, device: torch.device) -> tuple[RetinaNet, TorchvisionRetinaNet]:
    """RetinaNet R50-FPN twice with the same random weights, in training mode: ours, in channels-last memory, and
    torchvision's. The norms, the stem and the first stage are frozen.

    The statistics of the norms are no identity and the classification bias is -3, so that there are detections.

    Theirs is changed in two points, so that both do the same work on a canvas: images and boxes are not resized (they
    are normalised and batched as ever), and anchors follow the declared strides, where theirs guesses image size //
    grid size, which is off on the coarse levels of 800x1088."""
    model = retinanet(num_classes=num_classes, norm="frozen", frozen_stages=2, p6_from="p5", anchors_rounded=True)
    _give_signal(model)
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    p6p7 = LastLevelP6P7(256, 256)
    backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=p6p7)
    sizes = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in (32, 64, 128, 256, 512))
    anchors = _DeclaredStrides(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    reference = TorchvisionRetinaNet(backbone, num_classes, anchor_generator=anchors, detections_per_img=100)
    reference.transform.resize = lambda image, target: (image, target)
    reference.load_state_dict(to_torchvision(model.state_dict()))
    trained = [sum(p.numel() for p in detector.parameters() if p.requires_grad) for detector in (model, reference)]
    assert trained[0] == trained[1], f"one trains {trained[0]} numbers, the other {trained[1]}"
    return model.train().to(device).to(memory_format=torch.channels_last), reference.train().to(device)


def unit_images(images: Tensor) -> list[Tensor]:
    """Our uint8 batch as torchvision takes it: float32 images in [0, 1]."""
    return list(images.float() / 255)


def target_dicts(targets: Targets) -> list[dict[str, Tensor]]:
    """Our padded targets as torchvision takes them; crowd regions are left out."""
    return [
        {"boxes": boxes[valid], "labels": labels[valid]}
        for boxes, labels, valid in zip(targets.boxes, targets.labels, targets.valid, strict=True)
    ]


def assert_same_detections(
    detections: list[Detections], references: list[dict[str, Tensor]], *, pixels: float, score: float = 1e-5
) -> None:
    """Raises AssertionError unless every detection has its one counterpart, which may stand at another place."""
    assert len(detections) == len(references)
    for (boxes, scores, labels), expected in zip(detections, references, strict=True):
        assert len(scores) == len(expected["scores"]) > 0
        distance = (boxes[:, None] - expected["boxes"]).abs().amax(dim=-1)
        distance = distance + 1e3 * (scores[:, None] - expected["scores"]).abs()
        distance[labels[:, None] != expected["labels"]] = torch.inf
        partner = distance.argmin(dim=1)
        assert len(partner.unique()) == len(partner), "two detections have the same counterpart"
        torch.testing.assert_close(boxes, expected["boxes"][partner], rtol=0, atol=pixels)
        torch.testing.assert_close(scores, expected["scores"][partner], rtol=0, atol=score)


class _DeclaredStrides(AnchorGenerator):
    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device, dtype = feature_maps[0].device, feature_maps[0].dtype
        self.set_cell_anchors(torch.float32 if dtype == torch.bfloat16 else dtype, device)
        strides = [[torch.tensor(2**level, device=device)] * 2 for level in range(3, 8)]
        levels = self.grid_anchors([list(feature.shape[-2:]) for feature in feature_maps], strides)
        return [torch.cat(levels) for _ in image_list.image_sizes]


@torch.no_grad()
def _give_signal(model: RetinaNet) -> None:
    """Statistics as training leaves them (no identity, signals of size 1 in every stage), logits that spread."""
    for name, module in model.backbone.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            numbers = module.state_dict()
            numbers["running_var"].uniform_(0.5, 2.0)
            numbers["running_mean"].normal_(std=0.1)
            numbers["weight"].uniform_(0.5, 1.5).mul_(0.3 if name.endswith("bn3") else 1.0)
            numbers["bias"].normal_(std=0.1)
    for tower in (model.head.classification, model.head.box):
        for layer in tower.convs:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        tower.predict.weight.normal_(std=0.01)
    model.head.classification.predict.weight.normal_(std=0.02)
    nn.init.constant_(model.head.classification.predict.get_parameter("bias"), -3.0)
