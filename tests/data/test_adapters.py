"""Transforms of torchvision: functions of the seed, boxes in step with pixels, and nothing of torch's state used up."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from faults import refused
from retina.cli.build import build
from retina.data.adapters import adapt
from retina.data.coco import read_coco
from retina.data.layouts import locate_split
from retina.data.loader import Canvas, LoaderConfig, train_loader
from retina.data.shapes import write_shapes
from retina.data.transforms import HorizontalFlip, Pipeline, ResizeShortSide, Sample
from retina.types import Batch

NUM_OBJECTS = 6


def a_sample(seed: int = 0, num_objects: int = NUM_OBJECTS) -> Sample:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (num_objects, 2, 2)), axis=1) * (60, 40)
    return Sample(
        image=rng.integers(0, 256, (40, 60, 3), dtype=np.uint8),
        boxes=corners.reshape(-1, 4).astype(np.float32),
        labels=np.arange(num_objects),
        crowd=np.arange(num_objects) % 2 == 1,
        index=0,
        original_size=(40, 60),
    )


def test_a_flip_is_ours_to_the_bit() -> None:
    sample = a_sample()
    ours, theirs = (Pipeline({"flip": flip})(sample, 5) for flip in (HorizontalFlip(1.0), v2.RandomHorizontalFlip(1.0)))
    np.testing.assert_array_equal(theirs.image, ours.image)
    np.testing.assert_allclose(theirs.boxes, ours.boxes, rtol=0, atol=1e-4)
    assert theirs.labels.tolist() == ours.labels.tolist()


def test_half_of_the_images_are_flipped_by_their_seed_alone() -> None:
    pipeline = Pipeline({"flip": v2.RandomHorizontalFlip(0.5)})
    sample = a_sample()
    flipped = [not np.array_equal(pipeline(sample, seed).image, sample.image) for seed in range(200)]
    assert 70 < sum(flipped) < 130
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert flipped == [not np.array_equal(pipeline(sample, seed).image, sample.image) for seed in range(200)]
    assert torch.equal(torch.get_rng_state(), before)


def test_boxes_follow_a_crop_and_dropped_ones_take_their_labels_along() -> None:
    sample = a_sample(3)
    crop = v2.Compose([v2.RandomCrop((20, 30)), v2.SanitizeBoundingBoxes(min_size=2)])
    cropped = Pipeline({"crop": crop})(sample, 1)
    assert cropped.image.shape == (20, 30, 3)
    top, left = next(
        (y, x)
        for y in range(21)
        for x in range(31)
        if np.array_equal(sample.image[y : y + 20, x : x + 30], cropped.image)
    )
    assert 0 < len(cropped.labels) < NUM_OBJECTS
    for box, label, crowd in zip(cropped.boxes, cropped.labels, cropped.crowd, strict=True):
        expected = (sample.boxes[label] - (left, top, left, top)).clip(0, (30, 20, 30, 20))
        np.testing.assert_allclose(box, expected, atol=1e-4)
        assert crowd == sample.crowd[label]


def test_images_without_objects_pass() -> None:
    result = Pipeline({"flip": v2.RandomHorizontalFlip(1.0), "crop": v2.CenterCrop(20)})(a_sample(num_objects=0), 1)
    assert (result.image.shape, result.boxes.shape) == ((20, 20, 3), (0, 4))


@pytest.mark.parametrize("transform", [torch.nn.Identity(), v2.functional.hflip, object()])
def test_what_is_no_transform_is_refused(transform: object) -> None:
    with refused("augment", "augment: "):
        adapt(transform)


def test_conversions_are_refused() -> None:
    with refused("augment", "float32"):
        Pipeline({"float": v2.ToDtype(torch.float32, scale=True)})(a_sample(), 1)


def test_loading_with_a_flip_of_torchvision_is_exactly_reproducible(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", num_train=12, num_val=1, image_size=(64, 96))
    annotations = read_coco(*locate_split(tmp_path / "shapes", "train"))
    section = {"_target_": "torchvision.transforms.v2.RandomHorizontalFlip", "p": 0.5}

    def batches(num_workers: int, *, begin: tuple[int, int] = (0, 0)) -> list[Batch]:
        pipeline = Pipeline({"flip": build(section, "augment.flip"), "resize": ResizeShortSide(64)})
        config = LoaderConfig(num_workers=num_workers)
        loader = train_loader(annotations, pipeline, batch_size=4, seed=3, canvas=Canvas(32), config=config)
        torch.manual_seed(num_workers + begin[1])  # must not matter
        found = []
        for epoch in range(begin[0], 2):
            loader.batch_sampler.start(epoch, begin[1] if epoch == begin[0] else 0)  # type: ignore[union-attr]
            found += list(loader)
        return found

    whole = batches(0)
    for again, rest in ((batches(2), whole), (batches(0, begin=(1, 1)), whole[4:])):
        assert len(again) == len(rest)
        for one, other in zip(again, rest, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.targets.boxes, other.targets.boxes)
    resize = Pipeline({"resize": ResizeShortSide(64)})
    plain = [batch.images for batch in train_loader(annotations, resize, batch_size=4, seed=3, canvas=Canvas(32))]
    assert not all(torch.equal(one.images, image) for one, image in zip(whole[:3], plain, strict=True))
