import numpy as np
import pytest
import torch

from retina.types import Batch, Detections, Targets
from retina.visualize import (
    LABELS,
    LONG_SIDE,
    DrawStyle,
    batch_pictures,
    class_colour,
    draw_boxes,
    draw_detections,
    grid,
    shown_channels,
    side_by_side,
)

CLASSES = ("cell", "platelet")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detections_of(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
    )


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    assert before.shape == after.shape
    return (before != after).any(axis=2)


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour)).all(axis=2).any())


def test_only_the_edge_and_the_label_change() -> None:
    image = noise(600, 800)
    before = image.copy()
    drawn = draw_boxes(image, np.array([[200.0, 150.0, 500.0, 400.0]]), np.array([0]), CLASSES)
    np.testing.assert_array_equal(image, before)
    difference = changed(image, drawn)
    for x, y in ((200, 300), (500, 300), (350, 150), (350, 400)):
        np.testing.assert_array_equal(drawn[y, x], class_colour(0))
    assert difference[130:150, 200:225].mean() > 0.9  # the label, above left
    difference[120:406, 195:506] = False
    assert not difference.any()
    assert not changed(image, drawn)[160:390, 210:490].any()


def test_same_input_same_picture() -> None:
    boxes = np.random.default_rng(1).uniform(0, 300, (20, 2))
    boxes = np.concatenate([boxes, boxes + 60], axis=1)
    arguments = (noise(480, 640), boxes, np.arange(20) % 2, CLASSES)
    scores = np.linspace(0.9, 0.1, 20)
    np.testing.assert_array_equal(draw_boxes(*arguments, scores=scores), draw_boxes(*arguments, scores=scores))


@pytest.mark.parametrize(
    ("size", "expected"), [((192, 256), (576, 768)), ((8, 1), (768, 96)), ((900, 1200), (900, 1200))]
)
def test_small_images_are_enlarged_and_large_ones_kept(size: tuple[int, int], expected: tuple[int, int]) -> None:
    empty = draw_boxes(noise(*size), np.empty((0, 4)), np.empty(0, np.int64), CLASSES)
    assert empty.shape == (*expected, 3)
    assert empty.dtype == np.uint8


def test_boxes_follow_the_enlargement() -> None:
    drawn = draw_boxes(noise(192, 256), np.array([[50.0, 60.0, 150.0, 160.0]]), np.array([1]), CLASSES)
    np.testing.assert_array_equal(drawn[330, 150], class_colour(1))
    np.testing.assert_array_equal(drawn[480, 300], class_colour(1))


@pytest.mark.parametrize(
    "box",
    [[-50.0, -50.0, 2000.0, 2000.0], [900.0, 700.0, 950.0, 750.0], [5.0, 5.0, 5.0, 5.0], [790.0, 2.0, 799.0, 9.0]],
)
def test_boxes_and_labels_stay_inside_the_picture(box: list[float]) -> None:
    image = np.zeros((600, 800, 3), dtype=np.uint8)
    drawn = draw_boxes(image, np.array([box]), np.array([0]), CLASSES)
    assert has_colour(drawn, class_colour(0))
    assert (drawn == np.array(class_colour(0))).all(axis=2).sum() > 200  # the ground of its label


def test_detections_below_the_threshold_are_left_out() -> None:
    image = noise(600, 800)
    detections = detections_of([[100, 100, 200, 200], [400, 300, 600, 500]], [0.8, 0.29], [0, 1])
    drawn = draw_detections(image, detections, CLASSES)
    assert changed(image, drawn)[95:205, 95:205].any()
    assert not changed(image, drawn)[250:, 350:].any()
    assert changed(image, draw_detections(image, detections, CLASSES, score_threshold=0.2))[250:, 350:].any()
    none = draw_detections(image, detections_of([], [], []), CLASSES)
    assert not changed(image, none).any()


def test_score_is_part_of_the_label() -> None:
    image = noise(600, 800)
    box = [[100.0, 100.0, 200.0, 200.0]]
    one, other = (draw_detections(image, detections_of(box, [score], [0]), CLASSES) for score in (0.871, 0.971))
    assert changed(one, other)[70:100, 100:200].any()
    same = draw_detections(image, detections_of(box, [0.872], [0]), CLASSES)
    assert not changed(one, same).any()


def test_colours_of_classes_differ() -> None:
    colours = np.array([class_colour(label) for label in range(80)])
    assert len(np.unique(colours, axis=0)) == 80
    distances = np.linalg.norm(colours[:-1] - colours[1:], axis=1)
    assert distances.min() > 80


def test_crowd_regions_are_grey_and_dashed() -> None:
    image = np.zeros((600, 800, 3), dtype=np.uint8)
    arguments = (image, np.array([[200.0, 150.0, 500.0, 400.0]]), np.array([0]), CLASSES)
    crowd = draw_boxes(*arguments, crowd=np.array([True]))
    assert not has_colour(crowd, class_colour(0))
    edge = crowd[300:400, 200].max(axis=1) > 100
    assert 3 < np.count_nonzero(np.diff(edge.astype(int))) < 40
    assert not changed(draw_boxes(*arguments), draw_boxes(*arguments, crowd=np.array([False]))).any()


