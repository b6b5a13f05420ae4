"""Large images in overlapping tiles: each is looked at alone, and what they found is put together. Beside the road.

An object that the edge of a tile cuts is whole in a neighbour if it is no larger than the overlap. So detections that
touch an edge inside the image count only where no whole one covers them, and the same object, seen by several tiles,
counts once."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torchvision.ops import batched_nms

from retina.data.images import MAX_PIXELS, read_image
from retina.data.transforms import Sample
from retina.data.windows import Tiling
from retina.inference import Detector, ImageLike, listed
from retina.ops.boxes import box_area, pairwise_intersection
from retina.types import Detections

Image = UInt8[np.ndarray, "H W C"]
Predict = Callable[[Sequence[Image]], Sequence[Detections]]

_AT_EDGE = 0.01
"""Of a tile's side: a box that comes so near to an edge is taken for cut, because boxes are not exact."""
_SAME = 0.5
"""Of the smaller of two boxes, of which one is cut: so much in common, and they are one object."""


def detect_in_tiles(
    predict: Predict,
    image: Image,
    tiling: Tiling,
    *,
    nms_iou: float = 0.5,
    class_agnostic: bool = False,
    batch_size: int = 8,
) -> Detections:
    """Detections of a large image, best first, boxes in its pixels. At most `batch_size` tiles are in memory.

    predict: finds objects in images, such as `Detector.predict`."""
    size = image.shape[0], image.shape[1]
    parts: list[Detections] = []
    cut: list[Bool[Tensor, "D"]] = []
    windows = iter(tiling.windows(size))
    while batch := list(islice(windows, batch_size)):
        tiles = [image[top:bottom, left:right] for top, left, bottom, right in batch]
        for window, part in zip(batch, predict(tiles), strict=True):
            corner = part.boxes.new_tensor([window[1], window[0]] * 2)
            parts.append(part._replace(boxes=part.boxes + corner))
            cut.append(_is_cut(part.boxes, window, size))
    if tiling.whole:
        (part,) = predict([image])
        parts.append(part)
        cut.append(torch.zeros(len(part.scores), dtype=torch.bool))
    detections = Detections(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    return merge(detections, torch.cat(cut), nms_iou=nms_iou, class_agnostic=class_agnostic)


def _is_cut(boxes: Float[Tensor, "D 4"], window: tuple[int, int, int, int], size: tuple[int, int]) -> Bool[Tensor, "D"]:
    """Whether boxes, in pixels of their tile, come near to an edge of it that is not the image's."""
    top, left, bottom, right = window
    height, width = bottom - top, right - left
    near_y, near_x = max(1.0, _AT_EDGE * height), max(1.0, _AT_EDGE * width)
    cut = torch.zeros(len(boxes), dtype=torch.bool)
    for inside, reaches in (
        (left > 0, boxes[:, 0] <= near_x),
        (top > 0, boxes[:, 1] <= near_y),
        (right < size[1], boxes[:, 2] >= width - near_x),
        (bottom < size[0], boxes[:, 3] >= height - near_y),
    ):
        cut |= reaches if inside else False
    return cut


def merge(
    detections: Detections, cut: Bool[Tensor, "D"], *, nms_iou: float, class_agnostic: bool = False
) -> Detections:
    """One detection of each object, best first. Whole ones suppress each other as in `postprocess`; a cut one stays
    only where no better one of its class covers half of the smaller of both."""
    boxes, scores, labels = detections
    groups = torch.zeros_like(labels) if class_agnostic else labels
    whole = (~cut).nonzero().squeeze(1)
    kept = whole[batched_nms(boxes[whole].double(), scores[whole].double(), groups[whole], nms_iou)]
    areas = box_area(boxes)
    stays = torch.zeros_like(cut).index_fill(0, kept, True)
    pieces = cut.nonzero().squeeze(1)
    for row in pieces[scores[pieces].argsort(descending=True, stable=True)].tolist():
        others = (stays & (groups == groups[row])).nonzero().squeeze(1)
        shared = pairwise_intersection(boxes[row : row + 1], boxes[others])[0]
        stays[row] = not (shared > _SAME * torch.minimum(areas[row], areas[others])).any()
    chosen = stays.nonzero().squeeze(1)
    chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
    return Detections(boxes[chosen], scores[chosen], labels[chosen])


class TiledDetector(Detector):
    """A detector that looks at large images in tiles; otherwise used as `Detector` is."""

    def __init__(self, detector: Detector, tiling: Tiling) -> None:
        """Raises ConfigError for tiles out of range."""
        tiling.check()
        self.__dict__.update(detector.__dict__)
        self.tiling = tiling

    def read(self, image: object, max_pixels: int = MAX_PIXELS) -> Sample:
        """An image with all its pixels. Raises as `Detector.read` does."""
        if isinstance(image, (str, Path)):
            image = read_image(Path(image).expanduser(), max_pixels=max_pixels, pixels=self.pixels)
        return super().read(image)

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        score_threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Detections]:
        """As `Detector.predict`; of each image as many as its tiles have together, not `max_detections` alone."""
        options = self.card.postprocess
        rules = {"nms_iou": options.get("nms_iou", 0.5), "class_agnostic": options.get("class_agnostic", False)}
        in_tiles = partial(super().predict, score_threshold=score_threshold, batch_size=batch_size)

        def look(image: ImageLike) -> Detections:
            array = self.read(image, max_pixels).image
            return detect_in_tiles(in_tiles, array, self.tiling, batch_size=batch_size, **rules)

        return [look(image) for image in listed(images)]
