"""From logits and deltas to detections, against torchvision's `postprocess_detections`."""

from functools import partial

import torch

from benchmarks.torchvision_model import assert_same_detections, pair
from retina.detections import postprocess
from retina.lab.clock import Bench, Row, speedup
from retina.types import Predictions


def run(bench: Bench) -> list[Row]:
    """With biases at -3, where every second (anchor, class) pair passes the threshold, and with as few passing as in a
    trained detector."""
    batch, height, width, num_classes = (2, 160, 224, 5) if bench.quick else (4, 800, 1088, 80)
    our_model, their_model = pair(num_classes, device=bench.device)
    shapes = [(-(-height // stride), -(-width // stride)) for stride in our_model.strides]
    anchors = tuple(our_model.anchors(shapes, our_model.strides, bench.device))
    sizes = torch.tensor([[height, width]] * batch, device=bench.device)
    rows = []
    for bias, kind in ((-3.0, "bias -3"), (-6.0, "few candidates")):
        logits = tuple(torch.randn(batch, len(a), num_classes, device=bench.device) + bias for a in anchors)
        deltas = tuple(torch.randn(batch, len(a), 4, device=bench.device) * 0.3 for a in anchors)
        ways = {
            "ours": partial(postprocess, Predictions(logits, deltas, anchors), sizes),
            "reference": partial(
                their_model.postprocess_detections,
                {"cls_logits": list(logits), "bbox_regression": list(deltas)},
                [list(anchors)] * batch,
                [(height, width)] * batch,
            ),
        }
        assert_same_detections(ways["ours"](), ways["reference"](), pixels=1e-3)
        measure = f"postprocess {batch} x {height}x{width}, {num_classes} classes, {kind}"
        rows.append(speedup(measure, bench.time(ways), must=3, goal=8))
    return rows
