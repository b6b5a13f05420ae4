"""Annotated images as samples, each a pure function of (seed, epoch, image)."""

from typing import SupportsIndex

import numpy as np
from torch.utils.data import Dataset

from retina.data.annotations import Annotations
from retina.data.images import MAX_PIXELS, read_reduced
from retina.data.transforms import Pipeline, Sample, stable_hash
from retina.errors import DataError, RetinaError


class CocoDetection(Dataset[Sample]):
    """Annotated images, each read and augmented when it is asked for.

        dataset = CocoDetection(read_coco(file, folder), pipeline)
        loader = DataLoader(dataset, batch_size=4, collate_fn=collate)

    A key is an index into the annotations, which is epoch 0, or (epoch, index), which `BatchLoader` uses because worker
    processes live through several epochs. The augmentation's seed is a hash of (seed, epoch, image id), so neither the
    workers nor a resumption change it. Of a key (epoch, index), `Sample.size` may ask for a resize that `collate`
    makes; of a plain index, all is done.

    Raises DataError if an image cannot be read, has more than `max_pixels`, is not of the size that its annotations
    state, or makes the pipeline fail; IndexError for an index outside.
    """

    def __init__(
        self, annotations: Annotations, pipeline: Pipeline, *, seed: int = 0, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.annotations, self.pipeline = annotations, pipeline
        self.seed, self.max_pixels = seed, max_pixels

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: SupportsIndex | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        seed = stable_hash(self.seed, epoch, self.annotations.image_ids[index].item())
        sample = self.sample(index, seed)
        try:
            transform = self.pipeline.without_last_resize if isinstance(key, tuple) else self.pipeline
            return transform(sample, seed)
        except RetinaError:  # the settings are at fault, not this image
            raise
        except Exception as error:  # transforms raise whatever they stumble over
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            problem = f"augment ({', '.join(self.pipeline.transforms)}) failed in epoch {epoch} ({reason})"
            fix = "remove the image, or correct that transform"
            file = self.annotations.path(index)
            raise DataError(f"{file}: {problem} - {fix}", code="failed-transform") from error

    def sample(self, index: int, seed: int) -> Sample:
        """What is augmented; `TileDetection` shows parts of images."""
        return self.read(index)

    def read(self, index: int) -> Sample:
        """The image and its objects as they are on disk, before any transform.

        Of a much larger image than the pipeline makes of it, `image` may be a smaller version (`read_reduced`);
        `original_size` and boxes are those of the file.
        """
        annotations = self.annotations
        image, size = read_reduced(
            annotations.path(index), self.pipeline.least_size, max_pixels=self.max_pixels, pixels=annotations.pixels
        )
        self.check_size(size, annotations, index)
        rows = slice(annotations.offsets[index], annotations.offsets[index + 1])
        return Sample(
            image=image,
            boxes=annotations.boxes[rows].astype(np.float32),
            labels=annotations.labels[rows],
            crowd=annotations.crowd[rows],
            index=index,
            original_size=size,
            size=size,
        )

    def check_size(self, size: tuple[int, int], annotations: Annotations, index: int) -> None:
        """Raises DataError for an image file that is not as large as its record in `annotations` states."""
        height, width = map(int, annotations.sizes[index])
        if size != (height, width):
            record = f"{annotations.file}: image id {annotations.image_ids[index]} ({annotations.file_name(index)})"
            problem = f"stated as {width}x{height}, but the file is {size[1]}x{size[0]} after EXIF rotation"
            fix = "correct the image's width, height and boxes"
            raise DataError(f"{record}: {problem} - {fix}", code="image-size")
