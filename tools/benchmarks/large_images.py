"""Detections of large images three ways, with the same weights: shrunk as a whole, in tiles, and by sahi's slices.

python tools/benchmarks/large_images.py paste --data data/shapes --output out/canvases        # makes large images
python tools/benchmarks/large_images.py measure --checkpoint runs/shapes --data out/canvases --tile 128 160

`paste` lays the images of a val split out edge to edge on large canvases, so that objects are as large as the detector
knows them. `measure` prints AP, AP for small objects, recall, objects found and seconds for
each image; sahi is left out where it is not installed. Scores are not cut off but for `--score`, the same for all.
"""

import argparse
import io
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import retina
from retina.data.coco import read_coco
from retina.data.images import read_image
from retina.data.layouts import locate_split
from retina.data.windows import Tiling
from retina.evaluation.metrics import DetectionArrays, Scoring, coco_metrics
from retina.files import make_folder, write_whole
from retina.printing import say

ROOT = Path(__file__).parents[2]
Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Boxes [D 4], scores [D], labels [D]."""


def main(typed: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="large images, whole and in parts")
    commands = parser.add_subparsers(dest="command", required=True)
    paste = commands.add_parser("paste")
    paste.add_argument("--data", type=Path, required=True)
    paste.add_argument("--output", type=Path, required=True)
    paste.add_argument("--images", type=int, default=4, help="canvases")
    paste.add_argument("--side", type=int, default=5, help="of a canvas, in images")
    measure = commands.add_parser("measure")
    measure.add_argument("--checkpoint", required=True)
    measure.add_argument("--data", type=Path, required=True)
    measure.add_argument("--tile", type=int, nargs=2, required=True)
    measure.add_argument("--overlap", type=float, default=0.25)
    measure.add_argument("--score", type=float, default=0.05)
    measure.add_argument("--max-dets", type=int, default=1000)
    options = parser.parse_args(typed)
    torch.set_num_threads(1)
    write_canvases(options) if options.command == "paste" else compare(options)


def write_canvases(options: Any) -> None:
    """A data set in COCO's layout with a val split."""
    source = read_coco(*locate_split(options.data, "val"))
    order = iter(np.random.default_rng(0).permutation(len(source)).tolist())
    images, annotations = [], []
    make_folder(options.output / "val")
    make_folder(options.output / "annotations")
    sizes, counts = np.unique(source.sizes, axis=0, return_counts=True)
    height, width = sizes[counts.argmax()].tolist()  # of most images; others are left out
    side = options.side
    for number in range(options.images):
        canvas = np.full((side * height, side * width, 3), 116, np.uint8)
        for place in range(side * side):
            row = next((row for row in order if source.sizes[row].tolist() == [height, width]), None)
            if row is None:
                continue
            y, x = place // side * height, place % side * width
            canvas[y : y + height, x : x + width] = read_image(source.path(row))
            for object_row in range(source.offsets[row], source.offsets[row + 1]):
                x1, y1, x2, y2 = source.boxes[object_row].tolist()
                box = [x + x1, y + y1, x2 - x1, y2 - y1]
                annotations.append({"image_id": number, "category_id": int(source.labels[object_row]) + 1, "bbox": box})
        content = io.BytesIO()
        Image.fromarray(canvas).save(content, "PNG")
        write_whole(options.output / "val" / f"{number}.png", content.getvalue())
        images.append({"id": number, "file_name": f"{number}.png", "width": side * width, "height": side * height})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(source.classes)]
    values = {"images": images, "annotations": annotations, "categories": categories}
    write_whole(options.output / "annotations" / "instances_val.json", json.dumps(values).encode())
    say(f"{len(images)} canvases of {side} x {side} images with {len(annotations)} objects: {options.output}")


def compare(options: Any) -> None:
    detector = retina.load(options.checkpoint, device="cpu", precision="fp32")
    annotations = read_coco(*locate_split(options.data, "val"), classes=detector.classes)
    tiling = Tiling((*options.tile,), options.overlap)
    ways: dict[str, Callable[[np.ndarray], Found]] = {
        "whole": partial(look, detector.in_tiles(None), options.score),
        "tiles": partial(look, detector.in_tiles(tiling), options.score),
    }
    try:
        ways["sahi"] = sliced(detector.in_tiles(None), options)
    except ImportError:
        say("sahi is not installed", error=True)
    say(f"{'':8}{'AP':>8}{'AP50':>8}{'APs':>8}{'AR':>8}{'found':>8}{'s/image':>9}")
    for name, way in ways.items():
        found, seconds = [], 0.0
        for row in range(len(annotations)):
            image = read_image(annotations.path(row))
            begin = time.process_time()
            found.append(way(image))
            seconds += time.process_time() - begin
        counts = [len(scores) for _, scores, _ in found]
        columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
        arrays = DetectionArrays(np.repeat(np.arange(len(found)), counts), *columns)
        scores = coco_metrics(annotations, arrays, Scoring(max_dets=options.max_dets))
        keys = ("AP", "AP50", "APs", f"AR{options.max_dets}")
        shown = "".join(f"{'-' if scores[key] is None else format(scores[key], '.3f'):>8}" for key in keys)
        say(f"{name:8}{shown}{sum(counts):>8}{seconds / len(found):>9.2f}")


def look(detector: retina.Detector, score: float, image: np.ndarray) -> Found:
    (found,) = detector.predict(image, score_threshold=score)
    return found.boxes.double().numpy(), found.scores.double().numpy(), found.labels.numpy()


def sliced(detector: retina.Detector, options: Any) -> Callable[[np.ndarray], Found]:
    """By the adapter of docs/adapters.md, with sahi's own way of putting slices together (GREEDYNMM)."""
    from sahi.predict import get_sliced_prediction

    page = (ROOT / "docs" / "adapters.md").read_text().split("## sahi\n")[1]
    match = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert match
    names: dict[str, Any] = {}
    exec(compile(match[1], "docs/adapters.md", "exec"), names)
    model = names["RetinaModel"](model=detector, confidence_threshold=options.score, device="cpu")
    height, width = options.tile
    ratios = {"overlap_height_ratio": options.overlap, "overlap_width_ratio": options.overlap}

    def find(image: np.ndarray) -> Found:
        result = get_sliced_prediction(
            image,
            model,
            slice_height=height,
            slice_width=width,
            perform_standard_pred=False,
            postprocess_class_agnostic=False,
            verbose=0,
            **ratios,
        )
        rows = [(*one.bbox.to_xyxy(), one.score.value, one.category.id) for one in result.object_prediction_list]
        table = np.array(rows, np.float64).reshape(-1, 6)
        table = table[np.argsort(-table[:, 4], kind="stable")]
        return table[:, :4], table[:, 4], table[:, 5].astype(np.int64)

    return find


if __name__ == "__main__":
    main()
