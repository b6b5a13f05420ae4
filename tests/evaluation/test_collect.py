from pathlib import Path

import numpy as np
import pytest
import torch

from ranks import in_processes
from retina.evaluation.evaluate import DetectionCollector
from retina.evaluation.metrics import DetectionArrays
from retina.types import Detections


def detections_of(image: int, count: int, dtype: torch.dtype = torch.float32) -> Detections:
    """Detections whose numbers say which image and which place they belong to."""
    place = torch.arange(count)
    corner = (100 * image + place).to(dtype)
    boxes = torch.stack([corner, corner, corner + 10, corner + 20], dim=1)
    return Detections(boxes, 1 - place.to(dtype) / 16, (image + place) % 3)


def arrays_of(images: list[tuple[int, int]]) -> DetectionArrays:
    """What collecting (image, count) pairs in this order must give."""
    parts = [detections_of(*pair) for pair in images]
    boxes, scores, labels = (torch.cat(values).numpy() for values in zip(*parts, strict=True))
    indices = np.repeat([image for image, _ in images], [count for _, count in images])
    return DetectionArrays(indices, boxes.astype(np.float64), scores.astype(np.float64), labels)


def assert_same(one: DetectionArrays, two: DetectionArrays) -> None:
    for name, left, right in zip(one._fields, one, two, strict=True):
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


def test_sorted_by_image_and_stable_within() -> None:
    collector = DetectionCollector()
    collector.add(torch.tensor([5, 2]), [detections_of(5, 3), detections_of(2, 0)])
    collector.add(torch.tensor([3]), [detections_of(3, 2)])
    assert_same(collector.gather(), arrays_of([(3, 2), (5, 3)]))


def test_an_image_counts_once_even_if_its_first_detections_are_none() -> None:
    collector = DetectionCollector()
    collector.add(torch.tensor([1, 0]), [detections_of(1, 0), detections_of(0, 2)])
    collector.add(torch.tensor([1, 0]), [detections_of(1, 4), detections_of(0, 3)])
    assert_same(collector.gather(), arrays_of([(0, 2)]))


def test_nothing_collected_is_empty() -> None:
    empty = DetectionCollector()
    empty.add(torch.empty(0, dtype=torch.int64), [])
    gathered = empty.gather()
    assert gathered.boxes.shape == (0, 4)
    assert [len(values) for values in gathered] == [0, 0, 0, 0]


def test_half_precision_is_widened() -> None:
    collector = DetectionCollector()
    collector.add(torch.tensor([0]), [detections_of(0, 2, torch.bfloat16)])
    assert_same(collector.gather(), arrays_of([(0, 2)]))


def test_every_image_needs_its_index() -> None:
    with pytest.raises(ValueError, match="2 indices for the detections of 1"):
        DetectionCollector().add(torch.tensor([0, 1]), [detections_of(0, 1)])


def test_rank_0_has_all_and_shared_images_count_once(tmp_path: Path) -> None:
    def task(rank: int) -> None:
        collector = DetectionCollector()
        # Image 1 is on both ranks, with different detections to tell which copy was kept.
        for image, count in [[(0, 2), (1, 1)], [(2, 3), (1, 5), (3, 0)]][rank]:
            collector.add(torch.tensor([image]), [detections_of(image, count)])
        np.savez(tmp_path / f"{rank}.npz", **collector.gather()._asdict())

    assert in_processes(task, tmp_path) == [0, 0]
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as saved:
            gathered = DetectionArrays(**{name: saved[name] for name in DetectionArrays._fields})
        assert_same(gathered, arrays_of([(0, 0)] if rank else [(0, 2), (1, 1), (2, 3)]))
