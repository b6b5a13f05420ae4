"""Anchors and objects of every kind, at random, to hold the fast ways of matching against the matrix of IoUs."""

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from retina.ops.anchors import AnchorGenerator, Anchors
from retina.ops.kernels.matching_forms import match_boxes
from retina.ops.matching import Matches

THRESHOLDS = [(0.5, 0.4), (0.5, 0.5), (0.7, 0.3), (0.5, 0.0), (0.3, 0.05), (1.0, 0.9), (0.01, 0.0)]


class Case(NamedTuple):
    anchors: Anchors
    boxes: Tensor
    valid: Tensor
    crowd: Tensor
    inside: Tensor | None
    positive_iou: float
    negative_iou: float
    low_quality: bool


def random_case(seed: int, *, largest: int = 250, most_objects: int = 20) -> Case:
    """1 to 3 images with objects, crowds and padding over an image of at most `largest` pixels a side."""
    rng, mask_of = random.Random(seed), torch.Generator().manual_seed(seed)
    height, width = rng.randint(1, largest), rng.randint(1, largest)
    num_levels = rng.randint(1, 3)
    first = rng.choice([4, 8, 16])
    strides = [first * 2**n for n in range(num_levels)] if rng.random() < 0.8 else rng.sample([5, 7, 12], num_levels)
    generator = AnchorGenerator(
        sizes=tuple(float(rng.choice([1, 2, 4, 4, 8]) * stride) for stride in strides),
        scales=rng.choice([(1.0,), (1.0, 1.5), (1.0, 2 ** (1 / 3), 2 ** (2 / 3))]),
        ratios=rng.choice([(1.0,), (0.5, 1.0, 2.0), (0.1, 10.0)]),
        rounded=rng.random() < 0.4,
    )
    anchors = generator([(-(-height // stride), -(-width // stride)) for stride in strides], strides, "cpu")
    num_images, num_objects = rng.randint(1, 3), rng.choice([0, 1, most_objects // 2, most_objects])
    boxes = [random_box(rng, width, height, first, anchors) for _ in range(num_images * num_objects)]
    for n in range(1, len(boxes)):
        if rng.random() < 0.2:
            boxes[n] = boxes[n - 1]
    kind = torch.tensor([rng.random() for _ in boxes]).reshape(num_images, num_objects)
    padding, crowds = rng.choice([(0.0, 0.0), (0.3, 0.0), (0.2, 0.4), (1.0, 0.0), (0.0, 1.0)])
    return Case(
        anchors,
        torch.tensor(boxes).reshape(num_images, num_objects, 4),
        kind >= padding + crowds,
        (kind >= padding) & (kind < padding + crowds),
        rng.choice([None, torch.rand(num_images, sum(map(len, anchors)), generator=mask_of) < 0.5]),
        *rng.choice(THRESHOLDS),
        rng.random() < 0.8,
    )


def random_box(rng: random.Random, width: int, height: int, stride: int, anchors: Anchors) -> list[float]:
    """Small and larger than the image, elongated, without area, centred on and between cells, outside, on an anchor."""
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    w, h = (math.exp(rng.uniform(-1, math.log(3 * side + 3))) for side in (width, height))
    match rng.randrange(9):
        case 0:
            x, y, w, h = (float(rng.randint(0, side)) for side in (width, height, width, height))
        case 1:
            x, y = rng.randrange(0, width, stride), rng.randrange(0, height, stride)
            w, h = (rng.choice([1, 2, stride, 2 * stride, 4 * stride]) for _ in range(2))
        case 2:
            x, y = rng.randrange(0, width, stride) + stride / 2, rng.randrange(0, height, stride) + stride / 2
            w, h = (rng.choice([2, stride, 4 * stride, 64]) for _ in range(2))
        case 3:
            w, h = (h, 2.0) if rng.random() < 0.5 else (2.0, w)
        case 4:
            x, y, w, h = width / 2, height / 2, width * rng.uniform(1, 3), height * rng.uniform(1, 3)
        case 5:
            x, y = rng.choice([0, width, -10, 9 * width]), rng.choice([0, height, -10, 2 * height])
        case 6:
            level = rng.choice(anchors)
            left, top, right, bottom = level[rng.randrange(len(level))].tolist()
            shift = rng.choice([0, 0, 0.5, 1e-4])
            return [left + shift, top, right + shift, bottom]
        case 7 if rng.random() < 0.3:
            return rng.choice([[5.0, 5.0, 5.0, 9.0], [9.0, 9.0, 4.0, 4.0], [0.0] * 4, [-3e4, -3e4, 3e4, 3e4]])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def from_matrix(case: Case) -> Matches:
    """What every way has to give. A plain tuple of anchors has no grid, so that it goes by the matrix."""
    anchors, boxes, valid, crowd, inside, positive_iou, negative_iou, low_quality = case
    rule = {"positive_iou": positive_iou, "negative_iou": negative_iou, "low_quality": low_quality}
    return match_boxes(tuple(anchors), boxes, valid, crowd, inside, **rule)


def assert_same(matches: tuple[Tensor, Tensor, Tensor], expected: Matches, what: object = None) -> None:
    index, positive, negative = matches
    assert index.shape == positive.shape == negative.shape == expected.positive.shape, what
    assert torch.equal(positive, expected.positive), what
    assert torch.equal(negative, expected.negative), what
    assert torch.equal(index[positive], expected.index[positive]), what
