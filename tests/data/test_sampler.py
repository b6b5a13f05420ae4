import numpy as np
import pytest
from torch.utils.data import DataLoader

from faults import refused
from retina.data.repeats import Repeats, RepeatSampler, class_balanced, repeat_factors
from retina.data.sampler import DetectionBatchSampler, EvalSampler, eval_shard


def make_sizes(num, seed=0):
    """Landscape, portrait and square images, mixed."""
    kinds = np.array([[480, 640], [640, 480], [500, 500], [427, 640]])
    return kinds[np.random.default_rng(seed).integers(0, 4, num)]


def images_of(batches):
    return [index for batch in batches for _, index in batch]


@pytest.mark.parametrize("num", [1, 7, 16, 100, 103])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group_by_aspect", [True, False])
def test_every_image_is_seen_and_only_the_filling_twice(num, shuffle, group_by_aspect):
    sampler = DetectionBatchSampler(
        make_sizes(num), total_batch=16, shuffle=shuffle, group_by_aspect=group_by_aspect, seed=3
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.steps_per_epoch == -(-num // 16)
        assert {len(batch) for batch in batches} == {16}
        assert {key[0] for batch in batches for key in batch} == {epoch}
        images = images_of(batches)
        assert set(images) == set(range(num))
        assert len(set(images[:num])) == num
        assert images[num:] == np.resize(images[:num], len(images))[num:].tolist()


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (1, 16), (16, 1)])
def test_global_batches_do_not_depend_on_processes_or_accumulation(world_size, accumulate):
    sizes = make_sizes(150)
    expected = DetectionBatchSampler(sizes, total_batch=16, seed=5).global_batches(2)
    micro = 16 // world_size // accumulate
    steps = [[] for _ in expected]
    for rank in range(world_size):
        sampler = DetectionBatchSampler(
            sizes, total_batch=16, rank=rank, world_size=world_size, accumulate=accumulate, seed=5
        )
        sampler.set_epoch(2)
        batches = list(sampler)
        assert len(batches) == len(expected) * accumulate
        for number, batch in enumerate(batches):
            assert len(batch) == micro
            steps[number // accumulate] += [index for _, index in batch]
    for step, batch in zip(steps, expected, strict=True):
        assert sorted(step) == sorted(batch.tolist())


def test_order_is_pinned_to_seed_and_epoch():
    """The literal guards against a change of algorithm or of numpy, which would part a resumed run from its past."""
    sampler = DetectionBatchSampler(np.ones((8, 2), dtype=np.int64), total_batch=4, seed=1)
    assert sampler.global_batches(0).tolist() == [[2, 4, 7, 5], [0, 6, 3, 1]]
    assert sampler.global_batches(1).tolist() != sampler.global_batches(0).tolist()
    other = DetectionBatchSampler(np.ones((8, 2), dtype=np.int64), total_batch=4, seed=2)
    assert other.global_batches(0).tolist() != sampler.global_batches(0).tolist()


def test_order_does_not_touch_or_heed_the_global_state():
    sampler = DetectionBatchSampler(make_sizes(64), total_batch=8)
    before = np.random.get_state()[1].copy()
    first = list(sampler)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(9)
    assert list(sampler) == first


def test_orientations_are_mixed_only_in_the_leftovers():
    sizes = make_sizes(203)
    orientations = np.sign(sizes[:, 1] - sizes[:, 0])
    batches = DetectionBatchSampler(sizes, total_batch=8, seed=4).global_batches(0)
    mixed = [len(set(orientations[batch].tolist())) > 1 for batch in batches]
    full = sum(np.count_nonzero(orientations == kind) // 8 for kind in (-1, 0, 1))
    assert not any(mixed[:full])
    assert len(batches) - full <= 3
    kinds = orientations[batches[:full, 0]]
    assert (kinds[:-1] != kinds[1:]).sum() > 3  # and batches of different orientation take turns
    ungrouped = DetectionBatchSampler(sizes, total_batch=8, seed=4, group_by_aspect=False).global_batches(0)
    assert sum(len(set(orientations[batch].tolist())) > 1 for batch in ungrouped) > 15


def test_without_shuffle_images_come_in_order():
    sampler = DetectionBatchSampler(np.full((10, 2), 5), total_batch=4, shuffle=False)
    assert [[index for _, index in batch] for batch in sampler] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10])
def test_resume_yields_the_tail(step):
    options = {"total_batch": 12, "rank": 1, "world_size": 2, "accumulate": 3, "seed": 8}
    whole, resumed = (DetectionBatchSampler(make_sizes(117), **options) for _ in range(2))
    whole.set_epoch(4)
    resumed.start(4, step)
    tail = list(whole)[step * 3 :]
    assert len(resumed) == len(tail)
    assert list(resumed) == tail
    resumed.set_epoch(5)
    whole.set_epoch(5)
    assert list(resumed) == list(whole)


