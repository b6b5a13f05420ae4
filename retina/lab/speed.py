"""How long trained detectors take for an image, measured side by side."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from retina.distributed import choose_device
from retina.engine.build import build_eval_loader
from retina.engine.config import DataConfig, from_mapping
from retina.engine.splits import load_split
from retina.inference import Detector
from retina.lab.clock import Bench
from retina.lab.jobs import finished
from retina.lab.study import Job, Line
from retina.types import Batch

IMAGES = 4
"""At most, of the validation split, in one batch."""


def time_inference(lines: Sequence[Line]) -> dict[str, float]:
    """Milliseconds per image, from the uint8 image on the device to its detections, of each line's first finished run.

    On a CPU: of one thread."""
    runs = {line.label: next((job for job in line.jobs if finished(job)), None) for line in lines}
    detectors = {label: _detector(job) for label, job in runs.items() if job is not None}
    ways = {
        label: partial(detector.detect, batch, detector.card.postprocess)
        for label, (detector, batch) in detectors.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = Bench(device=choose_device("auto")).time(ways)
    finally:
        torch.set_num_threads(threads)
    return {label: 1000 * times[label].median / len(batch.images) for label, (_, batch) in detectors.items()}


def _detector(job: Job) -> tuple[Detector, Batch]:
    """A run's detector, and images at its size."""
    detector = Detector.load(job.folder, device=job.settings["train"]["device"])
    data = from_mapping(DataConfig, job.settings["data"], "data")
    loader = build_eval_loader(
        load_split(data, "val"), replace(data, num_workers=0, canvases=None), detector.canvas, batch_size=IMAGES
    )
    return detector, next(iter(loader))
