import dataclasses
from collections import Counter

import numpy as np
import pytest

from faults import refused
from retina.data.coco import read_coco
from retina.data.layouts import locate_split
from retina.data.repeats import Repeats, class_balanced, repeat_factors, repeats_of
from retina.data.shapes import write_shapes

# class 0 in images 0..7, class 1 in 6 and 7, class 2 in 8; image 9 is empty; class 3 has no image
LABELS = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
IMAGES = np.array([0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 7, 8])


def long_tail(counts=(100, 10, 3)):
    """One label per image."""
    return np.repeat(np.arange(len(counts)), counts)


def times_of(repeats, num_images):
    return np.bincount(repeats.images, weights=repeats.times, minlength=num_images)


def test_repeat_factors_are_the_papers():
    """r(c) = max(1, sqrt(t / f(c))), worked out by hand: f = 0.8, 0.2 (two images, one of them twice), 0.1."""
    repeats = repeat_factors(LABELS, IMAGES, num_images=10, threshold=0.4)
    r1, r2 = np.sqrt(0.4 / 0.2), np.sqrt(0.4 / 0.1)
    np.testing.assert_allclose(repeats.times, [1, 1, 1, 1, 1, 1, r1, r1, r2, 1])
    assert repeats.images.tolist() == list(range(10))
    assert repeats.num_draws == np.ceil(7 + 2 * r1 + r2) == 12


def test_without_rare_classes_each_image_is_drawn_once():
    repeats = repeat_factors(LABELS, IMAGES, num_images=10, threshold=0.1)
    for epoch in range(5):
        assert repeats.draw(0, epoch).tolist() == list(range(10))


def test_every_class_is_drawn_equally_often():
    repeats = class_balanced(LABELS, IMAGES, num_images=10)
    nine_images_for_three_classes = 3
    expected = {0: nine_images_for_three_classes / 8, 1: nine_images_for_three_classes / 2, 2: 3.0}
    for image, times, label in zip(*repeats, strict=True):
        assert times == pytest.approx(1.0 if label < 0 else expected[label])
        assert (label < 0) == (image == 9)
    assert repeats.num_draws == 10
    times = times_of(repeats, 10)
    np.testing.assert_allclose(times, [3 / 8] * 6 + [3 / 8 + 1.5] * 2 + [3, 1])


@pytest.mark.parametrize("make", [class_balanced, lambda labels: repeat_factors(labels, threshold=0.5)])
def test_draws_are_right_on_average_and_rounded_in_each_epoch(make):
    labels = long_tail()
    repeats = make(labels)
    stretched = repeats.times * repeats.num_draws / repeats.times.sum()
    counts = np.array([np.bincount(repeats.draw(3, epoch), minlength=113) for epoch in range(2000)])
    assert (counts.sum(axis=1) == repeats.num_draws).all()
    assert (counts >= np.floor(stretched - 1e-9)).all()
    assert (counts <= np.ceil(stretched + 1e-9)).all()
    np.testing.assert_allclose(counts.mean(axis=0), stretched, atol=0.05)  # sigma below 0.0112, of 113 images
    assert len({tuple(row) for row in counts.tolist()}) > 1000  # another choice in every epoch


@pytest.mark.parametrize("counts", [(100, 10, 3), (7, 7, 7), (1, 50), (5, 0, 2), (1,)])
def test_classes_of_a_classifier_are_balanced_within_one_in_every_epoch(counts):
    labels = long_tail(counts)
    repeats = class_balanced(labels)
    present = [label for label, count in enumerate(counts) if count]
    share = len(labels) / len(present)
    for epoch in range(50):
        images = repeats.draw(1, epoch)
        assert len(images) == len(labels)
        drawn = Counter(labels[images].tolist())
        assert set(drawn) == set(present)
        assert all(abs(count - share) < 1 for count in drawn.values()), drawn
        for label in present:  # turns: nobody is two draws ahead of another of the class
            of_class = np.bincount(images, minlength=len(labels))[labels == label]
            assert np.ptp(of_class) <= 1


