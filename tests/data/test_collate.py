import numpy as np
import pytest
import torch

from faults import refused
from retina.data.loader import Canvas, collate
from retina.data.transforms import Sample, resize
from retina.errors import ConfigError

PAD = (124, 116, 104)


def make_sample(height, width, num_objects, *, crowd=(), index=0):
    rng = np.random.default_rng(height * 1000 + width)
    flags = np.zeros(num_objects, dtype=bool)
    flags[list(crowd)] = True
    return Sample(
        image=rng.integers(0, 255, (height, width, 3), dtype=np.uint8),
        boxes=rng.uniform(0, 10, (num_objects, 4)).astype(np.float32),
        labels=rng.integers(1, 9, num_objects),
        crowd=flags,
        index=index,
        original_size=(height * 2, width * 2),
    )


def test_content_is_top_left_and_the_rest_padding():
    samples = [make_sample(20, 30, 1, index=7), make_sample(33, 17, 1, index=4)]
    batch = collate(samples, Canvas(32, PAD))
    assert batch.images.shape == (2, 3, 64, 32)
    assert batch.images.dtype == torch.uint8
    for image, sample in zip(batch.images.permute(0, 2, 3, 1).numpy(), samples, strict=True):
        height, width = sample.image.shape[:2]
        np.testing.assert_array_equal(image[:height, :width], sample.image)
        assert (image[height:] == PAD).all()
        assert (image[:, width:] == PAD).all()
    assert batch.sizes.tolist() == [[20, 30], [33, 17]]
    assert batch.original_sizes.tolist() == [[40, 60], [66, 34]]
    assert batch.indices.tolist() == [7, 4]
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(48, 66), (10, 15), (20, 30), (1, 1)])
def test_what_is_still_to_be_resized_is_resized_onto_the_canvas(size):
    samples = [make_sample(20, 30, 1)._replace(size=size), make_sample(33, 17, 1)]
    batch = collate(samples, Canvas(32, PAD))
    images = batch.images.permute(0, 2, 3, 1).numpy()
    height, width = size
    np.testing.assert_array_equal(images[0, :height, :width], resize(samples[0].image, size))
    assert (images[0, height:] == PAD).all()
    assert (images[0, :, width:] == PAD).all()
    np.testing.assert_array_equal(images[1, :33, :17], samples[1].image)
    assert batch.sizes.tolist() == [[height, width], [33, 17]]
    assert batch.original_sizes.tolist() == [[40, 60], [66, 34]]


def test_shared_memory_holds_the_same():
    samples = [make_sample(20, 30, 1)._replace(size=(40, 60)), make_sample(33, 17, 1)]
    ours, plain = (collate(samples, Canvas(32, PAD), shared=shared).images for shared in (True, False))
    assert (ours.is_shared(), plain.is_shared()) == (True, False)
    assert torch.equal(ours, plain)
    assert ours.stride() == plain.stride()


def test_targets_are_padded_to_the_largest_count():
    samples = [make_sample(8, 8, 3, crowd=[1]), make_sample(8, 9, 0), make_sample(9, 8, 1)]
    targets = collate(samples, Canvas(1, PAD)).targets
    assert targets.valid.tolist() == [[True, False, True], [False] * 3, [True, False, False]]
    assert targets.crowd.tolist() == [[False, True, False], [False] * 3, [False] * 3]
    assert targets.boxes.dtype == torch.float32
    assert targets.labels.dtype == torch.int64
    np.testing.assert_array_equal(targets.boxes[0], samples[0].boxes)
    np.testing.assert_array_equal(targets.labels[2, :1], samples[2].labels)
    assert targets.boxes[1].abs().sum() == targets.boxes[2, 1:].abs().sum() == 0
    assert targets.labels[1].sum() == targets.labels[2, 1:].sum() == 0


def test_a_batch_without_objects_has_none():
    targets = collate([make_sample(8, 8, 0), make_sample(8, 8, 0)], Canvas(4, PAD)).targets
    assert targets.boxes.shape == (2, 0, 4)
    assert targets.labels.shape == targets.valid.shape == targets.crowd.shape == (2, 0)


def test_only_crowd():
    targets = collate([make_sample(8, 8, 2, crowd=[0, 1])], Canvas(4, PAD)).targets
    assert targets.valid.tolist() == [[False, False]]
    assert targets.crowd.tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(20, 30)], (48, 32)),  # both fit: the first
        ([(32, 48)], (32, 48)),
        ([(33, 30)], (48, 32)),
        ([(20, 40), (40, 20)], (64, 64)),
    ],
)
def test_smallest_canvas_that_fits(sizes, expected):
    canvases = [(64, 64), (48, 32), (32, 48)]
    batch = collate([make_sample(h, w, 0) for h, w in sizes], Canvas(16, PAD, canvases))
    assert batch.images.shape[2:] == expected


def test_faulty_calls_are_refused():
    samples = [make_sample(70, 20, 0), make_sample(10, 90, 0)]
    with refused("canvas", "canvases: ", "64x96, 96x64", "70x90", kind=ConfigError):
        collate(samples, Canvas(16, PAD, [(64, 96), (96, 64)]))
    with refused("canvas", "canvases: 80x80", "32", kind=ConfigError):
        Canvas(32, PAD, [(80, 80)])
    with pytest.raises(ValueError, match="at least one"):
        collate([], Canvas(32, PAD))
