import random

import albumentations as A
import numpy as np
import pytest

from faults import refused
from retina.data.transforms import (
    ColorJitter,
    HorizontalFlip,
    LargeScaleJitter,
    Pipeline,
    ResizeShortSide,
    Sample,
    Transform,
    VerticalFlip,
    eval_pipeline,
    resize,
    stable_hash,
)
from retina.errors import ConfigError

RED = (255, 0, 0)


def make_sample(height, width, boxes=(), crowd=None):
    """A grey image with every box painted red."""
    image = np.full((height, width, 3), 90, dtype=np.uint8)
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    for x1, y1, x2, y2 in boxes.round().astype(int):
        image[max(y1, 0) : y2, max(x1, 0) : x2] = RED
    crowd = np.zeros(len(boxes), dtype=bool) if crowd is None else np.array(crowd)
    return Sample(image, boxes, np.arange(len(boxes)) + 5, crowd, index=3, original_size=(height, width))


def find_red(image):
    """Box around the pixels that are more red than grey."""
    red = image[:, :, 0].astype(int) - image[:, :, 1] > 82
    ys, xs = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])


@pytest.mark.parametrize(
    ("size", "short_side", "long_side", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((500, 1000), 800, 1333, (667, 1333)),  # the cap decides
        ((500, 1000), 800, None, (800, 1600)),
        ((512, 512), 512, 512, (512, 512)),
        ((1000, 1500), 400, 1333, (400, 600)),
        ((3, 3000), 100, 1000, (1, 1000)),
    ],
)
def test_resize_keeps_the_ratio_and_caps_the_long_side(size, short_side, long_side, expected):
    sample = eval_pipeline(short_side, long_side)(make_sample(*size), seed=0)
    assert sample.image.shape == (*expected, 3)
    assert sample.original_size == size
    assert sample.index == 3


def test_one_of_several_short_sides_is_drawn():
    pipeline = Pipeline({"resize": ResizeShortSide(short_side=[20, 30, 40], long_side=1000)})
    heights = [pipeline(make_sample(50, 60), seed).image.shape[0] for seed in range(30)]
    assert set(heights) == {20, 30, 40}


def test_shrinking_averages_and_enlarging_interpolates():
    stripes = make_sample(64, 64)
    stripes.image[:] = 0
    stripes.image[:, ::4] = 200
    small = eval_pipeline(16, None)(stripes, 0).image
    assert small.min() == small.max() == 50  # bilinear looks at the middle two of four columns and finds them black
    edge = make_sample(4, 4)
    edge.image[:, :2], edge.image[:, 2:] = 0, 200
    large = eval_pipeline(16, None)(edge, 0).image[0, :, 0]
    assert len(set(large.tolist())) > 2


def test_jitter_never_exceeds_its_target_and_covers_its_range():
    pipeline = Pipeline({"jitter": LargeScaleJitter(height=96, width=128, scale=[0.1, 2.0])})
    shapes = np.array([pipeline(make_sample(60, 80), seed).image.shape[:2] for seed in range(200)])
    assert shapes.max(0).tolist() == [96, 128]
    full = (shapes == [96, 128]).all(1).mean()
    assert 0.4 < full < 0.65  # half of the factors are above 1
    assert shapes.min(0)[0] < 20
    small = shapes[(shapes < [96, 128]).all(1)]
    np.testing.assert_allclose(small[:, 0], 0.75 * small[:, 1], atol=0.9)


def test_jitter_with_a_fixed_factor():
    pipeline = Pipeline({"jitter": LargeScaleJitter(height=100, width=100, scale=[0.5, 0.5])})
    assert pipeline(make_sample(300, 200), 1).image.shape == (50, 33, 3)
    # factor 2 of a fit to 100x67: 200x133 is cut to 100x100
    pipeline = Pipeline({"jitter": LargeScaleJitter(height=100, width=100, scale=[2.0, 2.0])})
    assert pipeline(make_sample(300, 200), 1).image.shape == (100, 100, 3)