def test_a_running_iteration_keeps_its_epoch():
    sampler = DetectionBatchSampler(make_sizes(20), total_batch=4)
    running = iter(sampler)
    sampler.start(3, 2)
    assert {epoch for batch in running for epoch, _ in batch} == {0}


@pytest.mark.parametrize(
    ("total_batch", "nearest"), [(10, "nearest that can is 8 or 12"), (3, "nearest that can is 4")]
)
def test_uneven_batches_are_refused(total_batch, nearest):
    with pytest.raises(ValueError, match=nearest):
        DetectionBatchSampler(make_sizes(20), total_batch=total_batch, world_size=2, accumulate=2)


def test_senseless_settings_are_refused():
    with pytest.raises(ValueError, match="no images"):
        DetectionBatchSampler(np.zeros((0, 2)), total_batch=4)
    with pytest.raises(ValueError, match="rank must"):
        DetectionBatchSampler(make_sizes(4), total_batch=4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="accumulate"):
        DetectionBatchSampler(make_sizes(4), total_batch=4, accumulate=0)
    with pytest.raises(ValueError, match="total_batch"):
        DetectionBatchSampler(make_sizes(4), total_batch=0)
    with pytest.raises(ValueError, match="step must"):
        DetectionBatchSampler(make_sizes(8), total_batch=4).start(0, 3)
    with pytest.raises(ValueError, match="batch_size"):
        EvalSampler(make_sizes(4), batch_size=0)
    with pytest.raises(ValueError, match="rank must"):
        eval_shard(4, 3, 3)


def rare_classes(num, seed=0):
    """About 1 image in 2, 10 and 40 of three classes; the rest is empty."""
    drawn = np.random.default_rng(seed).random((num, 3)) < [0.5, 0.1, 0.025]
    images, labels = np.nonzero(drawn)
    return labels, images


REPEATS = {
    "repeat_factor": lambda num: repeat_factors(*rare_classes(num), num_images=num, threshold=0.5),
    "class_balanced": lambda num: class_balanced(*rare_classes(num), num_images=num),
}


