"""COCO's categories, as torchvision lists them."""

from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights


def coco_rows() -> list[str | None]:
    """The name of category 0, 1, 2, ... 90; None where COCO has none (0 is torchvision's background)."""
    names = RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return [None if name in ("__background__", "N/A") else name for name in names]
