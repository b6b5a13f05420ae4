"""Tiles find what the whole image holds: nothing twice, nothing cut.

The detector of these tests is exact: it finds every patch of one colour, and of a patch at the edge of its image the
part that is there."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import retina
from commands import Capture, refused_by_tool
from faults import refused
from outputs import images_found
from retina.data.windows import Tiling
from retina.inference import detect_in_tiles
from retina.ops.seams import merge
from retina.types import Detections

Box = tuple[int, int, int, int]


def draw(boxes: list[Box], size: tuple[int, int]) -> np.ndarray:
    """Patch n has the colour n + 1, whose last bit is its class."""
    image = np.zeros((*size, 3), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = number + 1
    return image


def find(images: list[np.ndarray]) -> list[Detections]:
    found = []
    for image in images:
        rows = []
        for colour in np.unique(image[image > 0]).tolist():
            y, x = np.nonzero(image[..., 0] == colour)
            share = 0.9 - 0.001 * colour
            rows.append([x.min(), y.min(), x.max() + 1, y.max() + 1, share, colour % 2])
        table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        found.append(Detections(table[:, :4], table[:, 4], table[:, 5].long()))
    return found


@st.composite
def scenes(draw_from: st.DrawFn) -> tuple[list[Box], tuple[int, int]]:
    """Patches apart from each other, of 4 to 20 pixels, in a picture of any size."""
    size = draw_from(st.integers(30, 200)), draw_from(st.integers(30, 200))
    boxes: list[Box] = []
    for _ in range(draw_from(st.integers(0, 12))):
        width, height = draw_from(st.integers(4, 20)), draw_from(st.integers(4, 20))
        x, y = draw_from(st.integers(0, size[1] - width)), draw_from(st.integers(0, size[0] - height))
        if all(x > x2 or x + width < x1 or y > y2 or y + height < y1 for x1, y1, x2, y2 in boxes):
            boxes.append((x, y, x + width, y + height))
    return boxes, size


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scenes(), st.tuples(st.integers(48, 90), st.integers(48, 90)), st.booleans())
def test_tiles_find_what_the_whole_image_holds(
    scene: tuple[list[Box], tuple[int, int]], tile: tuple[int, int], whole: bool
) -> None:
    boxes, size = scene
    found = detect_in_tiles(find, draw(boxes, size), Tiling(tile, 0.5, whole), batch_size=3)
    expected = find([draw(boxes, size)])[0]
    assert {tuple(box) for box in found.boxes.tolist()} == {tuple(box) for box in expected.boxes.tolist()}
    assert len(found.scores) == len(boxes), "none twice"
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(1, 500)] * 2), st.tuples(*[st.integers(16, 200)] * 2), st.floats(0, 0.9))
def test_windows_cover_the_image(size: tuple[int, int], tile: tuple[int, int], overlap: float) -> None:
    windows = Tiling(tile, overlap).windows(size)
    covered = np.zeros(size, bool)
    for top, left, bottom, right in windows:
        assert (bottom - top, right - left) == (min(size[0], tile[0]), min(size[1], tile[1]))
        covered[top:bottom, left:right] = True
    assert covered.all()
    for axis in (0, 1):
        starts = sorted({window[axis] for window in windows})
        steps = np.diff(starts)
        assert (steps <= max(1, tile[axis] * (1 - overlap)) + 1).all()


def test_an_object_larger_than_the_overlap_is_found_once_with_the_whole_image() -> None:
    boxes: list[Box] = [(10, 10, 180, 120), (185, 150, 195, 160)]
    image = draw(boxes, (170, 200))
    pieces = detect_in_tiles(find, image, Tiling((64, 64), 0.25))
    assert len(pieces.scores) > 2, "cut, and nothing to say so"
    found = detect_in_tiles(find, image, Tiling((64, 64), 0.25, whole=True))
    assert {tuple(box) for box in found.boxes.tolist()} == set(map(tuple, np.array(boxes, float).tolist()))


def test_neighbours_of_other_classes_stay() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 9]])
    detections = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]))
    cut = torch.tensor([False, True, True])
    assert merge(detections, cut, nms_iou=0.5).labels.tolist() == [0, 1]
    assert len(merge(detections, cut, nms_iou=0.5, class_agnostic=True).scores) == 1


@pytest.mark.parametrize(("tile", "overlap", "key"), [((8, 64), 0.2, "tile"), ((64, 64), 0.95, "tile_overlap")])
def test_wrong_tiles_are_refused(tile: tuple[int, int], overlap: float, key: str, trained_run: Path) -> None:
    with refused("out-of-range", key):
        retina.load(trained_run, device="cpu").in_tiles(Tiling(tile, overlap))


def test_an_image_within_a_tile_is_found_as_without(trained_run: Path, tiny_data: Path) -> None:
    detector = retina.load(trained_run, device="cpu", precision="fp32")
    images = sorted((tiny_data / "val").iterdir())[:2]
    tiled = detector.in_tiles(Tiling((96, 96)))
    for one, other in zip(tiled.predict(images), detector.predict(images), strict=True):
        torch.testing.assert_close(one.boxes, other.boxes)
        assert one.labels.tolist() == other.labels.tolist()


def test_infer_looks_in_tiles(tool: Callable[..., int], trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    """The same picture four times in one: each quarter is a tile of its own."""
    quarter = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.tile(quarter, (2, 2, 1))).save(tmp_path / "photos" / "a.png")
    words = [f"checkpoint={trained_run}", f"source={tmp_path / 'photos'}", f"output={tmp_path / 'out'}", "device=cpu"]
    assert tool("infer", *words, "tile=[96,96]", "tile_overlap=0", "precision=fp32") == 0
    (record,) = images_found(tmp_path / "out")
    detector = retina.load(trained_run, device="cpu", precision="fp32")
    (expected,) = detector.predict(quarter, score_threshold=0.3)
    inner = [(x, y) for x, y, *_ in record["boxes"] if x < 90 and y < 90]
    assert (len(record["boxes"]), record["width"]) == (len(find_again(record)), 192)
    assert 0 < len(inner) <= len(expected.scores), "what lies at a seam may have merged"
    capsys.readouterr()
    assert tool("infer", *words, "tile=[96]") == 2
    refused_by_tool(capsys, "out-of-range", "tile")


def find_again(record: dict[str, list[object]]) -> set[tuple[object, ...]]:
    """Different detections of a record."""
    return {(*map(str, box), name) for box, name in zip(record["boxes"], record["classes"], strict=True)}
