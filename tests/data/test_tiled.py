"""Crops and tiles of annotated images: what they show of objects, and when."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faults import refused
from retina.data.annotations import Annotations, offsets_of
from retina.data.loader import train_loader
from retina.data.repeats import Repeats
from retina.data.sampler import DetectionBatchSampler
from retina.data.tile_dataset import dataset_of
from retina.data.tiled import Crops, choose_tile, objects_inside, tiles_of
from retina.data.transforms import Pipeline
from retina.data.windows import Tiling

TILING = Tiling((64, 64), 0.25)


def annotated(root: Path, images: list[tuple[tuple[int, int], list[list[float]]]], pixels: bool = False) -> Annotations:
    """Images of (height, width) with boxes; object n of an image is a patch of the colour n + 1, of class n % 2."""
    names = [f"{row}.png" for row in range(len(images))]
    for name, (size, boxes) in zip(names, images, strict=True) if pixels else []:
        array = np.zeros((*size, 3), np.uint8)
        for number, (x1, y1, x2, y2) in enumerate(np.array(boxes, int).reshape(-1, 4).tolist()):
            array[y1:y2, x1:x2] = number + 1
        Image.fromarray(array).save(root / name)
    counts = [len(boxes) for _, boxes in images]
    boxes = np.array([box for _, of_image in images for box in of_image], np.float64).reshape(-1, 4)
    return Annotations(
        file=root / "x.json",
        image_root=root,
        classes=("even", "odd"),
        category_ids=(1, 2),
        image_ids=np.arange(len(images)),
        sizes=np.array([size for size, _ in images]),
        offsets=offsets_of(np.array(counts)),
        boxes=boxes,
        labels=np.concatenate([np.arange(count) % 2 for count in counts]).astype(np.int64),
        crowd=np.zeros(len(boxes), bool),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        names=np.frombuffer("".join(names).encode(), np.uint8),
        name_offsets=offsets_of(np.array([len(name) for name in names])),
    )


@st.composite
def scenes(draw: st.DrawFn) -> tuple[tuple[int, int], np.ndarray]:
    size = draw(st.integers(20, 300)), draw(st.integers(20, 300))
    boxes = []
    for _ in range(draw(st.integers(0, 8))):
        width, height = draw(st.integers(2, min(100, size[1]))), draw(st.integers(2, min(100, size[0])))
        x, y = draw(st.integers(0, size[1] - width)), draw(st.integers(0, size[0] - height))
        boxes.append((x, y, x + width, y + height))
    return size, np.array(boxes, np.float64).reshape(-1, 4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scenes(), st.integers(0, 2**63), st.sampled_from([0.0, 0.3]))
def test_a_crop_holds_an_object_whole(scene: tuple[tuple[int, int], np.ndarray], seed: int, empty: float) -> None:
    size, boxes = scene
    top, left, bottom, right = Crops(TILING, empty).window(size, boxes, seed)
    assert (bottom - top, right - left) == (min(size[0], 64), min(size[1], 64))
    assert 0 <= top < bottom <= size[0]
    assert 0 <= left < right <= size[1]
    inside = (boxes >= [left, top, left, top]).all(axis=1) & (boxes <= [right, bottom, right, bottom]).all(axis=1)
    larger = (boxes[:, 2:] - boxes[:, :2] > 64).any(axis=1)
    shown = len(objects_inside(boxes, np.zeros(len(boxes), bool), (top, left, bottom, right)).rows)
    if len(boxes) and not larger.any():
        assert inside.any() or (empty > 0 and shown == 0)


def test_whole_images_are_among_the_crops_where_wanted() -> None:
    boxes, size = np.array([[10.0, 10, 300, 300]]), (320, 320)
    tiling = TILING._replace(whole=True)
    wholes = [Crops(tiling, 0.0).window(size, boxes, seed) == (0, 0, *size) for seed in range(600)]
    share = 1 / (1 + len(TILING.windows(size)))
    assert 0.5 * share < sum(wholes) / 600 < 1.7 * share
    assert not any(Crops(TILING, 0.0).window(size, boxes, seed) == (0, 0, *size) for seed in range(600))


def test_crops_without_objects_have_their_share() -> None:
    boxes = np.array([[10.0, 10, 30, 30]])
    crops = [Crops(TILING, 0.25).window((400, 400), boxes, seed) for seed in range(400)]
    shown = [len(objects_inside(boxes, np.zeros(1, bool), window).rows) for window in crops]
    assert 0.19 < shown.count(0) / 400 < 0.31
    assert len({window for window, one in zip(crops, shown, strict=True) if one}) > 100, "many places"


@pytest.mark.parametrize(("x", "crowd"), [(40, False), (63, None), (54, False), (55, True), (64, None)])
def test_half_of_an_object_is_one_and_less_is_ignored(x: int, crowd: bool | None) -> None:
    """An object of 20 x 10 pixels at x, y = 10, in the tile of 64 pixels at the corner."""
    boxes = np.array([[x, 10, x + 20, 20]], np.float64)
    inside = objects_inside(boxes, np.zeros(1, bool), (0, 0, 64, 64))
    if x == 64:
        assert len(inside.rows) == 0
    else:
        assert inside.crowd.tolist() == [x > 54]
        assert inside.boxes.tolist() == [[x, 10, min(64, x + 20), 20]]


def test_tiles_of_a_data_set_are_records(tmp_path: Path) -> None:
    whole = annotated(tmp_path, [((100, 200), [[5, 5, 15, 15], [190, 90, 200, 100]]), ((40, 50), [])])
    tiles = tiles_of(whole, TILING)
    assert tiles.sizes[tiles.image_of == 0].tolist() == [[64, 64]] * (np.count_nonzero(tiles.image_of == 0))
    assert tiles.sizes[-1].tolist() == [40, 50], "an image smaller than a tile is a tile of its own"
    assert [tiles.file_name(row) for row in (0, len(tiles) - 1)] == ["0.png", "1.png"]
    corner = tiles.windows[tiles.image_of == 0][-1]
    last = int(np.flatnonzero(tiles.image_of == 0)[-1])
    rows = slice(tiles.offsets[last], tiles.offsets[last + 1])
    assert tiles.boxes[rows].tolist() == [[190 - corner[1], 90 - corner[0], 200 - corner[1], 100 - corner[0]]]
    assert tiles.labels[rows].tolist() == [1]
    seen = tiles_of(whole, TILING, with_objects=True)
    assert 0 < len(seen) < len(tiles)
    assert (np.diff(seen.offsets) > 0).all()
    assert len(tiles_of(whole, TILING._replace(whole=True))) == len(tiles) + 1
    with refused("no-objects", "x.json", "tile"):
        tiles_of(annotated(tmp_path, [((100, 100), [])]), TILING, with_objects=True)


def test_samples_show_the_pixels_of_their_window(tmp_path: Path) -> None:
    boxes = [[10 * n, 15 * n, 10 * n + 8, 15 * n + 9] for n in range(10)]
    whole = annotated(tmp_path, [((160, 130), boxes)], pixels=True)
    for annotations, crops in ((whole, Crops(TILING, 0.0)), (tiles_of(whole, TILING), None)):
        dataset = dataset_of(annotations, Pipeline({}), crops=crops)
        for key in [(epoch, row) for epoch in range(3) for row in range(len(annotations))]:
            sample = dataset[key]
            assert sample.image.shape[:2] == sample.original_size == (64, 64)
            for (x1, y1, x2, y2), crowd in zip(sample.boxes.astype(int).tolist(), sample.crowd.tolist(), strict=True):
                patch = sample.image[y1:y2, x1:x2]
                assert patch.min() == patch.max() > 0
                assert crowd or (patch.shape[0] * patch.shape[1]) * 2 >= 72


def test_a_file_of_another_size_is_one_line(tmp_path: Path) -> None:
    whole = annotated(tmp_path, [((100, 100), [[1, 1, 9, 9]])], pixels=True)
    wrong = replace(whole, sizes=whole.sizes + 1)
    for annotations, crops in ((wrong, Crops(TILING, 0.0)), (tiles_of(wrong, TILING), None)):
        with refused("image-size", "x.json", "id 0"):
            dataset_of(annotations, Pipeline({}), crops=crops)[0]


def test_the_order_of_crops_is_exact_from_any_step(tmp_path: Path) -> None:
    scene = [((160, 130), [[10 * n, 15 * n, 10 * n + 8, 15 * n + 9] for n in range(10)]), ((70, 300), [])]
    whole = annotated(tmp_path, scene, pixels=True)
    crops = Crops(TILING, 0.2)
    repeats = crops.repeats(whole, None)
    assert repeats.num_draws > len(whole)

    def batches(step: int, workers: int = 0) -> list[bytes]:
        from retina.data.loader import LoaderConfig

        sampler = DetectionBatchSampler(whole.sizes, total_batch=2, seed=3, repeats=repeats)
        loader = train_loader(
            whole, Pipeline({}), sampler=sampler, crops=crops, seed=3, config=LoaderConfig(num_workers=workers)
        )
        sampler.start(1, step)
        return [batch.images.numpy().tobytes() + batch.targets.boxes.numpy().tobytes() for batch in loader]

    every = batches(0)
    assert len(set(every)) > len(every) / 2, "crops of one image differ within an epoch"
    assert batches(2) == every[2:]
    assert batches(0, workers=2) == every


def test_repeats_follow_the_objects_and_other_repeats(tmp_path: Path) -> None:
    many = [[x, y, x + 5, y + 5] for x in range(0, 300, 30) for y in range(0, 300, 30)]
    whole = annotated(tmp_path, [((320, 320), many), ((320, 320), [[0, 0, 5, 5]]), ((320, 320), [])])
    times = Crops(TILING, 0.5).repeats(whole, None).times
    windows = len(TILING.windows((320, 320)))
    assert times[0] == 2 * windows
    assert times[1] == 2
    assert times[2] == windows / 2
    twice = Repeats(np.array([1]), np.array([2.0]), np.zeros(1, np.int64))
    assert Crops(TILING, 0.5).repeats(whole, twice).times.tolist() == [4]


def test_tiles_are_chosen_where_the_smallest_objects_would_be_lost(tmp_path: Path) -> None:
    def of(size: int, side: int) -> Annotations:
        generator = random.Random(0)
        corners = [(generator.randrange(size - side), generator.randrange(size - side)) for _ in range(50)]
        return annotated(tmp_path, [((size, size), [[x, y, x + side, y + side] for x, y in corners])])

    tile = choose_tile(of(5000, 20), 800, 1333)
    assert tile == (512, 512), "20 px become 31"
    assert choose_tile(of(5000, 300), 800, 1333) is None, "large enough when shrunk"
    assert choose_tile(of(400, 6), 800, 1333) is None, "as large as the image"
    assert choose_tile(annotated(tmp_path, [((5000, 5000), [])]), 800, 1333) is None