def test_empty_images_are_drawn_once():
    for repeats in (class_balanced(LABELS, IMAGES, num_images=12), repeat_factors(LABELS, IMAGES, num_images=12)):
        for epoch in range(30):
            drawn = Counter(repeats.draw(0, epoch).tolist())
            assert [drawn[i] for i in (9, 10, 11)] == [1, 1, 1]
    nothing = np.zeros(0, np.int64)
    for repeats in (class_balanced(nothing, nothing, num_images=3), repeat_factors(nothing, nothing, num_images=3)):
        assert repeats.draw(0, 0).tolist() == [0, 1, 2]


def test_the_draw_is_pinned_to_seed_and_epoch():
    """The literals guard against a change of algorithm or of numpy, which would part a resumed run from its past."""
    repeats = class_balanced(long_tail((9, 3, 1)))
    assert repeats.draw(1, 0).tolist() == [0, 4, 7, 8, 9, 9, 10, 11, 12, 12, 12, 12, 12]
    assert repeats.draw(1, 1).tolist() == [1, 2, 3, 5, 9, 10, 11, 11, 12, 12, 12, 12, 12]


def test_the_total_does_not_hang_on_rounding():
    """1/3 + 1/3 + 1/3 and the like: a sum a hair above a whole number is that number."""
    for num in range(1, 200):
        repeats = class_balanced(np.arange(num) % 7)
        assert repeats.num_draws == num
        assert len(repeats.draw(0, 0)) == num


def test_a_single_draw_takes_any_row():
    times = np.full(10, 0.1)
    repeats = Repeats(np.arange(10), times, np.zeros(10, np.int64))
    assert {repeats.draw(seed, 0).tolist()[0] for seed in range(200)} == set(range(10))


def test_crowd_regions_do_not_count(tmp_path):
    write_shapes(tmp_path / "shapes", num_train=12, num_val=1, image_size=(64, 96))
    known = read_coco(*locate_split(tmp_path / "shapes", "train"))
    assert repeats_of(known, None, threshold=0.1) is None
    images = np.repeat(np.arange(12), np.diff(known.offsets))
    for name, expected in {
        "class_balanced": class_balanced(known.labels, images, num_images=12),
        "repeat_factor": repeat_factors(known.labels, images, num_images=12, threshold=0.4),
    }.items():
        made = repeats_of(known, name, threshold=0.4)
        assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))

    alone = int(np.flatnonzero(np.diff(known.offsets) > 0)[0])
    crowd = images == alone
    crowded = dataclasses.replace(known, crowd=crowd)
    made = repeats_of(crowded, "class_balanced", threshold=0.4)
    assert made.strata[made.images == alone].tolist() == [-1]  # as an image without objects
    made = repeats_of(crowded, "repeat_factor", threshold=1.0)
    assert made.times[alone] == 1
    assert max(made.times) > 1


def test_lists_and_narrow_integers_will_do():
    labels = np.repeat([0, 1], [100, 28]).astype(np.int8)  # whose products would overflow
    for make in (class_balanced, repeat_factors):
        wide = make(labels.astype(np.int64))
        for given in (labels, labels.tolist()):
            assert all(np.array_equal(a, b) for a, b in zip(make(given), wide, strict=True))


def test_what_does_not_fit_is_refused():
    for threshold in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            repeat_factors(LABELS, threshold=threshold)
    for make in (class_balanced, repeat_factors):
        with pytest.raises(ValueError, match="num_images"):
            make(LABELS, IMAGES)
        with pytest.raises(ValueError, match=r"images must lie in 0\.\.7, got 0 to 8"):
            make(LABELS, IMAGES, num_images=8)
        with pytest.raises(ValueError, match="no images"):
            make(np.zeros(0, np.int64))
        with pytest.raises(ValueError, match="labels must"):
            make(LABELS - 1, IMAGES, num_images=10)


def test_an_unknown_sampling_is_refused(tmp_path):
    write_shapes(tmp_path / "shapes", num_train=1, num_val=1, image_size=(64, 96))
    known = read_coco(*locate_split(tmp_path / "shapes", "val"))
    with refused("unknown-value", "sampling: "):
        repeats_of(known, "rare_first", threshold=0.1)
