import random

import cv2
import numpy as np
import pytest

from retina.data.augmentations import GREY, ColorJitter, color_matrix


def all_kinds_of_pixels() -> np.ndarray:
    """The corners of the colour cube, greys, and random colours."""
    corners = np.stack(np.meshgrid([0, 255], [0, 255], [0, 255]), axis=-1).reshape(-1, 3)
    greys = np.repeat(np.arange(256)[:, None], 3, axis=1)
    random = np.random.default_rng(0).integers(0, 256, (3832, 3))
    return np.concatenate((corners, greys, random)).astype(np.uint8).reshape(64, 64, 3)


def plain(image, *, brightness=1.0, contrast=1.0, saturation=1.0):
    """The three formulas one after the other, in float."""
    pixels = image.astype(np.float64)
    mean_grey = (pixels @ GREY).mean()
    pixels = pixels * brightness
    pixels = contrast * pixels + (1 - contrast) * brightness * mean_grey
    return saturation * pixels + (1 - saturation) * (pixels @ GREY)[..., None]


def changed(image, *, brightness=1.0, contrast=1.0, saturation=1.0, turn=0.0):
    jitter = ColorJitter()
    jitter.draw = lambda generator: (brightness, contrast, saturation, turn)
    return jitter.apply(image, np.zeros((0, 5)), random.Random(0))[0]


def test_brightness_contrast_and_saturation_follow_the_plain_formula():
    image, rng = all_kinds_of_pixels(), np.random.default_rng(1)
    extremes = np.array([(0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 2, 2), (0, 0, 0), (1, 1, 1)], dtype=float)
    for brightness, contrast, saturation in np.concatenate((extremes, rng.uniform(0, 2, (40, 3)))).tolist():
        factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        found = changed(image, **factors)
        assert found.dtype == np.uint8
        assert np.abs(found - plain(image, **factors).clip(0, 255)).max() <= 1.5


def test_no_change_changes_nothing():
    image = all_kinds_of_pixels()
    np.testing.assert_array_equal(changed(image), image)


def test_hue_turns_colours_the_way_that_hsv_does_and_keeps_greys_and_brightness():
    image = np.full((4, 4, 3), (160, 110, 100), dtype=np.uint8)
    for turn in (-0.1, -0.03, 0.03, 0.1):
        found = changed(image, turn=turn)
        before, after = (cv2.cvtColor(colour, cv2.COLOR_RGB2HSV)[0, 0, 0] / 180 for colour in (image, found))
        assert 0.5 < ((after - before + 0.5) % 1 - 0.5) / turn < 2
        assert found[0, 0] @ GREY == pytest.approx(image[0, 0] @ GREY, abs=1)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    np.testing.assert_array_equal(changed(greys, turn=0.3), greys)


def test_turns_add_up_to_the_full_circle():
    third = color_matrix(1.0, 1.0, 1.0, 1 / 3, 0.0)[:, :3]
    np.testing.assert_allclose(third @ third @ third, np.eye(3), atol=1e-9)
    assert np.abs(third - np.eye(3)).max() > 0.5


def test_amounts_bound_what_is_drawn_and_cover_it():
    jitter, generator = ColorJitter(brightness=0.3, contrast=1.5, saturation=0.0, hue=0.1, p=1.0), random.Random(0)
    drawn = np.array([jitter.draw(generator) for _ in range(300)])
    for values, low, high in zip(drawn[:, [0, 1, 3]].T, (0.7, 0.0, -0.1), (1.3, 2.5, 0.1), strict=True):
        span = 0.03 * (high - low)
        assert low <= values.min() < low + span < high - span < values.max() <= high
    assert set(drawn[:, 2]) == {1.0}


def test_it_is_applied_with_its_probability_and_leaves_boxes_alone():
    image, boxes = all_kinds_of_pixels(), np.array([[0.1, 0.2, 0.5, 0.6, 0]])
    results = [ColorJitter(p=0.5)(image, boxes, seed) for seed in range(60)]
    assert 15 < sum((result != image).any() for result, _ in results) < 45
    assert all(np.array_equal(kept, boxes) for _, kept in results)


@pytest.mark.parametrize("amounts", [{"brightness": -0.1}, {"contrast": -1.0}, {"saturation": -1.0}, {"hue": 0.6}])
def test_senseless_amounts_are_refused(amounts):
    with pytest.raises(ValueError, match="must not be negative and hue must lie in"):
        ColorJitter(**amounts)
