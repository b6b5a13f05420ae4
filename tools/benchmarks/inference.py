"""From images to detections: `Detector` against torchvision's RetinaNet with the same weights."""

import copy
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step import make_batch
from benchmarks.torchvision_model import assert_same_detections, pair, unit_images
from retina.inference import Detector
from retina.lab.clock import Bench, Row, absolute, speedup
from retina.model.retinanet import RetinaNet
from retina.model.weights import DetectorCard
from retina.types import Batch

POSTPROCESS = {"score_threshold": 0.05, "candidates_per_level": 1000, "nms_iou": 0.5, "max_detections": 100}


def run(bench: Bench) -> list[Row]:
    model, reference = pair(device=bench.device)
    if bench.device.type == "cuda":
        return _on_cuda(bench, model)
    images, height, width = (1, 128, 128) if bench.quick else (2, 512, 512)
    batch = make_batch(images, height, width, bench.device)
    detections_of_reference = partial(_without_gradients, reference.eval(), unit_images(batch.images))
    detectors = {name: _detector(copy.deepcopy(model), height, width, name, bench.device) for name in ("fp32", "bf16")}
    assert_same_detections(
        [one.tensors for one in detectors["fp32"].predict(list(batch.images))], detections_of_reference(), pixels=1e-3
    )
    _assert_logits_near(detectors["bf16"], detectors["fp32"], batch.images)

    ways = {name: partial(detector.predict, list(batch.images)) for name, detector in detectors.items()}
    times = bench.time({**ways, "torchvision": detections_of_reference})
    shape = f"{images} x {height} x {width}"
    sides = {name: {"ours": times[name], "reference": times["torchvision"]} for name in detectors}
    return [
        speedup(f"inference fp32 vs torchvision fp32, {shape}", sides["fp32"], must=1.05, goal=1.15),
        speedup(f"inference bf16 vs torchvision fp32, {shape}", sides["bf16"], must=1.8, goal=2.2),
    ]


def _on_cuda(bench: Bench, model: RetinaNet) -> list[Row]:
    """Images of 800x1088 on the device; detections on the host, so each call waits for the device at its end."""
    height, width = (128, 128) if bench.quick else (800, 1088)
    many, one = (make_batch(images, height, width, bench.device) for images in (2 if bench.quick else 16, 1))
    detector = _detector(model, height, width, "bf16", bench.device)
    detector.model.compile()
    speed = len(many.images) / _seconds(detector, many, bench.rounds)
    latency = 1000 * _seconds(detector, one, 3 * bench.rounds)
    shape = f"{height} x {width} bf16"
    throughput = f"inference, batch {len(many.images)}, {shape}"
    return [
        absolute(throughput, speed, "images/s", must=250, goal=600, lower_is_better=False),
        absolute(f"latency with NMS, batch 1, {shape}", latency, "ms", must=20, goal=8),
    ]


def _seconds(detector: Detector, batch: Batch, rounds: int) -> float:
    """Median wall time, after the calls that compile."""
    seconds = []
    for _ in range(3 + rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        detector.detect(batch, POSTPROCESS)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[3:])


def _detector(model: RetinaNet, height: int, width: int, precision: str, device: torch.device) -> Detector:
    """For images of that size, which it need not resize."""
    preprocessing: dict[str, Any] = {
        "short_side": min(height, width),
        "long_side": max(height, width),
        "pad_multiple": 32,
    }
    preprocessing |= {"pad_value": list(model.pad_value), "precision": precision, "batch_size": 16}
    labels = range(model.arguments["num_classes"])
    classes, ids = [str(label) for label in labels], list(labels)
    card = DetectorCard(
        model=model.arguments, classes=classes, category_ids=ids, preprocessing=preprocessing, postprocess=POSTPROCESS
    )
    return Detector(model, card, device=device, file=Path("random weights"))


@torch.no_grad()
def _without_gradients(model: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    return model(images)


@torch.no_grad()
def _assert_logits_near(coarse: Detector, fine: Detector, images: Tensor) -> None:
    with torch.autocast(images.device.type, coarse.dtype):
        logits = torch.cat(coarse.model(images).logits, dim=1).float()
    expected = torch.cat(fine.model(images).logits, dim=1)
    error = (logits - expected).abs()
    assert error.mean() < 0.02 * expected.std(), f"logits are off by {error.mean():.3g} in the mean"
    assert error.max() < 0.2 * expected.std(), f"a logit is off by {error.max():.3g}"
