"""Detections of images with an exported detector: numpy, Pillow and onnxruntime, nothing else.

python examples/onnx_only.py model.onnx a.jpg b.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BATCH = 8


def detect(session: onnxruntime.InferenceSession, files: list[str]) -> list[np.ndarray]:
    """Of each image the detections [D 6], best first: x1, y1, x2, y2 in its pixels, score, label."""
    images = [np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")) for file in files]
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    canvas = np.zeros((len(images), *sizes.max(axis=0), 3), dtype=np.uint8)  # images may differ in size
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    detections, counts = session.run(None, {"images": canvas, "sizes": sizes})
    return [table[:count] for table, count in zip(detections, counts, strict=True)]


def main(model: str, files: list[str]) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    classes = json.loads(session.get_modelmeta().custom_metadata_map["retina"])["classes"]
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        for file, table in zip(batch, detect(session, batch), strict=True):
            for *box, score, label in table.tolist():
                print(file, classes[int(label)], f"{score:.4f}", *(f"{side:.2f}" for side in box))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
