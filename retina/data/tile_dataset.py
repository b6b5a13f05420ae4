"""Parts of annotated images as samples: the crops of training, and the tiles of evaluation. Beside the road."""

from typing import Any

from retina.data.annotations import Annotations
from retina.data.dataset import CocoDetection
from retina.data.regions import RegionReader
from retina.data.tiled import Crops, TiledAnnotations, objects_inside
from retina.data.transforms import Pipeline, Sample, stable_hash
from retina.data.windows import Window


def dataset_of(
    annotations: Annotations, pipeline: Pipeline, *, crops: Crops | None = None, **options: Any
) -> CocoDetection:
    """The samples of whole images, of `TiledAnnotations`, or of `crops`; options are those of `CocoDetection`."""
    if crops or isinstance(annotations, TiledAnnotations):
        return TileDetection(annotations, pipeline, crops=crops, **options)
    return CocoDetection(annotations, pipeline, **options)


class TileDetection(CocoDetection):
    """Of each image a window: that of its record in `TiledAnnotations`, or one that `crops` draws from the sample's
    seed. `Sample.original_size` and boxes are those of the window."""

    def __init__(self, annotations: Annotations, pipeline: Pipeline, *, crops: Crops | None, **options: Any) -> None:
        super().__init__(annotations, pipeline, **options)
        self.crops = crops
        self._parts = RegionReader(self.max_pixels, annotations.pixels)

    def sample(self, index: int, seed: int) -> Sample:
        annotations = self.annotations
        rows = slice(annotations.offsets[index], annotations.offsets[index + 1])
        boxes, labels, crowd = annotations.boxes[rows], annotations.labels[rows], annotations.crowd[rows]
        if isinstance(annotations, TiledAnnotations):
            top, left, bottom, right = annotations.windows[index].tolist()
            image = self._read(index, (top, left, bottom, right), annotations.images, int(annotations.image_of[index]))
        else:
            assert self.crops is not None
            height, width = annotations.sizes[index].tolist()
            window = self.crops.window((height, width), boxes[~crowd], stable_hash(seed, "crop"))
            image = self._read(index, window, annotations, index)
            inside = objects_inside(boxes, crowd, window)
            boxes, labels, crowd = inside.boxes, labels[inside.rows], inside.crowd
        size = image.shape[0], image.shape[1]
        return Sample(image, boxes.astype("float32"), labels, crowd, index, original_size=size, size=size)

    def _read(self, index: int, window: Window, images: Annotations, row: int) -> Any:
        image, size = self._parts(self.annotations.path(index), window)
        self.check_size(size, images, row)
        return image
