"""Several data sets as one, and parts of one."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from retina.data.annotations import Annotations
from retina.data.coco import read_coco
from retina.data.join import join, select, share
from retina.data.results import write_results


def part(folder: Path, ids: Sequence[int | str], classes: dict[int, str], sub: str = "", boxes: int = 2) -> Annotations:
    """Images of which the n-th has n % (boxes + 1) objects."""
    content = {
        "images": [{"id": i, "file_name": f"{sub}{i}.png", "width": 40 + n, "height": 30} for n, i in enumerate(ids)],
        "annotations": [
            {
                "image_id": i,
                "category_id": sorted(classes)[k % len(classes)],
                "bbox": [k, n % 20, 9, 9],
                "iscrowd": k % 2,
            }
            for n, i in enumerate(ids)
            for k in range(n % (boxes + 1))
        ],
        "categories": [{"id": k, "name": name} for k, name in classes.items()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.json").write_text(json.dumps(content))
    return read_coco(folder / "a.json", folder / "images")


def rows_of(annotations: Annotations) -> list[object]:
    """Everything that is known of each image, by the names of classes."""
    rows = []
    for row in range(len(annotations)):
        objects = slice(annotations.offsets[row], annotations.offsets[row + 1])
        names = [annotations.classes[k] for k in annotations.labels[objects]]
        values = (annotations.boxes[objects], annotations.crowd[objects], annotations.areas[objects])
        size = annotations.sizes[row].tolist()
        rows.append((annotations.path(row).absolute(), size, names, *(value.tolist() for value in values)))
    return rows


def test_classes_are_united_by_name_and_images_stay_apart(tmp_path: Path) -> None:
    one = part(tmp_path / "one", range(5), {1: "cat", 2: "dog"})
    two = part(tmp_path / "two", range(4), {1: "dog", 2: "owl"}, sub="deep/")
    joined = join([one, two])
    assert joined.classes == ("cat", "dog", "owl")
    assert len(set(joined.category_ids)) == 3
    assert rows_of(joined) == rows_of(one) + rows_of(two)
    assert len(set(joined.image_ids.tolist())) == 9
    assert joined.fingerprint() == join([one, two]).fingerprint() != join([two, one]).fingerprint()
    assert join([one]) is one


@pytest.mark.parametrize("ids", [[10, 11], ["x", "y"]])
def test_ids_of_the_files_are_kept_where_all_are_distinct(tmp_path: Path, ids: Sequence[int | str]) -> None:
    joined = join([part(tmp_path / "one", range(2), {7: "cat"}), part(tmp_path / "two", ids, {7: "cat", 3: "dog"})])
    assert joined.image_ids.tolist() == ([0, 1, 10, 11] if ids[0] == 10 else [1, 2, 3, 4])
    assert joined.category_ids == (7, 3)
    rows = np.arange(4)
    write_results(tmp_path / "r.json", joined, rows, np.zeros((4, 4)), np.zeros(4), np.zeros(4, dtype=np.int64))
    results = json.loads((tmp_path / "r.json").read_text())
    assert [result["image_id"] for result in results] == joined.image_ids.tolist()


def test_parts_of_a_set_are_nested_and_keep_their_objects(tmp_path: Path) -> None:
    whole = part(tmp_path, range(40), {1: "cat", 2: "dog"})
    parts = [share(whole, fraction) for fraction in (0.01, 0.25, 0.5)]
    assert [len(some) for some in parts] == [1, 10, 20]
    everything = rows_of(whole)
    kept = [[everything.index(row) for row in rows_of(some)] for some in parts]
    assert all(rows == sorted(rows) for rows in kept)
    assert set(kept[0]) <= set(kept[1]) <= set(kept[2])
    assert share(whole, 1.0) is whole
    assert rows_of(select(whole, np.array([3, 1]))) == [everything[3], everything[1]]
