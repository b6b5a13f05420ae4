"""The drawn data set: what it holds, that it is the same every time, and that it is written whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faults import refused
from retina.data.coco import Annotations, read_coco
from retina.data.images import read_image
from retina.data.layouts import locate_split
from retina.data.shapes import _draw_background, _draw_image, write_shapes
from retina.errors import ConfigError, DataError

SMALL = {"num_train": 5, "num_val": 2, "image_size": (96, 128)}


def digest(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Annotations:
    """Three hundred images, small ones."""
    root = tmp_path_factory.mktemp("many") / "shapes"
    write_shapes(root, num_train=300, num_val=1, image_size=(96, 128))
    return read_coco(*locate_split(root, "train"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_shapes(tmp_path / "shapes", **SMALL)
    return tmp_path / "shapes"


def test_layout_is_read_back(small):
    for split, num in (("train", 5), ("val", 2)):
        annotations = read_coco(*locate_split(small, split))
        assert len(annotations) == num
        assert annotations.classes == ("circle", "rectangle", "triangle", "star", "ring")
        for index in range(num):
            assert read_image(annotations.path(index)).shape[:2] == tuple(annotations.sizes[index])
    assert sorted(p.name for p in small.parent.iterdir()) == ["shapes"]


def test_shares_of_the_classes_have_a_long_tail(many):
    shares = many.class_counts() / many.num_objects
    np.testing.assert_allclose(shares, [0.36, 0.28, 0.20, 0.13, 0.03], atol=0.035)
    assert 0.015 < shares.min() < 0.045


def test_boxes_are_inside_and_of_many_sizes(many):
    sizes = np.repeat(many.sizes, np.diff(many.offsets), axis=0)
    assert (many.boxes >= 0).all()
    assert (many.boxes[:, 2:] <= sizes[:, ::-1]).all()
    sides = many.boxes[:, 2:] - many.boxes[:, :2]
    assert sides.min() >= 5
    assert np.percentile(sides.max(axis=1), 95) > 30
    np.testing.assert_allclose(many.areas, sides.prod(axis=1))
    touches = (many.boxes == 0).any(axis=1) | (many.boxes[:, 2:] == sizes[:, ::-1]).any(axis=1)
    assert 0.05 < touches.mean() < 0.35


def test_some_images_are_empty_and_shapes_vary(many):
    counts = np.diff(many.offsets)
    assert 0.04 < (counts == 0).mean() < 0.13
    assert counts.max() >= 8
    kinds, frequencies = np.unique(many.sizes, axis=0, return_counts=True)
    assert kinds.tolist() == [[96, 96], [96, 128], [128, 96]]
    assert frequencies.min() > 45


def test_boxes_are_tight_around_what_is_drawn():
    """Where there is one shape, its box is that of the pixels that differ from the background alone."""
    checked = 0
    for seed in range(60):
        image, labels, boxes = _draw_image(np.random.default_rng(seed), (128, 160))
        if len(labels) != 1:
            continue
        rng = np.random.default_rng(seed)
        rng.integers(4)  # the choice of the image's size comes first
        background = np.clip(_draw_background(rng, *image.shape[:2]), 0, 255).transpose(1, 2, 0)
        changed = np.abs(image - background).max(axis=2) > 10
        ys, xs = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        np.testing.assert_allclose(boxes[0], [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], atol=1.01)
        checked += 1
    assert checked >= 4


def test_hidden_shapes_keep_a_box_of_what_is_seen():
    """No two shapes have nearly the same box, as a shape under another one would."""
    for seed in range(40):
        _, _, boxes = _draw_image(np.random.default_rng(seed), (128, 160))
        for index, a in enumerate(np.array(boxes)):
            others = np.delete(np.array(boxes), index, axis=0)
            overlap = np.clip(np.minimum(a[2:], others[:, 2:]) - np.maximum(a[:2], others[:, :2]), 0, None).prod(axis=1)
            union = (a[2:] - a[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - overlap
            assert (overlap / union < 0.9).all()


def test_same_arguments_same_bytes_and_other_seeds_other_pictures(small, tmp_path):
    write_shapes(tmp_path / "again", **SMALL)
    write_shapes(tmp_path / "other", **SMALL, seed=1)
    assert digest(tmp_path / "again") == digest(small)
    original, other = digest(small), digest(tmp_path / "other")
    assert original.keys() == other.keys()
    assert all(original[name] != other[name] for name in original)
    assert len(set(original.values())) == len(original)


def test_a_larger_set_begins_with_the_smaller_one(small, tmp_path):
    write_shapes(tmp_path / "larger", **SMALL | {"num_train": 7})
    larger = digest(tmp_path / "larger")
    pictures = {name: value for name, value in digest(small).items() if name.endswith(".jpg")}
    assert pictures.items() <= larger.items()


def test_a_finished_set_is_left_alone(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    write_shapes(small, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_other_content_is_never_overwritten(small, tmp_path):
    before = digest(small)
    with refused("other-shapes", small, kind=DataError):
        write_shapes(small, **SMALL, seed=4)
    assert digest(small) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with refused("not-shapes", "mine", kind=DataError):
        write_shapes(tmp_path / "mine", **SMALL)
    assert digest(tmp_path / "mine").keys() == {"thesis.txt"}
    with refused("not-shapes", "thesis.txt", kind=DataError):
        write_shapes(tmp_path / "mine" / "thesis.txt", **SMALL)


def test_an_empty_folder_is_filled(tmp_path):
    write_shapes(tmp_path, num_train=1, num_val=1, image_size=[64, 64])  # as a list, as YAML has it
    assert len(read_coco(*locate_split(tmp_path, "val"))) == 1


def test_a_set_with_pictures_gone_is_noticed(small):
    next((small / "val").iterdir()).unlink()
    with refused("incomplete-shapes", "val: ", "2", kind=DataError):
        write_shapes(small, **SMALL)


def test_several_callers_at_once_share_one_set(small, tmp_path):
    root = tmp_path / "shared"
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(write_shapes, root, **SMALL) for _ in range(3)]:
            future.result()
    assert digest(root) == digest(small)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shapes", "shared"]


def test_a_killed_generation_leaves_no_set(tmp_path):
    root = tmp_path / "shapes"
    code = f"from pathlib import Path; from retina.data.shapes import write_shapes; write_shapes(Path({str(root)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 1000
        while not list(tmp_path.glob(".shapes.*.tmp/train/*.jpg")) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.glob(".shapes.*.tmp/train/*.jpg"))
    assert not root.exists()
    write_shapes(root, **SMALL)
    assert len(read_coco(*locate_split(root, "train"))) == 5


def test_permissions_are_the_usual_ones(small):
    (small.parent / "plain").mkdir()
    assert os.stat(small).st_mode == os.stat(small.parent / "plain").st_mode


@pytest.mark.parametrize(
    "change",
    [{"num_train": 0}, {"num_val": -1}, {"image_size": (320, 256)}, {"image_size": [8, 9]}, {"image_size": [256]}],
)
def test_impossible_settings(tmp_path, change):
    with refused("shapes", *change, kind=ConfigError):
        write_shapes(tmp_path / "shapes", **SMALL | change)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_jpeg_with_sparse_categories(small):
    with Image.open(small / "train" / "000000.jpg") as image:
        assert image.format == "JPEG"
    document = json.loads((small / "annotations" / "instances_train.json").read_text())
    assert [c["id"] for c in document["categories"]] == [3, 7, 11, 20, 42]
    ids = [a["id"] for a in document["annotations"]]
    assert len(ids) == len(set(ids)) > 0
    assert min(ids) == 1