@pytest.mark.parametrize(
    "transforms",
    [
        {"resize": ResizeShortSide(300)},
        {"resize": ResizeShortSide(67)},
        {"flip": A.HorizontalFlip(p=1)},
        {"flip": A.VerticalFlip(p=1), "resize": ResizeShortSide(333, 400)},
        {"jitter": LargeScaleJitter(150, 170, scale=[0.5, 2.0])},
        {"jitter": LargeScaleJitter(170, 120, scale=[1.5, 2.0]), "flip": A.HorizontalFlip(p=0.5)},
        {"turn": A.RandomRotate90(p=1), "resize": ResizeShortSide([200, 250])},
        {"shift": A.Affine(translate_percent=0.2, scale=1.2, p=1)},
    ],
    ids=lambda transforms: "-".join(transforms),
)
def test_boxes_stay_on_their_pixels(transforms):
    pipeline = Pipeline(transforms, min_visibility=0.0)
    seen = 0
    for seed in range(12):
        result = pipeline(make_sample(140, 190, [[60, 40, 125, 87]]), seed)
        if len(result.boxes):
            seen += 1
            np.testing.assert_allclose(result.boxes[0], find_red(result.image), atol=1)
    assert seen > 6


def test_unmoved_boxes_keep_their_digits():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 4000, (200, 2))
    boxes = np.hstack((corner, corner + rng.uniform(2, 90, (200, 2)))).astype(np.float32)
    sample = make_sample(4096, 4096)._replace(
        boxes=boxes, labels=np.arange(200), crowd=np.zeros(200, dtype=bool), image=np.zeros((4096, 8192, 3), np.uint8)
    )
    result = Pipeline({})(sample, 0)
    np.testing.assert_allclose(result.boxes, boxes, atol=1e-3)
    assert result.boxes.dtype == np.float32
    np.testing.assert_array_equal(result.labels, sample.labels)


def test_boxes_outside_are_clipped_and_degenerate_ones_dropped(recwarn):
    boxes = [
        [-5, -5, 20, 20],
        [90, 40, 100.00001, 50.00001],
        [10, 10, 10, 30],
        [30, 30, 20, 20],
        [120, 10, 140, 30],
        [50, 20, 50.5, 40],
        [0, 0, 100, 50],
    ]
    sample = make_sample(50, 100)._replace(
        boxes=np.array(boxes, np.float32), labels=np.arange(7), crowd=np.array([0, 1, 0, 0, 0, 0, 1], dtype=bool)
    )
    for transforms in ({}, {"flip": A.HorizontalFlip(p=0)}, {"blur": A.Blur(p=0)}):
        result = Pipeline(transforms)(sample, 0)
        np.testing.assert_allclose(result.boxes, [[0, 0, 20, 20], [90, 40, 100, 50], [0, 0, 100, 50]], atol=1e-4)
        assert result.labels.tolist() == [0, 1, 6]
        assert result.crowd.tolist() == [False, True, True]
    assert not recwarn.list


def test_boxes_never_leave_the_image_by_rounding():
    pipeline = Pipeline({"resize": ResizeShortSide([77, 91, 133], 180), "flip": A.HorizontalFlip(p=0.5)})
    for seed in range(40):
        result = pipeline(make_sample(101, 147, [[0, 0, 147, 101], [100.3, 50.7, 147, 101]]), seed)
        height, width = result.image.shape[:2]
        assert len(result.boxes) == 2
        assert (result.boxes >= 0).all()
        assert (result.boxes <= np.array([width, height, width, height])).all()


def test_min_size_counts_pixels_after_the_transform():
    sample = make_sample(100, 100, [[10, 10, 13, 60], [10, 10, 15, 60]])
    halved = {"resize": ResizeShortSide(50)}
    assert Pipeline(halved, min_size=2.0)(sample, 0).labels.tolist() == [6]
    assert Pipeline(halved, min_size=1.0)(sample, 0).labels.tolist() == [5, 6]


def test_flips_and_colours_drop_no_box_that_the_resize_makes_large_enough():
    sample = make_sample(50, 50, [[10, 10, 11, 30], [10, 10, 11.6, 30]])
    doubled = {"resize": ResizeShortSide(100)}
    for before in ({}, {"flip": A.HorizontalFlip(p=1)}, {"colour": ColorJitter(p=1.0)}):
        assert Pipeline({**before, **doubled}, min_size=3.0)(sample, 0).labels.tolist() == [6]
        assert Pipeline(before, min_size=1.5)(sample, 0).labels.tolist() == [6]


