"""Annotated images as samples, each a pure function of (seed, epoch, image)."""

import numpy as np
from torch.utils.data import Dataset

from retina.data.coco import Annotations
from retina.data.images import MAX_PIXELS, read_reduced
from retina.data.transforms import Pipeline, Sample, stable_hash
from retina.errors import DataError, RetinaError


class DetectionDataset(Dataset[Sample]):
    """Reads and augments one image at a time; its keys are (epoch, index into the annotations).

    The augmentation's seed is a hash of (seed, epoch, image id): how many workers there are, in which order they
    work and where a run was resumed change nothing. The key carries the epoch, so that worker processes that live
    through several epochs need not be told of them.

    Raises DataError if an image cannot be read, has more than `max_pixels`, is not of the size that its annotations
    state, or makes the pipeline fail.
    """

    def __init__(
        self, annotations: Annotations, pipeline: Pipeline, *, seed: int, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.annotations = annotations
        self.pipeline = pipeline
        self.seed = seed
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = self.read(index)
        try:
            seed = stable_hash(self.seed, epoch, int(self.annotations.image_ids[index]))
            return self.pipeline.without_last_resize(sample, seed)  # collate does it
        except RetinaError:  # the settings are at fault, not this image
            raise
        except Exception as error:  # transforms raise whatever they stumble over
            names = ", ".join(self.pipeline.transforms)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise DataError(
                f"{self.annotations.path(index)}: augment ({names}) failed in epoch {epoch} ({reason})"
                " - remove the image, or correct that transform"
            ) from error

    def read(self, index: int) -> Sample:
        """The image and its objects as they are on disk, before any transform.

        Of a much larger image than the pipeline makes of it, `image` may be a smaller version (`read_reduced`);
        `original_size` and boxes are those of the file.
        """
        known = self.annotations
        image, (height, width) = read_reduced(known.path(index), self.pipeline.least_size, max_pixels=self.max_pixels)
        stated_height, stated_width = map(int, known.sizes[index])
        if (height, width) != (stated_height, stated_width):
            raise DataError(
                f"{known.file}: image id {known.image_ids[index]} ({known.file_name(index)}): stated as"
                f" {stated_width}x{stated_height}, but the file is {width}x{height} after EXIF rotation"
                " - correct the image's width, height and boxes"
            )
        rows = slice(known.offsets[index], known.offsets[index + 1])
        return Sample(
            image=image,
            boxes=known.boxes[rows].astype(np.float32),
            labels=known.labels[rows],
            crowd=known.crowd[rows],
            index=index,
            original_size=(height, width),
            size=(height, width),
        )
