"""A data set and a run folder that take a second to make. The detector is not trained: its weights are drawn so that it
finds plenty, which is all that plumbing needs."""

from pathlib import Path

import torch
import yaml

from retina.data.coco import read_coco
from retina.data.layouts import locate_split
from retina.data.shapes import write_shapes
from retina.model.retinanet import retinanet
from retina.model.weights import DetectorCard, save_detector

PREPROCESSING = {
    "short_side": 64,
    "long_side": 96,
    "pad_multiple": 32,
    "pad_value": [124, 116, 104],
    "precision": "fp32",
    "batch_size": 8,
}


def write_tiny_data(root: Path) -> Path:
    """Shapes: 4 images to train on, 5 to evaluate on."""
    write_shapes(root, num_train=4, num_val=5, image_size=[64, 96])
    return root


def write_tiny_run(folder: Path, data: Path) -> Path:
    """A run folder with `config.yaml` and `best.safetensors`, as training leaves them."""
    annotations = read_coco(*locate_split(data, "val"))
    torch.manual_seed(0)
    model = retinanet(
        num_classes=len(annotations.classes),
        backbone="resnet18",
        levels=[3, 4, 5],
        fpn_channels=16,
        head_convs=1,
        prior=0.1,
        anchor_sizes=[16.0, 32.0, 64.0],
        anchor_ratios=[1.0],
        anchor_scales=[1.0],
    )
    with torch.no_grad():  # far apart scores, so that rounding does not change their order
        model.head.classification.predict.weight.normal_(std=1.0)
        model.head.box.predict.weight.normal_(std=0.1)
    card = DetectorCard(
        model=model.arguments,
        classes=list(annotations.classes),
        category_ids=[int(category or 0) for category in annotations.category_ids],
        preprocessing=PREPROCESSING,
        postprocess={"score_threshold": 0.05, "candidates_per_level": 1000, "nms_iou": 0.5, "max_detections": 20},
    )
    folder.mkdir(parents=True)
    save_detector(folder / "best.safetensors", model.state_dict(), card)
    section = {"name": "tiny", "root": str(data), "short_side": 64, "long_side": 96, "num_workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": folder.name, "data": section}))
    return folder
