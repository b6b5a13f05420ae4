"""Samples and batches: what they depend on, what bad images do to them, and what befalls worker processes."""

import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from faults import refused
from retina.data.coco import read_coco
from retina.data.dataset import CocoDetection
from retina.data.loader import BatchLoader, Canvas, LoaderConfig, collate, eval_loader, train_loader
from retina.data.sampler import DetectionBatchSampler, EvalSampler
from retina.data.transforms import (
    HorizontalFlip,
    LargeScaleJitter,
    Pipeline,
    ResizeShortSide,
    Transform,
    eval_pipeline,
    resize,
)
from retina.data.workers import Flag
from retina.errors import ConfigError, DataError, StoppedError

CANVAS = Canvas(16, (124, 116, 104))
SIZES = [(40, 60), (60, 40), (50, 50), (44, 60), (40, 52), (64, 48), (30, 70)]


@pytest.fixture
def annotations(tmp_path):
    """Seven noisy images; image i has i % 3 objects, the first of image 2 a crowd; image ids have gaps."""
    rng = np.random.default_rng(0)
    images, objects = [], []
    for index, (height, width) in enumerate(SIZES):
        name, image_id = f"{index}.png", 100 + 7 * index
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for number in range(index % 3):
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image_id,
                    "category_id": 3 + 4 * number,
                    "bbox": [2.25 + number, 3.5, 20, 10.5],
                    "area": 210,
                    "iscrowd": int(index == 2 and number == 0),
                }
            )
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    file = tmp_path / "instances_train.json"
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return read_coco(file, tmp_path)


def make_pipeline():
    return Pipeline({"jitter": LargeScaleJitter(48, 64, scale=[0.5, 1.5]), "flip": A.HorizontalFlip(p=0.5)})


def train_batches(annotations, *, num_workers, epochs, start=0, seed=11):
    config = LoaderConfig(num_workers)
    loader = train_loader(annotations, make_pipeline(), batch_size=2, seed=seed, canvas=CANVAS, config=config)
    batches = []
    for epoch in epochs:
        loader.batch_sampler.start(epoch, start)
        assert len(loader) == 4 - start
        batches += list(loader)
        start = 0
    return batches


def flatten(batch):
    return [batch.images, batch.sizes, *batch.targets, batch.indices, batch.original_sizes]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(flatten(one), flatten(other), strict=True):
            assert torch.equal(a, b)


def test_dataset_reads_what_the_file_states(annotations):
    sample = CocoDetection(annotations, Pipeline({}), seed=0)[0, 2]
    assert sample.image.shape == (50, 50, 3)
    np.testing.assert_allclose(sample.boxes, [[2.25, 3.5, 22.25, 14], [3.25, 3.5, 23.25, 14]], atol=1e-4)
    assert sample.boxes.dtype == np.float32
    assert sample.labels.tolist() == [0, 1]
    assert sample.crowd.tolist() == [True, False]
    assert (sample.index, sample.original_size) == (2, (50, 50))


def test_a_plain_index_is_a_whole_sample_of_epoch_0(annotations):
    dataset = CocoDetection(
        annotations, Pipeline({"flip": HorizontalFlip(), "resize": ResizeShortSide(32, 64)}), seed=4
    )
    for index in (0, 3, -1, np.int64(2)):
        sample = dataset[index]
        expected = dataset[0, range(7)[index]]
        assert (sample.size, sample.index) == (None, expected.index)
        np.testing.assert_array_equal(sample.image, resize(expected.image, expected.size))
        np.testing.assert_array_equal(sample.boxes, expected.boxes)
    with pytest.raises(IndexError):
        dataset[7]
    assert [sample.index for sample in dataset] == list(range(7))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_plain_loader_of_torch_serves_the_same_batches(annotations, num_workers):
    dataset = CocoDetection(annotations, eval_pipeline(32, 64))
    loader = DataLoader(dataset, batch_size=3, num_workers=num_workers, collate_fn=partial(collate, canvas=CANVAS))
    expected = [collate([dataset[0, i] for i in rows], CANVAS) for rows in ([0, 1, 2], [3, 4, 5], [6])]
    before = signal.getsignal(signal.SIGCHLD)
    try:
        assert_same(list(loader), expected)
    finally:
        signal.signal(signal.SIGCHLD, before)  # torch's own would raise the deaths of other tests' workers