def test_min_visibility_counts_the_area_that_a_crop_leaves():
    sample = make_sample(100, 100, [[40, 0, 60, 20], [45, 0, 65, 20], [49, 0, 69, 20]])
    left = {"crop": A.Crop(0, 0, 50, 100)}  # leaves 10, 5 and 1 of 20 columns
    assert Pipeline(left)(sample, 0).labels.tolist() == [5, 6]
    assert Pipeline(left, min_visibility=0.4)(sample, 0).labels.tolist() == [5]
    assert Pipeline(left, min_visibility=0.0)(sample, 0).labels.tolist() == [5, 6, 7]


def test_images_without_objects_pass():
    result = Pipeline({"jitter": LargeScaleJitter(64, 64), "flip": A.HorizontalFlip()})(make_sample(50, 70), 9)
    assert result.boxes.shape == (0, 4)
    assert result.boxes.dtype == np.float32
    assert result.labels.shape == result.crowd.shape == (0,)
    assert result.labels.dtype == np.int64
    assert result.crowd.dtype == bool


def test_result_is_contiguous_and_its_input_untouched():
    sample = make_sample(40, 60, [[5, 5, 20, 20]])
    before = sample.image.copy()
    result = Pipeline({"flip": A.HorizontalFlip(p=1), "jitter": LargeScaleJitter(30, 30, [2.0, 2.0])})(sample, 0)
    assert result.image.flags.c_contiguous
    assert result.image.dtype == np.uint8
    np.testing.assert_array_equal(sample.image, before)
    np.testing.assert_array_equal(sample.boxes, [[5, 5, 20, 20]])


def test_the_seed_decides_everything():
    transforms = {
        "jitter": LargeScaleJitter(64, 64),
        "flip": A.HorizontalFlip(),
        "colour": A.ColorJitter(p=0.8),
        "one": A.OneOf([A.GaussNoise(p=1), A.Blur(p=1)], p=0.5),
    }
    pipeline, sample = Pipeline(transforms), make_sample(50, 60, [[5, 5, 40, 40]])
    first = [pipeline(sample, seed) for seed in range(8)]
    random.seed(1)
    np.random.seed(1)
    for seed in reversed(range(8)):
        again = pipeline(sample, seed)
        np.testing.assert_array_equal(again.image, first[seed].image)
        np.testing.assert_array_equal(again.boxes, first[seed].boxes)
    assert len({result.image.tobytes() for result in first}) == 8


def test_transforms_draw_independently_and_by_name():
    both = {"across": A.HorizontalFlip(p=0.5), "down": A.VerticalFlip(p=0.5)}
    sample = make_sample(20, 20, [[0, 0, 5, 5]])

    def corners(transforms):
        boxes = [Pipeline(transforms)(sample, seed).boxes[0] for seed in range(80)]
        return [(box[0] > 10, box[1] > 10) for box in boxes]

    moved = corners(both)
    counts = [moved.count(pair) for pair in ((False, False), (False, True), (True, False), (True, True))]
    assert min(counts) > 8  # one shared stream would never flip once only
    alone = corners({"down": both["down"]})
    assert [down for _, down in alone] == [down for _, down in moved]


def test_stable_hash_is_pinned():
    assert stable_hash(0, 1, 2) == 3545498880833913751
    assert stable_hash(0, 12) != stable_hash(0, 1, 2)
    assert stable_hash(-1, 3) != stable_hash(1, 3)


@pytest.mark.parametrize("transform", [A.Normalize(), A.ToFloat(), A.ToGray(num_output_channels=1, p=1)])
def test_images_that_are_not_uint8_rgb_are_refused(transform):
    pipeline = Pipeline({"resize": ResizeShortSide(20), "odd": transform})
    with refused("augment", "augment: resize, odd", kind=ConfigError):
        pipeline(make_sample(30, 30), 0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ResizeShortSide(0),
        lambda: ResizeShortSide([]),
        lambda: ResizeShortSide(10, 0),
        lambda: LargeScaleJitter(0, 10),
        lambda: LargeScaleJitter(10, 10, [0.0, 1.0]),
        lambda: LargeScaleJitter(10, 10, [2.0, 1.0]),
        lambda: LargeScaleJitter(10, 10, [1.0]),
        lambda: Pipeline({}, min_size=0.0),
        lambda: Pipeline({}, min_visibility=1.5),
    ],
)
def test_senseless_settings_are_refused(build):
    with pytest.raises(ValueError, match="must"):
        build()


