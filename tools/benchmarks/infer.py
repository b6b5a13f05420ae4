"""What tools/infer.py does beside the device: it reads, and it draws, while the device looks at other images.

The detector finds nothing and takes no time, so images per second are those of the host, against the evaluation's
loader in this process: the same photographs, pixels and batches. Then the detector takes as long as the reading (it
sleeps, as a process does that waits for a GPU), in wall time: done in turn, both together would take 1."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import torch
from torch import Tensor

from benchmarks.loader import LONG_SIDE, SHORT_SIDE, write_photos
from retina.cli.infer import InferConfig
from retina.cli.journal import STATE, cut_batches
from retina.cli.looking import look
from retina.cli.outputs import Writer
from retina.cli.sources import find_images, name_sources
from retina.data.loader import Canvas, eval_loader
from retina.data.transforms import eval_pipeline
from retina.files import make_folder, remove
from retina.inference import Detector
from retina.lab.clock import Bench, Row, absolute, speedup
from retina.model.retinanet import retinanet
from retina.model.weights import DetectorCard
from retina.types import Batch, Detections
from retina.visualize import AS_IT_FITS

PAD_VALUE, BATCH_SIZE = (124, 116, 104), 8


class Blind(Detector):
    """Finds nothing, after some seconds, in images that it keeps."""

    seconds = 0.0
    seen: list[Tensor] | None = None

    def detect(self, batch: Batch, options: Any) -> list[Detections]:
        time.sleep(self.seconds)
        if self.seen is not None:
            self.seen.append(batch.images)
        none = torch.zeros(0)
        return [Detections(none.reshape(0, 4), none, none.long())] * len(batch.images)


def run(bench: Bench) -> list[Row]:
    cv2.setNumThreads(0)
    with TemporaryDirectory() as place:
        photos = write_photos(Path(place, "photos"), 2 if bench.quick else 64, 480, 640)
        (Path(place, "photos", "instances.json")).unlink()
        detector, infer = blind(), inference(Path(place))
        canvas = Canvas(32, PAD_VALUE)
        order = sorted(range(len(photos)), key=photos.file_name)

        def load() -> Iterator[Batch]:
            return iter(eval_loader(photos, eval_pipeline(SHORT_SIDE, LONG_SIDE), batch_size=BATCH_SIZE, canvas=canvas))

        detector.seen = []
        infer(detector, False)
        ours = [image for batch in detector.seen for image in batch]
        theirs = {
            index: image for batch in load() for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
        }
        assert all(image.equal(theirs[index]) for index, image in zip(order, ours, strict=True))
        detector.seen = None

        ways: dict[str, Callable[[], object]] = {
            "loader": lambda: [None for _ in load()],
            "infer": lambda: infer(detector, False),
            "pictures": lambda: infer(detector, True),
        }
        times = bench.time(ways)
        overlap = overlapping(detector, infer, len(photos), bench.rounds)
    rows = [
        speedup(
            "infer without its detector / loader", {"ours": times["infer"], "reference": times["loader"]}, must=0.9
        ),
        speedup(
            "infer without its detector, with pictures / loader",
            {"ours": times["pictures"], "reference": times["loader"]},
        ),
    ]
    return [*(in_images(row, len(photos)) for row in rows), overlap]


def blind() -> Blind:
    model = retinanet(num_classes=1, backbone="resnet18", levels=[5], fpn_channels=16, head_convs=1)
    preprocessing = {"short_side": SHORT_SIDE, "long_side": LONG_SIDE, "pad_multiple": 32, "pad_value": [*PAD_VALUE]}
    preprocessing |= {"precision": "fp32", "batch_size": BATCH_SIZE}
    card = DetectorCard(
        model=model.arguments, classes=["it"], category_ids=[1], preprocessing=preprocessing, postprocess={}
    )
    return Blind(model, card, device=torch.device("cpu"), file=Path("none"))


def inference(place: Path) -> Callable[[Blind, bool], None]:
    """Looks at all photographs."""
    output = place / "out"
    base = InferConfig(
        checkpoint="",
        source=str(place / "photos"),
        output=str(output),
        score_threshold=0.3,
        batch_size=BATCH_SIZE,
        max_pixels=10**8,
        timeout=600.0,
        device="cpu",
        precision=None,
        short_side=None,
        long_side=None,
        nms_iou=None,
        class_agnostic=None,
        classes=None,
        pictures=False,
        label="name_score",
        font=None,
        font_size=None,
        line_width=None,
        crops=False,
        json_lines=False,
        every=1,
        prelabels=[],
        tile=None,
        tile_overlap=0.25,
        tile_whole=False,
        plugins=[],
        traceback=False,
    )
    batches = cut_batches(name_sources(*find_images(base.source, output)), BATCH_SIZE, {})

    def infer(detector: Blind, pictures: bool) -> None:
        make_folder(output / STATE)
        config = replace(base, pictures=pictures)
        writer = Writer(output, config.wanted, AS_IT_FITS, config.max_pixels)
        done = [*look(detector, batches, config, writer, 0)]
        assert sum(len(one.records) for one in done) == sum(len(batch.sources) for batch in batches)
        remove(output)

    return infer


def overlapping(detector: Blind, infer: Callable[[Blind, bool], None], num: int, rounds: int) -> Row:
    """Wall time where the detector takes as long as the reading, in units of both."""
    detector.seconds = 0.0
    reading = median(seconds_of(infer, detector) for _ in range(rounds))
    detector.seconds = reading / -(-num // BATCH_SIZE)
    together = median(seconds_of(infer, detector) for _ in range(rounds))
    return absolute(
        "infer with a device that takes as long as reading: wall time / both in turn", together / (2 * reading), ""
    )


def seconds_of(infer: Callable[[Blind, bool], None], detector: Blind) -> float:
    begin = time.perf_counter()
    infer(detector, False)
    return time.perf_counter() - begin


def in_images(row: Row, num: int) -> Row:
    assert row.reference
    return replace(row, ours=1000 * num / row.ours, reference=1000 * num / row.reference, unit="images/s")