def test_side_by_side_shows_truth_on_the_left_and_detections_on_the_right() -> None:
    image = np.zeros((600, 800, 3), dtype=np.uint8)
    truth = (np.array([[100.0, 100.0, 300.0, 300.0]]), np.array([0]))
    picture = side_by_side(image, *truth, detections_of([[100, 100, 300, 300]], [0.9], [1]), CLASSES)
    height, width, _ = picture.shape
    assert height > 600
    assert width > 1600
    left, right = picture[:, :800], picture[:, -800:]
    assert has_colour(left, class_colour(0))
    assert not has_colour(left, class_colour(1))
    assert has_colour(right, class_colour(1))
    assert not has_colour(right, class_colour(0))
    assert (left[: height - 600] != right[: height - 600]).any()  # the captions


def test_grid_holds_every_picture_whole() -> None:
    pictures = [noise(*size, seed) for seed, size in enumerate([(40, 60), (60, 40), (20, 20), (60, 60)])]
    canvas = grid(pictures)
    gap = canvas.shape[0] - 2 * 60
    assert canvas.shape == (120 + gap, 120 + gap, 3)
    np.testing.assert_array_equal(canvas[10:50, :60], pictures[0])
    np.testing.assert_array_equal(canvas[:60, 60 + gap + 10 : 60 + gap + 50], pictures[1])
    np.testing.assert_array_equal(canvas[60 + gap + 20 : 60 + gap + 40, 20:40], pictures[2])
    np.testing.assert_array_equal(grid(pictures[:1]), pictures[0])
    with pytest.raises(ValueError, match="at least one"):
        grid([])


@pytest.mark.parametrize(("count", "rows"), [(2, 1), (3, 1), (4, 2), (6, 2), (8, 2), (9, 3), (12, 3), (16, 4)])
def test_a_grid_has_no_empty_cell(count: int, rows: int) -> None:
    canvas = grid([np.full((300, 300, 3), 200, np.uint8)] * count)
    assert ((canvas == 200).all(axis=2).sum(), round(canvas.shape[0] / 300)) == (count * 300 * 300, rows)


def test_batch_pictures_show_content_and_real_targets_only() -> None:
    images = torch.zeros(2, 3, 384, 512, dtype=torch.uint8)
    boxes = torch.tensor([[[50.0, 60, 150, 160], [200, 100, 300, 300]], [[0.0, 0, 0, 0], [10, 10, 90, 90]]])
    valid = torch.tensor([[True, False], [False, False]])
    crowd = torch.tensor([[False, False], [False, True]])
    targets = Targets(boxes, torch.zeros(2, 2, dtype=torch.int64), valid, crowd)
    sizes = torch.tensor([[384, 512], [256, 128]])
    batch = Batch(images, sizes, targets, torch.arange(2), sizes)
    first, second = batch_pictures(batch, CLASSES, max_images=8)
    assert first.shape == (576, LONG_SIDE, 3)
    assert second.shape == (LONG_SIDE, 384, 3)
    np.testing.assert_array_equal(first[150, 75], class_colour(0))
    assert not first[:, 300:].any()  # the second target of the first image is padding
    assert not has_colour(second, class_colour(0))
    assert second.any()
    assert len(batch_pictures(batch, CLASSES, max_images=1)) == 1


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_of_many_channels_the_first_are_shown(channels: int, shown: list[int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (800, 9, channels), dtype=np.uint8)
    np.testing.assert_array_equal(shown_channels(image), image[..., shown])
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    np.testing.assert_array_equal(draw_boxes(image, *none, ["a"], scale=1.0), image[..., shown])


def test_lines_and_labels_grow_with_the_image_and_shrink_with_the_object() -> None:
    sizes = {
        (side, box): DrawStyle().sizes(side, (0, 0, round(box * side), round(box * side)))
        for side in (768, 6000)
        for box in (0.005, 0.02, 0.5)
    }
    assert sizes[768, 0.5] == (3, 13)
    assert sizes[6000, 0.5] == (20, 103)
    assert sizes[6000, 0.02] < sizes[6000, 0.5]
    for (side, box), (line, font) in sizes.items():
        assert line <= max(2, box * side / 10), "an object stays visible"
        assert 11 <= font <= max(11, box * side), "a label is no taller than its object, or just readable"


def test_style_of_labels() -> None:
    image, box = np.zeros((900, 900, 3), np.uint8), np.array([[100.0, 200.0, 700.0, 800.0]])
    scores = np.array([0.87])

    def drawn(**settings: object) -> np.ndarray:
        style = DrawStyle(**settings)  # type: ignore[arg-type]
        return draw_boxes(image, box, np.array([1]), CLASSES, scores=scores, style=style)

    tag = (slice(150, 199), slice(100, 400))
    width = {label: int((drawn(label=label)[tag] > 0).any(axis=(0, 2)).sum()) for label in LABELS}
    assert width["none"] < width["score"] < width["name"] < width["name_score"]
    assert (drawn(label="none", line_width=20) > 0).sum() > (drawn(label="none", line_width=2) > 0).sum()
    assert (drawn(font_size=40)[tag] > 0).sum() > (drawn(font_size=12)[tag] > 0).sum()