ALL_KINDS = {
    "none": {},
    "flip": {"flip": A.HorizontalFlip(p=0.5)},
    "resize": {"resize": ResizeShortSide([70, 120, 150], 180)},
    "flips-resize": {"h": A.HorizontalFlip(), "v": A.VerticalFlip(), "resize": ResizeShortSide([70, 90], 180)},
    "jitter": {"jitter": LargeScaleJitter(90, 110, scale=[0.3, 3.0]), "flip": A.HorizontalFlip()},
    "colour": {"colour": A.ColorJitter(p=0.8), "resize": ResizeShortSide(140)},
    "crop": {"crop": A.RandomCrop(70, 80), "resize": ResizeShortSide(140)},
    "safe crop": {"crop": A.RandomSizedBBoxSafeCrop(60, 90)},
    "affine": {"affine": A.Affine(scale=[0.6, 1.6], translate_percent=0.3, rotate=[-30, 30], p=1.0)},
    "turns": {"turn": A.RandomRotate90(), "transpose": A.Transpose()},
    "nested": {"some": A.OneOf([A.Blur(p=1), A.RandomCrop(60, 60, p=1)], p=0.7), "flip": A.HorizontalFlip()},
    "sequence": {"two": A.Sequential([A.RandomScale(0.3, p=1), A.VerticalFlip()], p=0.8)},
    "dropout": {"holes": A.CoarseDropout(num_holes_range=(3, 5), hole_height_range=(0.2, 0.4), p=1)},
}


class InTheirs(A.DualTransform):
    """One of our transforms among those of albumentations."""

    _targets = (A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES)

    def __init__(self, transform):
        super().__init__(p=1.0)
        self.transform = transform

    def set_random_state(self, random_generator, py_random):
        self.seed = py_random.getstate()

    def get_params_dependent_on_data(self, params, data):
        generator = random.Random()
        generator.setstate(self.seed)
        boxes = np.asarray(data["bboxes"], np.float64).reshape(-1, 5)
        image, boxes = self.transform.apply(data["image"], boxes, generator)
        return {"pixels": image, "boxes": boxes}

    def apply(self, img, pixels, **params):
        return pixels

    def apply_to_bboxes(self, bboxes, boxes, **params):
        return boxes


def composed(transforms, sample, seed, *, min_size, min_visibility):
    """What `Pipeline` does, by albumentations.Compose."""
    transforms = {name: InTheirs(t) if isinstance(t, Transform) else t for name, t in transforms.items()}
    compose = A.Compose(
        [*transforms.values(), A.NoOp()],
        bbox_params=A.BboxParams(
            format="pascal_voc",
            clip=True,
            filter_invalid_bboxes=True,
            min_width=min_size * (1 - 1e-3),
            min_height=min_size * (1 - 1e-3),
            min_visibility=min_visibility,
        ),
    )
    for name, transform in transforms.items():
        stream = stable_hash(seed, name)
        transform.set_random_state(np.random.default_rng(stream), random.Random(stream))
    rows = np.arange(len(sample.boxes), dtype=np.float32)[:, None]
    result = compose(image=sample.image, bboxes=np.hstack((sample.boxes, rows)))
    boxes = result["bboxes"].reshape(-1, result["bboxes"].shape[1] if len(result["bboxes"]) else 5)
    return result["image"], boxes[:, :4], boxes[:, 4].astype(int)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pipeline_keeps_the_rules_of_compose(kind):
    transforms = ALL_KINDS[kind]
    rng = np.random.default_rng(3)
    lost = 0
    for seed in range(25):
        sides = rng.uniform(3, 70, (seed % 9, 2))
        corners = rng.uniform(-10, (125, 95), (seed % 9, 2))  # of an image of 130 x 100
        boxes = np.hstack((corners, corners + sides)).astype(np.float32)
        sample = make_sample(100, 130, boxes)
        options = {"min_size": 4.0, "min_visibility": 0.3}
        image, expected, kept = composed(transforms, sample, seed, **options)
        result = Pipeline(transforms, **options)(sample, seed)
        np.testing.assert_array_equal(result.image, image)
        np.testing.assert_array_equal(result.labels, sample.labels[kept])
        np.testing.assert_allclose(result.boxes, expected, atol=1e-3)
        lost += len(boxes) - len(kept)
    assert lost > 1  # or the rules were never asked


