"""How long trained detectors take for an image, measured side by side."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from retina.cli.data import DataConfig, load_split
from retina.cli.loaders import build_eval_loader
from retina.distributed import choose_device
from retina.engine.config import from_mapping
from retina.inference import Detector
from retina.lab.clock import Bench
from retina.lab.study import Line

IMAGES = 4
"""At most, of the validation split, in one batch."""


def time_inference(lines: Sequence[Line]) -> dict[str, float]:
    """Milliseconds per image by label, from the uint8 image on the device to its detections, of each line's first
    finished run. On a CPU: of one thread."""
    ways: dict[str, Callable[[], object]] = {}
    counts: dict[str, int] = {}
    for line in lines:
        if job := next((job for job in line.jobs if job.finished()), None):
            device, plugins = job.settings["train"]["device"], job.settings["plugins"]
            detector = Detector.load(job.folder, device=device, plugins=plugins)
            data = from_mapping(DataConfig, job.settings["data"], "data")
            reading = replace(data, num_workers=0, canvases=None)
            loader = build_eval_loader(load_split(data, "val"), reading, detector.canvas, batch_size=IMAGES)
            batch = next(iter(loader))
            ways[line.label] = partial(detector.detect, batch, detector.card.postprocess)
            counts[line.label] = len(batch.images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = Bench(device=choose_device("auto")).time(ways)
    finally:
        torch.set_num_threads(threads)
    return {label: 1000 * times[label].median / count for label, count in counts.items()}