@pytest.mark.parametrize("name", REPEATS)
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (2, 2), (4, 1), (1, 4), (16, 1)])
def test_repeated_images_are_exact_across_processes_and_accumulation(name, world_size, accumulate):
    sizes, repeats = make_sizes(203), REPEATS[name](203)
    options = {"total_batch": 16, "seed": 5, "repeats": repeats}
    alone = DetectionBatchSampler(sizes, **options)
    shares = [
        DetectionBatchSampler(sizes, rank=rank, world_size=world_size, accumulate=accumulate, **options)
        for rank in range(world_size)
    ]
    epochs = []
    for epoch in range(3):
        for sampler in [alone, *shares]:
            sampler.set_epoch(epoch)
        steps = [images_of([batch]) for batch in alone]
        epochs.append(steps)
        assert len(steps) == alone.steps_per_epoch == -(-repeats.num_draws // 16)
        parts = [list(sampler) for sampler in shares]
        for number, step in enumerate(steps):
            rows = slice(number * accumulate, (number + 1) * accumulate)
            assert sorted(index for part in parts for index in images_of(part[rows])) == sorted(step)
        # exactly what was drawn, and the filling is from the start
        images = [index for step in steps for index in step]
        assert sorted(images[: repeats.num_draws]) == repeats.draw(5, epoch).tolist()
        assert images[repeats.num_draws :] == images[: len(images) - repeats.num_draws]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_images_resume_at_every_step(name):
    options = {"total_batch": 12, "rank": 1, "world_size": 2, "accumulate": 3, "seed": 8, "repeats": REPEATS[name](117)}
    whole = DetectionBatchSampler(make_sizes(117), **options)
    whole.set_epoch(4)
    expected = list(whole)
    for step in range(whole.steps_per_epoch + 1):
        resumed = DetectionBatchSampler(make_sizes(117), **options)
        resumed.start(4, step)
        assert list(resumed) == expected[step * 3 :]
        assert len(resumed) == len(expected) - step * 3


@pytest.mark.parametrize("name", REPEATS)
def test_an_image_that_comes_again_is_augmented_anew(name):
    """The data set augments by key, so no key may come twice; the first time is that of an epoch without repeats."""
    sampler = DetectionBatchSampler(make_sizes(117), total_batch=8, repeats=REPEATS[name](117))
    for epoch in (0, 7):
        sampler.set_epoch(epoch)
        keys = [key for batch in sampler for key in batch]
        assert len(set(keys)) == len(keys) > len({index for _, index in keys})
        first = {}
        for number, index in keys:
            first.setdefault(index, number)
        assert set(first.values()) == {epoch}


def test_repeated_images_are_grouped_by_aspect_too():
    sizes = make_sizes(203)
    batches = DetectionBatchSampler(sizes, total_batch=8, repeats=REPEATS["repeat_factor"](203)).global_batches(0)
    orientations = np.sign(sizes[:, 1] - sizes[:, 0])
    assert sum(len(set(orientations[batch].tolist())) > 1 for batch in batches) <= 3


def test_images_drawn_once_each_are_the_plain_epoch():
    sizes = make_sizes(100)
    ones = Repeats(np.arange(100), np.ones(100), np.zeros(100, np.int64))
    plain, repeated = (DetectionBatchSampler(sizes, total_batch=16, seed=2, repeats=r) for r in (None, ones))
    for epoch in range(3):
        np.testing.assert_array_equal(plain.global_batches(epoch), repeated.global_batches(epoch))


def test_repeats_without_shuffle_come_in_order():
    labels = np.repeat([0, 1], [6, 2])
    sampler = DetectionBatchSampler(np.full((8, 2), 5), total_batch=8, shuffle=False, repeats=class_balanced(labels))
    [images] = sampler.global_batches(0).tolist()
    assert images == sorted(images)
    assert images[4:] == [6, 6, 7, 7]


def test_repeats_of_other_images_are_refused():
    with refused("sampling", "image 19", "0..7"):
        DetectionBatchSampler(make_sizes(8), total_batch=4, repeats=class_balanced(np.zeros(20, np.int64)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_classifiers_batches_are_the_same_over_processes(world_size):
    labels = np.repeat([0, 1, 2], [80, 15, 8])
    repeats = class_balanced(labels)
    alone = RepeatSampler(repeats, seed=6)
    parts = [RepeatSampler(repeats, seed=6, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = []
    for epoch in range(3):
        for sampler in [alone, *parts]:
            sampler.set_epoch(epoch)
        order = list(alone)
        seen.append(order)
        assert sorted(order) == repeats.draw(6, epoch).tolist()
        shares = [list(part) for part in parts]
        assert {len(share) for share in shares} == {len(parts[0])}
        size = 16 // world_size
        for first in range(0, len(order) // 16 * 16, 16):
            step = [index for share in shares for index in share[first // world_size :][:size]]
            assert sorted(step) == sorted(order[first : first + 16])
        filled = [index for together in zip(*shares, strict=True) for index in together]
        assert filled == order + order[: len(filled) - len(order)]
    assert seen[0] != seen[1] != seen[2]


def test_a_classifiers_order_is_another_in_every_epoch():
    sampler = RepeatSampler(class_balanced(np.arange(50)))  # always the same images
    orders = set()
    for epoch in range(5):
        sampler.set_epoch(epoch)
        orders.add(tuple(sampler))
    assert len(orders) == 5
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(50))}


def test_a_classifiers_epoch_resumes_at_every_index():
    repeats = class_balanced(np.repeat([0, 1], [20, 3]))
    options = {"seed": 6, "rank": 1, "world_size": 2}
    whole = RepeatSampler(repeats, **options)
    whole.set_epoch(2)
    expected = list(whole)
    assert len(expected) == len(whole) == 12
    for taken in range(13):
        resumed = RepeatSampler(repeats, **options)
        resumed.start(2, taken)
        assert list(resumed) == expected[taken:]
        assert len(resumed) == 12 - taken


def test_torchs_loader_takes_the_classifiers_sampler():
    labels = np.repeat([0, 1], [60, 4])
    loader = DataLoader(labels, batch_size=16, sampler=RepeatSampler(class_balanced(labels)))
    drawn = [label for batch in loader for label in batch.tolist()]
    assert (drawn.count(0), drawn.count(1)) == (32, 32)
    assert len(loader) == 4


def test_a_classifiers_senseless_settings_are_refused():
    repeats = class_balanced(np.arange(4))
    with pytest.raises(ValueError, match="rank must"):
        RepeatSampler(repeats, rank=2, world_size=2)
    with pytest.raises(ValueError, match="step must"):
        RepeatSampler(repeats).start(0, 5)


@pytest.mark.parametrize("num", [0, 1, 5, 64, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_sees_each_image_exactly_once(num, world_size):
    sizes = make_sizes(num)
    shares = []
    for rank in range(world_size):
        sampler = EvalSampler(sizes, batch_size=4, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(len(batch) == 4 for batch in batches[:-1])
        shares.append(images_of(batches))
    assert sorted(index for share in shares for index in share) == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_batches_are_of_similar_aspect():
    sizes = make_sizes(100)
    ratios = sizes[:, 1] / sizes[:, 0]
    batches = [[index for _, index in batch] for batch in EvalSampler(sizes, batch_size=5, rank=1, world_size=2)]
    assert sum(len(set(ratios[batch])) > 1 for batch in batches) <= 3