@pytest.mark.parametrize(("ours", "theirs"), [(HorizontalFlip, A.HorizontalFlip), (VerticalFlip, A.VerticalFlip)])
def test_our_flips_are_those_of_albumentations_bit_for_bit(ours, theirs):
    rng = np.random.default_rng(0)
    for p in (0.0, 0.5, 1.0):
        flips = set()
        for seed in range(20):
            sample = make_sample(31, 47, rng.uniform(0, 31, (seed % 4, 4)))
            sample = sample._replace(image=rng.integers(0, 256, (31, 47, 3), dtype=np.uint8))
            result, expected = (Pipeline({"flip": flip(p=p)})(sample, seed) for flip in (ours, theirs))
            np.testing.assert_array_equal(result.image, expected.image)
            np.testing.assert_array_equal(result.boxes, expected.boxes)
            flips.add(bool((result.image != sample.image).any()))
        assert flips == {0.0: {False}, 0.5: {False, True}, 1.0: {True}}[p]


def test_what_is_no_transform_is_refused():
    with refused("augment", "odd", "Sample", kind=ConfigError):
        Pipeline({"odd": make_sample(5, 5)})


def test_the_resize_at_the_end_may_be_left_to_the_collate():
    transforms = {"flip": A.HorizontalFlip(p=0.5), "resize": ResizeShortSide([40, 90, 100], 160)}
    pipeline, rng = Pipeline(transforms), np.random.default_rng(0)
    sizes = set()
    for seed in range(20):
        sample = make_sample(60, 90, [[5, 5, 40, 40]])._replace(image=rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
        whole, unsized = pipeline(sample, seed), pipeline.without_last_resize(sample, seed)
        assert whole.size is None
        assert whole.image.shape[:2] == unsized.size
        assert unsized.image.shape == (60, 90, 3)
        np.testing.assert_array_equal(resize(unsized.image, unsized.size), whole.image)
        np.testing.assert_array_equal(unsized.boxes, whole.boxes)
        sizes.add(unsized.size)
    assert len(sizes) == 3
    cropped = Pipeline({"resize": ResizeShortSide(90), "crop": A.CenterCrop(50, 50)})
    assert cropped.without_last_resize(sample, 0).image.shape == (50, 50, 3)  # only at the end


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((40, 60), (80, 120)),
        ((40, 60), (13, 20)),
        ((9, 1), (90, 10)),
        ((1, 50), (1, 20)),
        ((40, 60), (40, 60)),
        ((3, 3), (1, 1)),
    ],
)
def test_resize_into_a_window_writes_there_and_nowhere_else(before, after):
    image = np.random.default_rng(0).integers(0, 256, (*before, 3), dtype=np.uint8)
    canvas = np.full((128, 128, 3), 7, dtype=np.uint8)
    height, width = after
    resize(image, after, out=canvas[:height, :width])
    np.testing.assert_array_equal(canvas[:height, :width], resize(image, after))
    assert (canvas[height:] == 7).all()
    assert (canvas[:, width:] == 7).all()


def test_a_reduced_image_gives_the_boxes_and_the_size_of_the_whole():
    pipeline = Pipeline({"flip": A.HorizontalFlip(p=0.5), "colour": ColorJitter(p=0.5), "resize": ResizeShortSide(75)})
    whole = make_sample(602, 402, [[40, 80, 200, 301], [300, 500, 402, 602]])
    assert pipeline.least_size((602, 402)) == (112, 75)
    for seed in range(6):
        expected = pipeline(whole._replace(size=(602, 402)), seed)
        reduced = pipeline(whole._replace(image=whole.image[::2, ::2], size=(602, 402)), seed)
        assert reduced.image.shape == expected.image.shape == (112, 75, 3)
        np.testing.assert_array_equal(reduced.boxes, expected.boxes)
        np.testing.assert_allclose(reduced.boxes[:1], pipeline(whole, seed).boxes[:1], atol=1e-4)


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ({"resize": ResizeShortSide([20, 50, 30])}, (50, 100)),
        ({"resize": ResizeShortSide(50, 80)}, (40, 80)),
        ({"flip": A.HorizontalFlip(), "v": A.VerticalFlip(), "resize": ResizeShortSide(50)}, (50, 100)),
        ({}, None),
        ({"flip": A.HorizontalFlip()}, None),
        ({"blur": A.Blur(), "resize": ResizeShortSide(50)}, None),  # counts in pixels
        ({"resize": ResizeShortSide(50), "crop": A.CenterCrop(9, 9)}, None),
        ({"jitter": LargeScaleJitter(50, 50)}, None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_how_small_an_image_may_come(transforms, expected):
    assert Pipeline(transforms).least_size((400, 800)) == expected
