"""The flat arrays that stand for a data set."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from retina.data.annotations import Annotations


def some_annotations() -> Annotations:
    """Three images: with two objects, with a crowd region, with none."""
    names = [b"a.jpg", "sub/é.jpg".encode(), b"\xed\xb3\xa9.png"]
    return Annotations(
        file=Path("some.json"),
        image_root=Path("images"),
        classes=("cat", "dog", "owl"),
        category_ids=(4, None, 17),
        image_ids=np.array([50, 7, 2**40]),
        sizes=np.array([[480, 640], [200, 100], [40, 30]]),
        offsets=np.array([0, 2, 3, 3]),
        boxes=np.array([[0, 0, 5, 5], [-2, 1, 5, 7], [1.5, 2, 11.5, 22.25]]),
        labels=np.array([0, 2, 2]),
        crowd=np.array([False, False, True]),
        areas=np.array([12.5, 42, 202.5]),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_offsets=np.cumsum([0, *map(len, names)]),
    )


def test_names_and_places() -> None:
    annotations = some_annotations()
    assert len(annotations) == 3
    assert [annotations.file_name(i) for i in (0, 1, 2, -1, -3)] == [
        "a.jpg",
        "sub/é.jpg",
        "\udce9.png",
        "\udce9.png",
        "a.jpg",
    ]
    assert annotations.path(1) == Path("images/sub/é.jpg")
    for outside in (3, -4):
        with pytest.raises(IndexError):
            annotations.file_name(outside)


def test_crowd_regions_are_not_counted() -> None:
    annotations = some_annotations()
    assert annotations.num_objects == 2
    np.testing.assert_array_equal(annotations.class_counts(), [1, 0, 1])


def test_fingerprint_is_that_of_checkpoints_written_before() -> None:
    """Runs are resumed by it: it must not change with how the arrays are kept."""
    a = some_annotations()
    parts = [a.names, a.name_offsets, a.image_ids, a.sizes, a.offsets, a.boxes, a.labels, a.crowd, a.areas]
    content = json.dumps([a.classes, a.category_ids]).encode() + b"".join(part.tobytes() for part in parts)
    assert a.fingerprint() == hashlib.sha256(content).hexdigest()
    assert a.fingerprint() == "93f59ba761f84f821cb4c55600d99e56561cca29dafc68f3db961f29693fe90d"
    turned = dataclasses.replace(a, boxes=np.asfortranarray(a.boxes), sizes=np.asfortranarray(a.sizes))
    assert turned.fingerprint() == a.fingerprint()


@pytest.mark.parametrize("name", ["image_ids", "sizes", "offsets", "boxes", "labels", "crowd", "areas", "names"])
def test_fingerprint_covers_every_array(name: str) -> None:
    a = some_annotations()
    changed = getattr(a, name).copy()
    changed.flat[-1] = not changed.flat[-1] if name == "crowd" else changed.flat[-1] - 1
    assert dataclasses.replace(a, **{name: changed}).fingerprint() != a.fingerprint()


def test_no_objects() -> None:
    nothing = {"boxes": np.empty((0, 4)), "labels": np.empty(0, np.int64), "crowd": np.empty(0, np.bool_)}
    empty = dataclasses.replace(some_annotations(), **nothing, areas=np.empty(0), offsets=np.zeros(4, np.int64))
    assert empty.num_objects == 0
    np.testing.assert_array_equal(empty.class_counts(), [0, 0, 0])
    assert empty.fingerprint() != some_annotations().fingerprint()
