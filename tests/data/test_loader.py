import json
import pickle

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

from retina.data.coco import read_coco
from retina.data.dataset import DetectionDataset
from retina.data.loader import eval_loader, train_loader
from retina.data.sampler import DetectionBatchSampler, EvalSampler
from retina.data.transforms import LargeScaleJitter, Pipeline, eval_pipeline
from retina.errors import DataError

PAD = (124, 116, 104)
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
    dataset = DetectionDataset(annotations, make_pipeline(), seed=seed)
    sampler = DetectionBatchSampler(annotations.sizes, total_batch=2, seed=seed)
    loader = train_loader(dataset, sampler, num_workers=num_workers, divisor=16, pad_value=PAD)
    batches = []
    for epoch in epochs:
        sampler.start(epoch, start)
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
    sample = DetectionDataset(annotations, Pipeline({}), seed=0)[0, 2]
    assert sample.image.shape == (50, 50, 3)
    np.testing.assert_allclose(sample.boxes, [[2.25, 3.5, 22.25, 14], [3.25, 3.5, 23.25, 14]], atol=1e-4)
    assert sample.boxes.dtype == np.float32
    assert sample.labels.tolist() == [0, 1]
    assert sample.crowd.tolist() == [True, False]
    assert (sample.index, sample.original_size) == (2, (50, 50))


def test_a_sample_depends_on_seed_epoch_and_image_only(annotations):
    dataset = DetectionDataset(annotations, make_pipeline(), seed=1)
    expected = {key: dataset[key] for key in [(0, 3), (1, 3), (0, 4)]}
    fresh = DetectionDataset(annotations, make_pipeline(), seed=1)
    for key in reversed(expected):
        np.testing.assert_array_equal(fresh[key].image, expected[key].image)
        np.testing.assert_array_equal(fresh[key].boxes, expected[key].boxes)
    reseeded = DetectionDataset(annotations, make_pipeline(), seed=2)
    variants = [expected[0, 3], expected[1, 3], reseeded[0, 3]]
    assert len({variant.image.tobytes() for variant in variants}) == 3


def test_dataset_survives_the_way_to_a_spawned_worker(annotations):
    dataset = DetectionDataset(annotations, make_pipeline(), seed=1)
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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_covers_the_set_once_over_ranks(annotations, num_workers):
    dataset = DetectionDataset(annotations, eval_pipeline(32, 64), seed=0)
    seen = []
    for rank in range(2):
        sampler = EvalSampler(annotations.sizes, batch_size=3, rank=rank, world_size=2)
        loader = eval_loader(dataset, sampler, num_workers=num_workers, divisor=32, pad_value=PAD)
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
    with pytest.raises(DataError, match=r"image id 100 \(0.png\): stated as 60x40, but the file is 60x41"):
        DetectionDataset(annotations, make_pipeline(), seed=0)[0, 0]
