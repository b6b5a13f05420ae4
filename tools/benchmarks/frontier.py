"""Draws AP against the CPU time that training took and that an image takes, for the detectors of docs/lab/frontier.csv.

python tools/benchmarks/frontier.py      # measures the time of an image, and writes docs/images/frontier.png

AP and the time of training are those of docs/results.md (the automatic recipe, blood cells from scratch). The time of
an image is measured here, the shortest of some on one thread: the network and the search for candidates. Untrained
weights have none, so NMS is not in it, nor is the decoding of the file.
"""

import argparse
import csv
import io
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from retina.detections import postprocess
from retina.files import read_plain, write_whole
from retina.model.retinanet import retinanet
from retina.printing import say

DOCS = Path(__file__).parents[2] / "docs"
SIZE = (288, 384)
ROUNDS = 15


class Point(NamedTuple):
    label: str
    training: float
    """CPU seconds."""
    ap: float
    image: float | None
    """CPU milliseconds; None where it cannot be measured here."""


def main(typed: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="AP against CPU time")
    parser.add_argument("--table", type=Path, default=DOCS / "lab/frontier.csv")
    parser.add_argument("--output", type=Path, default=DOCS / "images/frontier.png")
    options = parser.parse_args(typed)
    torch.set_num_threads(1)
    images: dict[str, float] = {}
    points = []
    for row in csv.DictReader(io.StringIO(read_plain(options.table).decode())):
        backbone, channels = row["backbone"], row["fpn_channels"]
        if backbone and backbone not in images:
            images[backbone] = milliseconds(backbone, int(channels))
            size = f"{SIZE[0]} x {SIZE[1]}"
            say(f"{backbone}, {channels} channels: {images[backbone]:.0f} ms of CPU for an image of {size}")
        points.append(Point(row["detector"], float(row["train_cpu_s"]), float(row["AP"]), images.get(backbone)))
    content = io.BytesIO()
    draw(points).savefig(content, format="png", dpi=110)
    write_whole(options.output, content.getvalue())


@torch.inference_mode()
def milliseconds(backbone: str, channels: int) -> float:
    head: dict[str, Any] = {"head_convs": 2, "head_norm": "group", "head_scales": True, "box_bins": 17}
    anchors: dict[str, Any] = {"levels": (3, 4, 5), "anchor_scales": (2.0,), "anchor_ratios": (1.0,)}
    model = retinanet(num_classes=3, backbone=backbone, fpn_channels=channels, **head, **anchors).eval()
    image = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    sizes = torch.tensor([SIZE])
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        postprocess(model(image, sizes), sizes)
        times.append(1000 * (time.process_time() - started))
    return min(times)


def draw(points: list[Point]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    training, inference = figure.subplots(1, 2, sharey=True)
    for point in points:
        (line,) = training.plot(point.training, point.ap, "o", label=point.label)
        if point.image is not None:
            inference.plot(point.image, point.ap, "o", color=line.get_color())
    training.set(xlabel="CPU seconds of training, start-up and evaluations included", ylabel="AP", xlim=(0, None))
    inference.set(xlabel=f"CPU milliseconds of an image, {SIZE[0]} x {SIZE[1]}", xlim=(0, None))
    training.set_ylim(0, None)
    training.legend(fontsize="small", loc="lower right")
    for axes in (training, inference):
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
