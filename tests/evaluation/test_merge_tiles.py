"""What the tiles of a data set show is put together as a single image's is."""

from pathlib import Path

import numpy as np
import torch

from retina.data.annotations import Annotations, offsets_of
from retina.data.tiled import tiles_of
from retina.data.windows import Tiling
from retina.evaluation.metrics import DetectionArrays
from retina.evaluation.tiles import merge_tiles
from retina.inference import detect_in_tiles
from retina.types import Detections

TILING = Tiling((64, 64), 0.4)


def scene(seed: int) -> np.ndarray:
    """Patches of 4 to 24 pixels, each of a colour of its own; they may touch and hide each other."""
    generator = np.random.default_rng(seed)
    image = np.zeros((int(generator.integers(40, 200)), int(generator.integers(70, 200)), 1), np.uint8)
    for colour in range(1, 12):
        height, width = generator.integers(4, 25, 2).tolist()
        y, x = int(generator.integers(0, image.shape[0] - height)), int(generator.integers(0, image.shape[1] - width))
        image[y : y + height, x : x + width] = colour
    return image


def find(image: np.ndarray) -> Detections:
    rows = []
    for colour in np.unique(image[image > 0]).tolist():
        y, x = np.nonzero(image[..., 0] == colour)
        rows.append([x.min(), y.min(), x.max() + 1, y.max() + 1, 0.9 - 0.01 * colour, colour % 2])
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def test_tiles_of_many_images_are_merged_as_those_of_one() -> None:
    images = [scene(seed) for seed in range(6)]
    images[2][:] = 0
    none = np.zeros(0)
    annotations = Annotations(
        file=Path("x.json"),
        image_root=Path(),
        classes=("even", "odd"),
        category_ids=(1, 2),
        image_ids=np.arange(6),
        sizes=np.array([image.shape[:2] for image in images]),
        offsets=offsets_of(np.zeros(6, np.int64)),
        boxes=np.zeros((0, 4)),
        labels=none.astype(np.int64),
        crowd=none.astype(bool),
        areas=none,
        names=np.frombuffer(b"abcdef", np.uint8),
        name_offsets=np.arange(7),
    )
    for nms_iou, agnostic in ((0.5, False), (0.3, True)):
        tiles = tiles_of(annotations, TILING)
        parts = []
        for row, (top, left, bottom, right) in zip(tiles.image_of.tolist(), tiles.windows.tolist(), strict=True):
            parts.append(find(images[row][top:bottom, left:right]))
        counts = [len(part.scores) for part in parts]
        boxes, scores, labels = (torch.cat(values).numpy() for values in zip(*parts, strict=True))
        arrays = DetectionArrays(
            np.repeat(np.arange(len(parts)), counts), boxes.astype(np.float64), scores.astype(np.float64), labels
        )
        rules = {"nms_iou": nms_iou, "class_agnostic": agnostic}
        merged = merge_tiles(arrays, tiles, score_threshold=0.05, **rules)
        assert (np.diff(merged.indices) >= 0).all()
        for row, image in enumerate(images):
            (expected,) = [detect_in_tiles(lambda batch: [find(one) for one in batch], image, TILING, **rules)]
            of_image = merged.indices == row
            np.testing.assert_allclose(merged.boxes[of_image], expected.boxes.numpy())
            np.testing.assert_allclose(merged.scores[of_image], expected.scores.numpy())
            assert merged.labels[of_image].tolist() == expected.labels.tolist()
    nothing = DetectionArrays(none.astype(np.int64), np.zeros((0, 4)), none, none.astype(np.int64))
    assert len(merge_tiles(nothing, tiles).scores) == 0