def test_the_loaders_have_defaults(annotations):
    loader = train_loader(annotations, batch_size=2)
    loader.set_epoch(1)
    batch = next(iter(loader))
    assert batch.sizes.amin(dim=1).tolist() == [800, 800]
    assert all(side % 128 == 0 for side in batch.images.shape[2:])
    assert sorted(index for batch in eval_loader(annotations, batch_size=4) for index in batch.indices.tolist()) == [
        *range(7)
    ]


def test_a_sample_depends_on_seed_epoch_and_image_only(annotations):
    dataset = CocoDetection(annotations, make_pipeline(), seed=1)
    expected = {key: dataset[key] for key in [(0, 3), (1, 3), (0, 4)]}
    fresh = CocoDetection(annotations, make_pipeline(), seed=1)
    for key in reversed(expected):
        np.testing.assert_array_equal(fresh[key].image, expected[key].image)
        np.testing.assert_array_equal(fresh[key].boxes, expected[key].boxes)
    reseeded = CocoDetection(annotations, make_pipeline(), seed=2)
    variants = [expected[0, 3], expected[1, 3], reseeded[0, 3]]
    assert len({variant.image.tobytes() for variant in variants}) == 3


def test_large_photographs_are_decoded_smaller_with_boxes_where_they_belong(tmp_path):
    pixels = np.full((600, 800, 3), 60, dtype=np.uint8)
    box = [200, 120, 410, 367]
    pixels[box[1] : box[3], box[0] : box[2]] = 240
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    image = {"id": 1, "file_name": "a.jpg", "height": 600, "width": 800}
    x, y = box[:2]
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, y, box[2] - x, box[3] - y], "area": 1, "iscrowd": 0}
    document = {"images": [image], "annotations": [row], "categories": [{"id": 1, "name": "it"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    known = read_coco(tmp_path / "a.json", tmp_path)
    pipeline = Pipeline({"flip": A.HorizontalFlip(p=0.5), "resize": ResizeShortSide([110, 140], 300)})
    dataset = CocoDetection(known, pipeline, seed=0)
    assert dataset.read(0).image.shape == (150, 200, 3)
    assert dataset.read(0).original_size == (600, 800)
    sizes, flips = set(), set()
    for epoch in range(12):
        batch = collate([dataset[epoch, 0]], Canvas(32, (0, 0, 0)))
        bright = batch.images[0, 0].numpy() > 150
        ys, xs = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        shown = [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
        np.testing.assert_allclose(batch.targets.boxes[0, 0], shown, atol=0.75)
        sizes.add(tuple(batch.sizes[0].tolist()))
        flips.add(bool(shown[0] > batch.sizes[0, 1] / 2 - 10))
    assert sizes == {(110, 147), (140, 187)}
    assert flips == {True, False}
    assert batch.original_sizes.tolist() == [[600, 800]]
    known.sizes[0] = (300, 400)
    with refused("image-size", "a.jpg", "400x300", "800x600", kind=DataError):
        dataset.read(0)


def test_dataset_survives_the_way_to_a_spawned_worker(annotations):
    dataset = CocoDetection(annotations, make_pipeline(), seed=1)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[2, 5].image, dataset[2, 5].image)


def test_workers_change_nothing_over_two_epochs(annotations):
    alone = train_batches(annotations, num_workers=0, epochs=[0, 1])
    assert len(alone) == 8
    assert_same(train_batches(annotations, num_workers=1, epochs=[0, 1]), alone)
    assert_same(train_batches(annotations, num_workers=2, epochs=[0, 1]), alone)
    first = {int(i): image for batch in alone[:4] for i, image in zip(batch.indices, batch.images, strict=True)}
    second = {int(i): image for batch in alone[4:] for i, image in zip(batch.indices, batch.images, strict=True)}
    assert first.keys() == second.keys() == set(range(7))
    assert not any(torch.equal(first[i], second[i]) for i in range(7))


def test_resume_in_the_middle_of_an_epoch_yields_the_tail(annotations):
    whole = train_batches(annotations, num_workers=0, epochs=[0, 1])
    assert_same(train_batches(annotations, num_workers=1, epochs=[1], start=2), whole[6:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_states_alone(annotations, num_workers):
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    train_batches(annotations, num_workers=num_workers, epochs=[0, 1])
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


def test_images_stay_channels_last_on_their_way_from_a_worker(annotations):
    for batch in train_batches(annotations, num_workers=1, epochs=[0]):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_workers_change_nothing_where_the_collate_resizes(annotations):
    pipeline = Pipeline({"flip": A.HorizontalFlip(p=0.5), "resize": ResizeShortSide([48, 64, 80], 130)})
    found = []
    for num_workers in (0, 1, 2):
        config = LoaderConfig(num_workers)
        found.append(list(train_loader(annotations, pipeline, batch_size=2, seed=5, canvas=CANVAS, config=config)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_covers_the_set_once_over_ranks(annotations, num_workers):
    dataset = CocoDetection(annotations, eval_pipeline(32, 64), seed=0)
    seen = []
    for rank in range(2):
        sampler = EvalSampler(annotations.sizes, batch_size=3, rank=rank, world_size=2)
        loader = BatchLoader(dataset, sampler, Canvas(32), LoaderConfig(num_workers), training=False)
        for batch in loader:
            assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
            for size, original in zip(batch.sizes.tolist(), batch.original_sizes.tolist(), strict=True):
                assert min(size) == 32 or max(size) == 64
                assert size[0] / size[1] == pytest.approx(original[0] / original[1], rel=0.03)
            seen += batch.indices.tolist()
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_one_line(annotations, num_workers):
    file = annotations.path(4)
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(DataError) as error:
        train_batches(annotations, num_workers=num_workers, epochs=[0])
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_image_of_another_size_than_stated_is_a_fault(annotations):
    Image.new("RGB", (60, 41)).save(annotations.path(0))
    with refused("image-size", "image id 100 (0.png)", "60x40", "60x41", kind=DataError):
        CocoDetection(annotations, make_pipeline(), seed=0)[0, 0]


def test_an_image_of_more_pixels_than_allowed_is_a_fault(annotations):
    dataset = CocoDetection(annotations, make_pipeline(), seed=0, max_pixels=2400)
    assert dataset[0, 0].original_size == (40, 60)
    with refused("too-many-pixels", "2.png", "50x50", "max_pixels=2400", kind=DataError):
        dataset[0, 2]


class Faulty(A.DualTransform):
    """Fails where the image's first pixel says so."""

    _targets = (A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES)

    def __init__(self, how):
        super().__init__(p=1.0)
        self.how = how

    def get_params_dependent_on_data(self, params, data):
        return {"bad": data["image"][0, 0].tolist() == [9, 9, 9]}

    def apply(self, img, bad, **params):
        if bad and self.how == "opencv":
            return cv2.resize(img, (0, 0))
        if bad and self.how == "memory":
            np.empty(1 << 60, dtype=np.uint8)
        return img

    def apply_to_bboxes(self, bboxes, bad, **params):
        bboxes = bboxes.copy()
        if bad and self.how in ("nan", "inf"):
            bboxes[0, 1] = float(self.how)
        return bboxes


@pytest.mark.parametrize("how", ["opencv", "memory", "nan", "inf"])
def test_a_transform_that_fails_makes_its_image_a_bad_one(annotations, how):
    Image.new("RGB", SIZES[4][::-1], (9, 9, 9)).save(annotations.path(4))
    dataset = CocoDetection(annotations, Pipeline({"flip": A.HorizontalFlip(), "odd": Faulty(how)}), seed=0)
    with pytest.raises(DataError) as caught:
        dataset[3, 4]
    line = str(caught.value)
    assert line.startswith(f"{annotations.path(4)}: augment (flip, odd) failed in epoch 3 (")
    assert "\n" not in line
    assert len(line) < 600
    loader = make_loader(dataset, total_batch=7, max_bad_fraction=0.2)
    (batch,) = loader
    assert loader.faults.keys() == {4}
    assert sorted(batch.indices.tolist()) == [0, 1, 2, 3, 5, 5, 6]
    assert batch.targets.boxes.isfinite().all()


def test_wrong_settings_of_augmentation_are_not_blamed_on_images(annotations):
    dataset = CocoDetection(annotations, Pipeline({"norm": A.Normalize()}), seed=0)
    for num_workers in (0, 1):
        loader = make_loader(dataset, num_workers=num_workers, max_bad_fraction=1.0)
        for _ in range(2):
            with refused("augment", "augment: norm", "float32", kind=ConfigError):
                list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_canvas_too_small_is_a_fault_of_the_settings(annotations, num_workers):
    dataset = CocoDetection(annotations, eval_pipeline(40, None), seed=0)
    loader = make_loader(dataset, num_workers=num_workers, max_bad_fraction=1.0, canvases=[(64, 80), (80, 64)])
    with refused("canvas", "canvases: ", "64x80, 80x64", "60x93", kind=ConfigError):
        list(loader)
    loader.section = "data"
    with refused("canvas", "data.canvases: ", kind=ConfigError):
        list(loader)


NUM, BAD = 50, [7, 20, 21, 33, 49]


@pytest.fixture
def damaged(tmp_path):
    """Fifty images, five of them bad in different ways: two in a row, and the last."""
    rng = np.random.default_rng(1)
    images = []
    for index in range(NUM):
        name = f"{index:02}.png"
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
        images.append({"id": 1000 - index, "file_name": name, "height": 20, "width": 30})
    boxes = [
        {"id": i, "image_id": 1000 - i, "category_id": 1, "bbox": [2, 3, 10, 10], "area": 100, "iscrowd": 0}
        for i in range(NUM)
    ]
    file = tmp_path / "instances_train.json"
    categories = [{"id": 1, "name": "cat"}]
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    paths = [tmp_path / f"{index:02}.png" for index in BAD]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:700])
    paths[2].write_bytes(b"<html>404</html>")
    paths[3].unlink()
    Image.new("RGB", (31, 20)).save(paths[4])
    return read_coco(file, tmp_path)


def make_loader(dataset, *, num_workers=0, max_bad_fraction=0.0, total_batch=8, start=(0, 0), canvases=None):
    annotations = dataset.annotations
    sampler = DetectionBatchSampler(annotations.sizes, total_batch=total_batch, seed=dataset.seed)
    sampler.start(*start)
    config = LoaderConfig(num_workers, max_bad_fraction=max_bad_fraction)
    return BatchLoader(dataset, sampler, Canvas(16, CANVAS.pad_value, canvases), config, training=True)


def substituted(index):
    while index in BAD:
        index = (index + 1) % NUM
    return index


def test_in_training_the_next_readable_image_takes_the_place_of_a_bad_one(damaged):
    dataset = CocoDetection(damaged, make_pipeline(), seed=3)
    wanted = DetectionBatchSampler(damaged.sizes, total_batch=8, seed=3).global_batches(0)
    loader = make_loader(dataset, max_bad_fraction=0.1)
    batches = list(loader)
    assert [[substituted(index) for index in batch] for batch in wanted.tolist()] == [
        b.indices.tolist() for b in batches
    ]
    assert {len(batch.images) for batch in batches} == {8}
    assert sorted(loader.faults) == BAD
    for index, line in loader.faults.items():
        assert f"{index:02}.png" in line
        assert "\n" not in line
        assert " - " in line


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_are_the_same_whatever_the_workers_and_wherever_resumed(damaged, num_workers):
    """Bit for bit, bad images and all."""
    dataset = CocoDetection(damaged, make_pipeline(), seed=3)
    expected = [batch for epoch in (0, 1) for batch in make_loader(dataset, max_bad_fraction=0.1, start=(epoch, 0))]
    assert len(expected) == 14
    options = {"num_workers": num_workers, "max_bad_fraction": 0.1}
    loader = make_loader(dataset, **options)
    whole = list(loader)
    loader.batch_sampler.set_epoch(1)
    assert_same(whole + list(loader), expected)
    assert sorted(loader.faults) == BAD
    resumed = make_loader(dataset, start=(1, 4), **options)
    assert_same(list(resumed), expected[7 + 4 :])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_in_evaluation_a_bad_image_is_left_out(damaged, num_workers, batch_size):
    dataset = CocoDetection(damaged, eval_pipeline(20, 30), seed=0)
    seen, faults = [], []
    for rank in range(2):
        sampler = EvalSampler(damaged.sizes, batch_size=batch_size, rank=rank, world_size=2)
        config = LoaderConfig(num_workers, max_bad_fraction=0.1)
        loader = BatchLoader(dataset, sampler, CANVAS, config, training=False)
        batches = list(loader)
        assert all(len(batch.images) > 0 for batch in batches)
        seen += [index for batch in batches for index in batch.indices.tolist()]
        faults += loader.faults
        assert list(loader) != []
    assert sorted(seen) == sorted(set(range(NUM)) - set(BAD))
    assert sorted(faults) == BAD


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_bad_images_than_allowed_are_one_line(damaged, num_workers):
    dataset = CocoDetection(damaged, make_pipeline(), seed=3)
    order = DetectionBatchSampler(damaged.sizes, total_batch=8, seed=3).global_batches(0).ravel().tolist()
    first = next(index for index in order if index in BAD)
    with refused("bad-images", "max_bad_fraction: 0.09", "5 of 50", f"{first:02}.png", kind=DataError):
        list(make_loader(dataset, num_workers=num_workers, max_bad_fraction=0.09))
    with refused("bad-image", f"{first:02}.png", kind=DataError):
        list(make_loader(dataset, num_workers=num_workers, max_bad_fraction=0.0))


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, 0), (0.01, 0), (0.02, 1), (0.58, 29), (0.999, 49), (1.0, 49)])
def test_how_many_may_be_bad(damaged, fraction, allowed):
    """Rounded down, but not by what floating point makes of 0.58 * 50; and never all."""
    assert make_loader(CocoDetection(damaged, Pipeline({}), seed=0), max_bad_fraction=fraction).max_bad == allowed


@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_one_good_image_there_is_an_end(annotations, num_workers):
    for index in range(len(annotations)):
        annotations.path(index).unlink()
    dataset = CocoDetection(annotations, make_pipeline(), seed=3)
    with refused("bad-images", "7 of 7", "6 would be", kind=DataError):
        list(make_loader(dataset, num_workers=num_workers, max_bad_fraction=1.0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_vanishes_during_training(annotations, num_workers):
    loader = make_loader(
        CocoDetection(annotations, make_pipeline(), seed=3),
        num_workers=num_workers,
        max_bad_fraction=0.2,
        total_batch=1,
    )
    assert len(list(loader)) == 7
    assert loader.faults == {}
    annotations.path(3).unlink()
    loader.batch_sampler.set_epoch(1)
    assert sorted(int(batch.indices[0]) for batch in loader) == [0, 1, 2, 4, 4, 5, 6]
    assert loader.faults.keys() == {3}
    assert "3.png: no such image - " in loader.faults[3]


def test_a_batch_in_the_making_holds_no_large_images(tmp_path):
    """They are resized when they are read, to the same pixels that the collate would make of them."""
    image = np.zeros((2100, 2000, 3), np.uint8)
    image[500:900, ::3] = 255
    Image.fromarray(image).save(tmp_path / "a.png", compress_level=1)
    record = {"id": 1, "file_name": "a.png", "height": 2100, "width": 2000}
    file = tmp_path / "instances_train.json"
    file.write_text(json.dumps({"images": [record], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}))
    dataset = CocoDetection(read_coco(file, tmp_path), eval_pipeline(64, 64))
    sample = dataset[0, 0]
    assert sample.image.shape[:2] == sample.size == (64, 61)
    batch = collate([sample], CANVAS)
    np.testing.assert_array_equal(batch.images[0, :, :64, :61].permute(1, 2, 0), resize(image, (64, 61)))


def workers_of(loader):
    return [worker.pid for worker in loader._iterator._workers]


def test_a_worker_that_is_killed_is_one_line_where_batches_are_taken(annotations, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # DataLoader looks every 5 s
    before = signal.getsignal(signal.SIGCHLD)
    loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=2, total_batch=1)
    batches = iter(loader)
    next(batches)
    killed, other = workers_of(loader)
    assert isinstance(loader._iterator._workers_done_event, Flag)  # one with a lock might never be free again
    os.kill(killed, signal.SIGKILL)
    time.sleep(0.3)  # here, DataLoader's own handler would raise
    assert signal.getsignal(signal.SIGCHLD) is before
    with refused("dead-worker", "num_workers: 2", killed, "signal 9"):
        list(batches)
    assert is_gone(other, within=1000)


def test_a_worker_that_was_killed_between_epochs(annotations, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=1)
    list(loader)
    os.kill(workers_of(loader)[0], signal.SIGKILL)
    with refused("dead-worker", "num_workers: 1", "signal 9"):
        list(loader)


def test_workers_ignore_the_signals_that_stop_a_run(annotations):
    loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=2, total_batch=1)
    batches = iter(loader)
    next(batches)
    for worker in workers_of(loader):
        for name in ("INT", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker)], check=True)  # SIGTERM of the main process is obeyed
    assert len(list(batches)) == 6
    loader.batch_sampler.set_epoch(1)
    assert len(list(loader)) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_worker_starts_reaches_it_not(annotations, number, monkeypatch):
    """At the first instant of its life it has the handlers of the main process, or none."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    here = os.getpid()
    armed = [True]
    os.register_at_fork(after_in_child=lambda: armed and os.getppid() == here and os.kill(os.getpid(), number))
    handled = []
    previous = signal.signal(number, lambda *_: (handled.append(os.getpid()), os._exit(3)))
    try:
        loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=2)
        assert len(list(loader)) == 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    finally:
        armed.clear()
        signal.signal(number, previous)


def is_gone(pid, *, within):
    """Whether a process ends in that many seconds; one that only waits for its parent to take note has ended."""
    stat = Path(f"/proc/{pid}/stat")
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_workers_end_when_the_main_process_is_killed(annotations):
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def train():
        loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=2, total_batch=1)
        next(iter(loader))
        theirs.send(workers_of(loader))
        time.sleep(3000)

    process = fork.Process(target=train)
    process.start()
    assert ours.poll(1000)
    workers = ours.recv()
    assert len(workers) == 2
    assert not any(is_gone(worker, within=0.1) for worker in workers)
    process.kill()
    process.join()
    assert all(is_gone(worker, within=1000) for worker in workers)


class Freeze(Transform):
    """Stops the process that applies it, as `kill -STOP` does: from outside it looks as on a disk that hangs."""

    def apply(self, image, boxes, generator):
        os.kill(os.getpid(), signal.SIGSTOP)
        return image, boxes


def test_a_worker_that_hangs_is_not_waited_for_without_end(annotations):
    dataset = CocoDetection(annotations, Pipeline({"freeze": Freeze()}))
    sampler = DetectionBatchSampler(annotations.sizes, total_batch=1, seed=3)
    loader = BatchLoader(dataset, sampler, Canvas(32), LoaderConfig(1, timeout=0.5), training=True)
    loader.section = "data"
    ((_, first),) = next(iter(sampler))
    begun = iter(loader)
    (worker,) = workers_of(loader)
    with refused("data-timeout", "data.timeout: 0.5", annotations.path(first)):
        next(begun)
    assert is_gone(worker, within=1000)


@pytest.mark.parametrize("batches_before", [0, 3])
def test_a_signal_is_heeded_though_a_worker_hangs(annotations, batches_before):
    """Also where a batch that it has finished lies ready: its pixels are asked from a process that answers no more."""
    loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=1, total_batch=1)
    asked = []
    loader.stopping = lambda: signal.SIGTERM if asked else 0
    batches = iter(loader)
    for _ in range(batches_before):
        next(batches)
    (worker,) = workers_of(loader)
    os.kill(worker, signal.SIGSTOP)
    asked.append(True)
    with pytest.raises(StoppedError) as caught:
        list(batches)
    assert caught.value.signal == signal.SIGTERM
    assert is_gone(worker, within=1000)


def test_a_worker_that_hangs_between_epochs(annotations):
    loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=1)
    list(loader)
    os.kill(workers_of(loader)[0], signal.SIGSTOP)
    loader.stopping = lambda: signal.SIGINT
    with pytest.raises(StoppedError):
        list(loader)


KEPT = []


def test_a_process_ends_though_it_has_workers(annotations):
    """With SIGTERM ignored altogether, it would wait for them without end."""

    def train():
        loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=2)
        KEPT.append((loader, list(loader)))

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join(1000)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()


def test_full_shared_memory_is_one_line_and_no_endless_wait(annotations):
    """A limit on the size of files, which shared memory is made of, stands for a small /dev/shm."""
    loader = make_loader(CocoDetection(annotations, make_pipeline(), seed=3), num_workers=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        batches = iter(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with refused("out-of-memory", "num_workers: "):
        next(batches)
