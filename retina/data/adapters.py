"""Transforms of other libraries, applied as our own are: the one place that knows how. Beside the road.

`augment` takes them by name; a library is loaded only when one of its transforms is used.
"""

import random
from typing import Any

import numpy as np
import torch

from retina.data.transforms import Boxes, Pixels, Transform, sides
from retina.errors import ConfigError


def adapt(transform: Any, name: str = "transform", *, min_size: float = 1.0, min_visibility: float = 0.1) -> Transform:
    """`transform` as one of ours. Raises ConfigError for what is no transform of a library known here.

    name: in `augment`. min_size, min_visibility: for transforms that drop boxes of their own accord."""
    libraries = {cls.__module__.partition(".")[0] for cls in type(transform).__mro__}
    if isinstance(transform, Transform):
        return transform
    if "albumentations" in libraries and hasattr(transform, "set_random_state"):
        return Albumentations(transform, min_size, min_visibility)
    if "torchvision" in libraries:
        from torchvision.transforms import v2

        if isinstance(transform, v2.Transform):
            flips = (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)
            return Torchvision(transform, keeps_sizes=isinstance(transform, flips))
    fix = "give one of retina.data.transforms, albumentations or torchvision.transforms.v2"
    problem = f"{name}: {type(transform).__name__} is no transform"
    raise ConfigError(f"{problem} - {fix}", code="augment", key="augment")


class Albumentations(Transform):
    """A transform of albumentations, or a composition such as `OneOf` or `Sequential`."""

    def __init__(self, transform: Any, min_size: float, min_visibility: float) -> None:
        import albumentations as A

        self.transform = transform
        self.scale_free = isinstance(transform, (A.HorizontalFlip, A.VerticalFlip))
        self.keeps_sizes = self.scale_free or isinstance(transform, A.ImageOnlyTransform)
        # Never called: it tells transforms that drop boxes of their own accord (dropout, OneOf) what to keep. NoOp is
        # there because Compose warns if none of its transforms knows boxes.
        A.Compose(
            [transform, A.NoOp(p=0)],
            bbox_params=A.BboxParams(
                format="pascal_voc", min_width=min_size, min_height=min_size, min_visibility=min_visibility
            ),
        )

    def __call__(self, image: Pixels, boxes: Boxes, seed: int) -> tuple[Any, Any]:  # `Pipeline` checks what comes out
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self.transform(image=image, bboxes=boxes)
        return result["image"], result["bboxes"]


class Torchvision(Transform):
    """A transform of torchvision.transforms.v2, or a composition such as `Compose` or `RandomApply`.

    Its numbers come from torch's global generator, which is seeded for the call and left as it was. Boxes are its
    `BoundingBoxes`; where it drops some (`SanitizeBoundingBoxes`), their rows, as its labels, go with them."""

    def __init__(self, transform: Any, *, keeps_sizes: bool) -> None:
        self.transform = transform
        self.keeps_sizes = self.scale_free = keeps_sizes

    def __call__(self, image: Pixels, boxes: Boxes, seed: int) -> tuple[Any, Any]:  # `Pipeline` checks what comes out
        from torchvision import tv_tensors

        size = image.shape[:2]
        corners = torch.from_numpy(boxes[:, :4] * sides(size))
        sample = {
            "image": tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)),
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(boxes[:, 4].copy()),
        }
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            sample = self.transform(sample)
        finally:
            torch.set_rng_state(state)
        image = sample["image"].permute(1, 2, 0).numpy()
        corners = sample["boxes"].numpy() / sides(image.shape[:2])
        return image, np.concatenate([corners, sample["labels"].numpy()[:, None]], axis=1)
