"""Coverage of objects by anchors, the fit, and the decision whether it is worth a change."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from commands import Capture, Tool, digest, one_line
from retina.cli.compose import compose
from retina.cli.data import DataConfig
from retina.data.coco import read_coco
from retina.data.dataset import CocoDetection
from retina.data.layouts import locate_split
from retina.data.shapes import write_shapes
from retina.data.transforms import Pipeline, ResizeShortSide
from retina.errors import ConfigError
from retina.lab.anchor_fit import Gain, Trial, decide, fit, gain, halves, held_out, try_levels
from retina.lab.anchor_report import yaml_file
from retina.lab.anchors import AnchorsConfig, check_places, pyramid_of
from retina.lab.coverage import (
    Objects,
    Pyramid,
    best_iou,
    cover,
    draw_images,
    resized_objects,
    rows_of_images,
    summarize,
)
from retina.model.retinanet import retinanet
from retina.ops.anchors import AnchorGenerator, Anchors
from retina.ops.assigners import ATSS, MaxIoU
from retina.ops.boxes import pairwise_iou
from retina.ops.matching import match
from retina.types import Predictions, Targets

RULE = MaxIoU(positive_iou=0.5, negative_iou=0.4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objects_of(sides: Tensor, *, per_image: int = 4, canvas: tuple[int, int] = (128, 192), seed: int = 0) -> Objects:
    """Objects of these widths and heights, somewhere in images of one size."""
    height, width = canvas
    room = torch.tensor([width, height]) - sides
    corner = torch.rand(len(sides), 2, generator=seeded(seed)) * room
    image = torch.arange(len(sides)) // per_image
    return Objects(torch.cat([corner, corner + sides], dim=1), image % 3, image, torch.tensor([canvas] * len(sides)))


def random_objects(count: int = 120) -> Objects:
    """On canvases of two sizes, some larger than any anchor or cut by the border."""
    sides = torch.exp(torch.randn(count, 2, generator=seeded(1)) * 0.7 + 3.2).clamp(max=120)
    small, wide = objects_of(sides[::2]), objects_of(sides[1::2], canvas=(160, 128), seed=3)
    both = Objects(*(torch.cat(parts) for parts in zip(small, wide, strict=True)))
    return both._replace(image=torch.cat([small.image, wide.image + 1000]))


GENERATORS = [
    AnchorGenerator(sizes=(16.0, 32.0, 64.0)),
    AnchorGenerator(sizes=(24.0, 24.0, 100.0), scales=(1.0,), ratios=(0.4, 1.3), offset=0.5),
    AnchorGenerator(sizes=(17.0, 31.0, 67.0), rounded=True),
]


def anchors_on(canvas: Sequence[int], pyramid: Pyramid) -> Anchors:
    shapes = [(-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in pyramid.strides]
    return pyramid.anchors(shapes, pyramid.strides, "cpu")


@pytest.mark.parametrize("generator", GENERATORS, ids=["paper", "offset", "rounded"])
def test_best_iou_is_that_of_all_anchors(generator: AnchorGenerator) -> None:
    objects, pyramid = random_objects(), Pyramid(generator, (8, 16, 32))
    expected = []
    for box, canvas in zip(objects.boxes, objects.canvas.tolist(), strict=True):
        expected.append([pairwise_iou(level, box[None]).max() for level in anchors_on(canvas, pyramid)])
    torch.testing.assert_close(best_iou(objects, pyramid), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("generator", GENERATORS[:2], ids=["paper", "offset"])
def test_positives_are_those_of_the_matching(generator: AnchorGenerator) -> None:
    objects, pyramid = random_objects(), Pyramid(generator, (8, 16, 32))
    objects.boxes[0] = torch.tensor([0.0, 0.4, 27.0, 15.6])  # best covered by the first anchor of a level, if offset
    coverage = cover(objects, pyramid, RULE, 0.5, rows_of_images(objects, torch.ones(len(objects.boxes)) > 0))
    assert coverage.matched.all()
    expected = torch.zeros(2, len(objects.boxes), 3, dtype=torch.int64)
    for image in objects.image.unique():
        rows = (objects.image == image).nonzero()[:, 0]
        levels = anchors_on(objects.canvas[rows[0]].tolist(), pyramid)
        iou = pairwise_iou(torch.cat(levels), objects.boxes[rows])
        of_level = torch.cat([torch.full((len(level),), i) for i, level in enumerate(levels)])
        for count, low_quality in zip(expected, (True, False), strict=True):
            found = match(iou, torch.ones(len(rows)) > 0, low_quality=low_quality)
            count.index_put_(
                (rows[found.index[found.positive]], of_level[found.positive]), torch.tensor(1), accumulate=True
            )
    assert torch.equal(coverage.positives, expected[0])
    assert torch.equal(coverage.above, expected[1])
    assert (coverage.positives.sum(dim=1) > coverage.above.sum(dim=1)).any()


@pytest.mark.parametrize("rule", [MaxIoU(low_quality=False), ATSS(topk=4)])
def test_positives_are_those_of_any_rule(rule: MaxIoU | ATSS) -> None:
    """That looks at boxes and anchors alone."""
    objects, pyramid = random_objects(), Pyramid(GENERATORS[0], (8, 16, 32))
    coverage = cover(objects, pyramid, rule, 0.5, rows_of_images(objects, torch.ones(len(objects.boxes)) > 0))
    for image in objects.image.unique():
        rows = (objects.image == image).nonzero()[:, 0]
        anchors = anchors_on(objects.canvas[rows[0]].tolist(), pyramid)
        valid = torch.ones(1, len(rows)) > 0
        assigned = rule(
            Predictions((), (), anchors), Targets(objects.boxes[None, rows], objects.labels[None, rows], valid, ~valid)
        )
        counts = assigned.matched[assigned.positive].bincount(minlength=len(rows))
        assert torch.equal(coverage.positives[rows].sum(dim=1), counts)


def test_groups_and_shares() -> None:
    sides = torch.tensor([[20.0, 20.0], [16.0, 16.0], [50.0, 50.0], [5.0, 60.0], [100.0, 100.0], [64.0, 64.0]])
    objects = objects_of(sides, per_image=2)
    pyramid = Pyramid(AnchorGenerator(sizes=(16.0, 64.0), scales=(1.0,), ratios=(1.0,)), (2, 4))
    drawn = torch.tensor([True, True, True, True, False, False])
    coverage = cover(objects, pyramid, RULE, 0.5, rows_of_images(objects, drawn))
    told = summarize(objects, coverage, 0.5, [1, 2], ["a", "b", "c"])
    assert (told["objects"], told["objects_matched"]) == (6, 4)
    assert [told["by_size"][name]["objects"] for name in ("small", "medium", "large")] == [3, 2, 1]
    assert {name: group["objects"] for name, group in told["by_octave"].items()} == {
        "16-32": 3,
        "32-64": 1,
        "64-128": 2,
    }
    assert {name: group["objects"] for name, group in told["by_class"].items()} == {"a": 2, "b": 2, "c": 2}
    assert told["recall_50"] == pytest.approx(4 / 6)  # neither the thin one nor that of 100 px
    assert told["without_positive"] == 0
    assert told["without_positive_at_threshold"] == pytest.approx(1 / 4)
    assert told["best_iou"] == pytest.approx(coverage.best().mean().item())
    assert told["by_size"]["large"]["positives"] is None, "its image was not matched"
    assert sum(told["positive_anchors_by_level"].values()) == coverage.positives.sum()
    assert sum(group["objects"] for group in told["by_level"].values()) == 6


def test_objects_are_those_a_training_sees(tiny_data: Path) -> None:
    annotations = read_coco(*locate_split(tiny_data, "train"))
    pipeline = Pipeline({"resize": ResizeShortSide([50, 90, 120], 150)}, min_size=12.0)
    found = resized_objects(annotations, pipeline, seed=3, divisor=32, images=range(len(annotations)))
    dataset, rows = CocoDetection(annotations, pipeline, seed=3), []
    for index in range(len(annotations)):
        sample = dataset[0, index]
        rows += [(*box, label, index) for box, label in zip(sample.boxes.tolist(), sample.labels, strict=True)]
        assert sample.size is not None
        canvases = found.canvas[found.image == index]
        assert ((canvases - torch.tensor(sample.size) >= 0) & (canvases - torch.tensor(sample.size) < 32)).all()
    assert 0 < len(rows) < annotations.num_objects
    assert torch.equal(torch.tensor(rows), torch.cat([found.boxes, found.labels[:, None], found.image[:, None]], dim=1))
    annotations.crowd[:] = True
    assert len(resized_objects(annotations, pipeline, seed=3, divisor=32, images=range(4)).boxes) == 0


def test_drawing_takes_whole_images() -> None:
    objects = random_objects()
    drawn = draw_images(objects, 7, seeded())
    assert len(objects.image[drawn].unique()) == 7
    assert not set(objects.image[drawn].tolist()) & set(objects.image[~drawn].tolist())
    rows = torch.cat(rows_of_images(objects, drawn))
    assert sorted(rows.tolist()) == drawn.nonzero()[:, 0].tolist()
    assert draw_images(objects, 10**6, seeded()).all()


def around(sizes: Sequence[float], ratio: float, count: int, spread: float) -> Tensor:
    """Widths and heights about these sizes."""
    size = torch.tensor(sizes).repeat(count // len(sizes)).log() + spread * torch.randn(count, generator=seeded(5))
    log_ratio = math.log(ratio) + spread * torch.randn(count, generator=seeded(6))
    return torch.stack([size - log_ratio / 2, size + log_ratio / 2], dim=1).exp()


def test_a_fit_finds_sizes_and_ratio_and_is_repeatable() -> None:
    objects = objects_of(around([15.0, 60.0], 1.6, 400, 0.02), canvas=(256, 256))
    wrong = Pyramid(AnchorGenerator(sizes=(32.0, 48.0), scales=(1.0,), ratios=(1.0,)), (8, 16))
    fitted = fit(objects, wrong, 0.5, seeded())
    assert fitted.anchors.sizes == pytest.approx([15, 60], rel=0.1)
    assert fitted.anchors.ratios == pytest.approx([1.6], rel=0.1)
    assert best_iou(objects, fitted).amax(dim=1).mean() > 1.5 * best_iou(objects, wrong).amax(dim=1).mean()
    assert fit(objects, wrong, 0.5, seeded()) == fitted


@pytest.mark.parametrize(("scales", "ratios"), [((1.0, 1.5), (0.5, 1.0)), ((1.0,), (0.5, 1.0, 2.0))])
def test_a_fit_keeps_the_head(scales: tuple[float, ...], ratios: tuple[float, ...]) -> None:
    objects = objects_of(around([20.0, 30.0], 1.0, 200, 0.3), canvas=(256, 256))
    start = AnchorGenerator(sizes=(32.0, 64.0, 128.0), scales=scales, ratios=ratios, offset=0.5)
    fitted = fit(objects, Pyramid(start, (8, 16, 32)), 0.5, seeded())
    assert fitted.strides == (8, 16, 32)
    assert (fitted.anchors.num_per_cell, fitted.anchors.offset) == (start.num_per_cell, 0.5)
    assert list(fitted.anchors.sizes) == sorted(fitted.anchors.sizes)
    assert fitted.anchors.scales[0] == 1
    assert list(fitted.anchors.scales) == sorted(fitted.anchors.scales)


def test_a_fine_level_has_no_huge_anchors() -> None:
    """They would overlap large objects better than those of the coarse level, which has fewer."""
    objects = objects_of(around([90.0, 110.0], 1.0, 200, 0.1), canvas=(256, 256))
    start = AnchorGenerator(sizes=(32.0, 64.0, 128.0), scales=(1.0, 1.5), ratios=(1.0,))
    anchors = fit(objects, Pyramid(start, (4, 8, 32)), 0.5, seeded()).anchors
    largest = [size * anchors.scales[-1] for size in anchors.sizes]
    assert largest[0] <= 32 * 1.01
    assert 60 < largest[1] <= 64 * 1.01
    assert 80 < anchors.sizes[2] < 110


@pytest.mark.parametrize(
    ("size", "strides", "sizes"),
    [
        (24.0, (8, 16, 32), [24, 48, 96]),  # centres where only the finest level has anchors
        (130.0, (2, 8), [65, 130]),  # far more than 8 of the finest level's strides
    ],
)
def test_levels_without_objects_follow_by_octaves(size: float, strides: tuple[int, ...], sizes: list[float]) -> None:
    centre = 8.0 * (2 * torch.randint(9, 15, (120, 2), generator=seeded()) + 1)
    half = around([size], 1.0, 120, 0.02) / 2
    objects = objects_of(2 * half, canvas=(384, 384))._replace(boxes=torch.cat([centre - half, centre + half], dim=1))
    start = AnchorGenerator(sizes=tuple(2.0 * stride for stride in strides), scales=(1.0,), ratios=(1.0,))
    assert fit(objects, Pyramid(start, strides), 0.5, seeded()).anchors.sizes == pytest.approx(sizes, rel=0.03)


def test_sizes_ascend_even_where_others_would_overlap_more() -> None:
    """Large objects where only the fine level has anchors, and small ones where both have."""
    cells = torch.randint(3, 9, (120, 2), generator=seeded())
    large = (torch.arange(120) % 2 == 0)[:, None]
    centre, half = torch.where(large, 16.0 * cells + 8, 16.0 * cells), torch.where(large, 30.0, 15.0)
    objects = objects_of(2 * half.expand(-1, 2), canvas=(256, 256))
    objects = objects._replace(boxes=torch.cat([centre - half, centre + half], dim=1))
    start = Pyramid(AnchorGenerator(sizes=(60.0, 30.0), scales=(1.0,), ratios=(1.0,)), (8, 16))
    assert best_iou(objects, start).amax(dim=1).min() == 1
    sizes = fit(objects, start, 0.5, seeded()).anchors.sizes
    assert sizes[0] <= sizes[1]


def test_every_object_is_scored_by_anchors_of_the_other_half() -> None:
    objects = objects_of(around([20.0], 1.0, 80, 0.2))
    cuts = halves(objects, 2, seeded())
    assert [len(objects.image[cut].unique()) for cut in cuts] == [10, 10]
    asked: list[set[int]] = []

    def of_half(half: Objects) -> Pyramid:
        asked.append(set(half.image.tolist()))
        return Pyramid(AnchorGenerator(sizes=(float(10 + len(asked)),), scales=(1.0,), ratios=(1.0,)), (8,))

    scores = held_out(objects, cuts, of_half)
    for number, seen in enumerate(asked):
        others = torch.tensor([image not in seen for image in objects.image.tolist()])
        pyramid = Pyramid(AnchorGenerator(sizes=(float(11 + number),), scales=(1.0,), ratios=(1.0,)), (8,))
        assert len(seen) == 10
        assert torch.equal(scores[number // 2][others], best_iou(objects, pyramid).amax(dim=1)[others])
    assert halves(objects_of(around([20.0], 1.0, 28, 0.2)), 3, seeded()) == [], "seven images"


def test_noise_is_that_of_images() -> None:
    """Objects of one image say the same: having more of them must not make the gain look surer."""
    of_image = torch.randn(50, generator=seeded()) * 0.1 + 0.05
    gains = []
    for per_image in (1, 10):
        objects = objects_of(torch.full((50 * per_image, 2), 20.0), per_image=per_image)
        differences = of_image.repeat_interleave(per_image)
        gains.append(gain(objects, (0.3 + differences).expand(2, -1), torch.full_like(differences, 0.3)))
    assert gains[0].mean == pytest.approx(of_image.mean().item(), abs=1e-6)
    assert gains[0].noise == pytest.approx(2 * of_image.std().item() / math.sqrt(50), rel=1e-4)
    assert gains[1].noise == pytest.approx(gains[0].noise, rel=1e-4)
    unsteady = gain(objects, torch.tensor([[0.3], [0.5]]).expand(2, 500), torch.full((500,), 0.3))
    assert unsteady.noise == pytest.approx(2 * math.sqrt(2) * 0.1), "the two cuts disagree"


@pytest.mark.parametrize(
    ("mean", "noise", "sign"), [(0.02, 0.01, 1), (0.02, 0.03, 0), (0.005, 0.001, 0), (-0.02, 0.01, -1)]
)
def test_what_counts(mean: float, noise: float, sign: int) -> None:
    assert Gain(mean, noise).sign == sign


def trial_of(levels: list[int], scores: Tensor, objects: Objects, before: Tensor) -> Trial:
    scores = scores.expand(2, -1)
    recall = gain(objects, (scores >= 0.5).float(), (before >= 0.5).float())
    return Trial(levels, 1, gain(objects, scores, before), recall, scores)


@pytest.mark.parametrize(
    ("same", "lower", "upper", "levels", "change", "said"),
    [
        ((0.00, 0.00), (0.00, 0.00), (-0.10, 0.0), [3, 4, 5], False, "no change, the gain is within noise"),
        (
            (0.005, 0.00),
            (0.00, 0.00),
            (-0.10, 0.0),
            [3, 4, 5],
            False,
            "no change, a gain below 0.01 is worth no change",
        ),
        ((0.05, 0.00), (0.05, 0.00), (-0.10, 0.0), [3, 4, 5], True, "change, more than noise: mean best IoU +0.038"),
        ((0.05, -0.20), (0.05, -0.20), (-0.10, 0.0), [3, 4, 5], False, "no change, what one gains the other loses"),
        ((0.00, 0.10), (0.00, 0.18), (-0.10, 0.0), [3, 4, 5], True, "change, more than noise"),
        ((0.00, 0.00), (0.05, 0.25), (-0.10, 0.0), [2, 3, 4, 5], True, "change from P2 on, more than noise"),
        ((0.00, 0.00), (0.00, 0.00), (-0.005, 0.0), [4, 5], True, "change from P4 on, one level less costs nothing"),
        ((0.05, 0.00), (0.05, 0.00), (0.045, 0.0), [4, 5], True, "change from P4 on, more than noise"),
        ((0.00, 0.00), (0.00, 0.00), (0.00, -0.06), [3, 4, 5], False, "no change, the gain is within noise"),
    ],
)
def test_what_is_decided(
    same: tuple[float, float],
    lower: tuple[float, float],
    upper: tuple[float, float],
    levels: list[int],
    change: bool,
    said: str,
) -> None:
    """Each trial adds to the IoU of the objects above the threshold, and brings a share of all over it, or under it."""
    objects = objects_of(torch.full((400, 2), 20.0))
    before = torch.full((400,), 0.7)
    before[::4] = 0.45  # a quarter has no positive
    trials = []
    for which, (more, share) in (([3, 4, 5], same), ([2, 3, 4, 5], lower), ([4, 5], upper)):
        scores = before + more * (before > 0.5)
        changed = torch.arange(400) // 4 < 100 * abs(share)
        moved = torch.where(changed & (before < 0.5), 0.501, scores) if share > 0 else scores
        moved = torch.where(changed & (before > 0.5), 0.499, moved) if share < 0 else moved
        trials.append(trial_of(which, moved, objects, before))
    decision = decide(objects, trials, [3, 4, 5], 0.5)
    assert (decision.levels, decision.change) == (levels, change)
    assert decision.reason.startswith(said)


def pyramid(levels: Sequence[int], sizes: Sequence[float]) -> Pyramid:
    anchors = AnchorGenerator(sizes=tuple(sizes), scales=(1.0,), ratios=(1.0,))
    return Pyramid(anchors, tuple(2**level for level in levels))


def test_small_objects_ask_for_one_level_more() -> None:
    objects = objects_of(around([14.0, 60.0], 1.0, 160, 0.05), canvas=(256, 256))
    starts = [pyramid([4], [60.0]), pyramid([3, 4], [30.0, 60.0])]
    trials = try_levels(objects, starts[0], starts, 0.5, seeded())
    assert [trial.anchors for trial in trials] == [16 * 16, 32 * 32 + 16 * 16]
    assert trials[0].scores.shape == (3, 160)
    levels, change, reason = decide(objects, trials, [4], 0.5)
    assert (levels, change) == ([3, 4], True)
    assert "from P3 on" in reason
    assert trials[1].recall.mean > trials[0].recall.mean + 0.2


def test_few_images_decide_nothing() -> None:
    objects, now = objects_of(around([20.0], 1.0, 20, 0.1)), pyramid([3], [99.0])
    trials = try_levels(objects, now, [now], 0.5, seeded())
    assert trials == []
    assert decide(objects, trials, [3], 0.5)[:2] == ([3], False)


def test_anchors_come_from_the_settings_of_the_model() -> None:
    settings = compose("train", ["model=retinanet", "model.levels=[3,4,5]"])
    assert pyramid_of(settings, [2, 3, 4, 5]) == Pyramid(
        AnchorGenerator(sizes=(16.0, 32.0, 64.0, 128.0)), (4, 8, 16, 32)
    )
    settings["model"] |= {"anchor_sizes": [20.0, 50.0, 90.0], "anchor_scales": [1.0], "anchor_offset": 0.5}
    own = AnchorGenerator(sizes=(10.0, 20.0, 50.0, 90.0), scales=(1.0,), offset=0.5)
    assert pyramid_of(settings, [2, 3, 4, 5]) == Pyramid(own, (4, 8, 16, 32))
    assert pyramid_of(settings, [4, 5]).anchors.sizes == (50.0, 90.0)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("anchors") / "shapes"
    write_shapes(root, num_train=40, num_val=2, image_size=[64, 96])
    return root


def words(root: Path, folder: Path) -> list[object]:
    data = [f"data.root={root}", "data.prepare=null", "data.short_side=64", "data.long_side=96"]
    model = ["model.levels=[3]", "model.anchor_sizes=[48.0]", "model.anchor_scales=[1.0]"]
    return ["anchors", "experiment=shapes", *data, *model, f"figures={folder / 'figures'}"]


def test_a_fit_becomes_a_config_group(tool: Tool, shapes: Path, tmp_path: Path, capsys: Capture) -> None:
    before, output = digest(shapes), tmp_path / "model" / "mine.yaml"
    assert tool("lab", *words(shapes, tmp_path), f"output={output}") == 0
    said = capsys.readouterr().out
    assert f"written: {output} - use it as model=mine" in said
    assert digest(shapes) == before

    result = json.loads((tmp_path / "figures" / "anchors.json").read_text())
    now, fitted = result["now"]["coverage"], result["fitted"]["coverage"]
    assert result["change"]
    assert fitted["best_iou"] > now["best_iou"] + 0.05
    assert fitted["objects"] == fitted["objects_matched"] == result["data"]["objects"] > 40
    assert f"{now['best_iou']:.3f} -> {fitted['best_iou']:.3f}" in said
    with Image.open(tmp_path / "figures" / "anchors.png") as picture:
        assert picture.size[0] > 2 * picture.size[1] > 500
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 100

    header = [line for line in output.read_text().splitlines() if line.startswith("#")]
    assert f"output={output}" in header[1]
    assert result["verdict"] in "\n".join(header)
    settings = compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "model=mine"])["model"]
    assert settings == compose("train", ["experiment=shapes"])["model"] | result["fitted"]["model"]
    anchors = retinanet(**settings, num_classes=1).anchors
    assert list(anchors.sizes) == result["fitted"]["model"]["anchor_sizes"]
    by_hand = header[-1].removeprefix("#").split()
    assert compose("train", ["experiment=shapes", *by_hand])["model"] == settings

    capsys.readouterr()
    assert tool("lab", *words(shapes, tmp_path), f"output={output}") == 2
    assert "mine.yaml is there already - choose another file, or give overwrite=true" in one_line(capsys)


@pytest.mark.slow
def test_what_was_fitted_is_not_fitted_again(tool: Tool, shapes: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "model" / "mine.yaml"
    assert tool("lab", *words(shapes, tmp_path), f"output={output}") == 0
    kept = output.read_bytes()
    fitted = json.loads((tmp_path / "figures" / "anchors.json").read_text())["fitted"]["model"]
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in fitted.items()]
    assert tool("lab", *words(shapes, tmp_path), *overrides, f"output={output}", "overwrite=true") == 0
    assert f"not written: {output}" in capsys.readouterr().out
    assert output.read_bytes() == kept
    assert json.loads((tmp_path / "figures" / "anchors.json").read_text())["verdict"].startswith("no change")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("split=test", "split: 'test' is not known - choose one of train, val"),
        ("images=0", "images: 0 is not allowed - give 1 or more"),
        ("output=mine.json", "output: mine.json is no config file - end it in .yaml"),
        ("output=SHAPES/mine.yaml", "the data set's own - choose another place"),
        ("figures=SHAPES/figures", "the data set's own - choose another place"),
        ("model.anchor_sizes=[1.0,2.0]", "model.anchor_sizes: [1.0, 2.0] - "),
        ("outptu=x.yaml", "outptu: no such key - did you mean output?"),
        ("data.root=nowhere", "nowhere"),
        ("~model.levels", "model.levels: missing - give a list, as in model.levels=[3,4,5,6,7]"),
        ("figures=FILE", "FILE cannot be written (Not a directory) - choose another folder"),
        ("figures=FILE/figures", "FILE/figures cannot be written (Not a directory) - choose another folder"),
        ("output=FILE/mine.yaml", "output: FILE cannot be written (Not a directory) - choose another folder"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    tool: Tool, shapes: Path, tmp_path: Path, capsys: Capture, word: str, said: str
) -> None:
    """Before anything is matched, and nothing is left behind."""
    file = tmp_path / "file"
    file.touch()
    word = word.replace("SHAPES", str(shapes)).replace("FILE", str(file))
    assert tool("lab", *words(shapes, tmp_path), word) == 2
    assert said.replace("FILE", str(file)) in one_line(capsys)
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("levels: [3]")
    data = DataConfig(name="mine", root=str(tmp_path / "data"))

    def places(overwrite: bool) -> AnchorsConfig:
        folder, output = str(tmp_path / "figures"), str(tmp_path / "mine.yaml")
        return AnchorsConfig(output=output, figures=folder, split="train", images=9, overwrite=overwrite)

    check_places(places(overwrite=True), data)
    with pytest.raises(ConfigError, match="is there already"):
        check_places(places(overwrite=False), data)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "anchors.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the lab's"):
        check_places(places(overwrite=True), data)


def test_data_without_objects(tool: Tool, tmp_path: Path, capsys: Capture) -> None:
    image = {"id": 1, "file_name": "a.jpg", "width": 64, "height": 64}
    file = tmp_path / "none.json"
    file.write_text(json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    data = ["data=coco", f"data.train.annotations={file}", f"data.train.images={tmp_path / 'images'}"]
    assert tool("lab", "anchors", *data, f"figures={tmp_path / 'out'}") == 2
    assert "none.json: no objects in it - nothing can be said about anchors" in one_line(capsys)


def test_only_boxes_are_followed_and_other_rules_are_named(
    tool: Tool, shapes: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = ["augment=strong", "loss.assigner.positive_iou=0.6", "images=7"]
    assert tool("lab", *words(shapes, tmp_path), *more) == 0
    said = capsys.readouterr().out
    assert "note: not followed: augment.jitter" in said
    assert "note: no ResizeShortSide in augment: objects are of the size that evaluation gives them" in said
    assert "recall: at IoU 0.6" in said
    result = json.loads((tmp_path / "figures" / "anchors.json").read_text())
    assert result["now"]["coverage"]["objects_matched"] < result["now"]["coverage"]["objects"]


@pytest.mark.parametrize(("loss", "name", "rule"), [("gfl", "ATSS", "ATSS(topk=9)"), ("tal", "TaskAligned", "MaxIoU(")])
def test_nothing_is_fitted_for_a_rule_without_a_fixed_iou(
    tool: Tool, shapes: Path, tmp_path: Path, capsys: Capture, loss: str, name: str, rule: str
) -> None:
    """The very anchors that a fit would change for the paper's rule."""
    output = tmp_path / "model" / "mine.yaml"
    assert tool("lab", *words(shapes, tmp_path), f"loss={loss}", f"output={output}") == 0
    said = capsys.readouterr().out
    assert f"no change: {name} has no fixed IoU for anchors to reach - give experiment=paper" in said
    assert ("but the paper's" in said) == (loss == "tal")
    assert " -> " not in said
    assert f"not written: {output}" in said
    assert not output.parent.exists()
    result = json.loads((tmp_path / "figures" / "anchors.json").read_text())
    assert not result["change"]
    assert result["positives_of"].startswith(rule)
    assert result["now"]["coverage"]["positives"] > 0
    assert "fitted" not in result
    with Image.open(tmp_path / "figures" / "anchors.png") as picture:
        assert picture.size[0] > 1.5 * picture.size[1] > 500


def test_a_file_keeps_every_setting_of_the_model() -> None:
    model = compose("train", ["experiment=bccd"])["model"]
    coverage = {"coverage": {"best_iou": 0.5}}
    fitted = {"levels": [3], "anchor_sizes": [9.5], "anchor_scales": [1.0], "anchor_ratios": [0.95]}
    result = {"command": "c", "data": {"objects": 3, "annotations": "a\nb"}, "verdict": "v"}
    text = yaml_file(model, result | {"now": coverage, "fitted": coverage | {"model": fitted}}, "mine")
    assert "a\\nb" in text
    assert [line for line in text.splitlines() if line.startswith("#")][-1].split()[1] == "model.levels=[3]"


def test_blood_cells(bccd: Path) -> None:
    """The anchors in configs/experiment/bccd.yaml were chosen by looking at the cells: the fit finds about the same."""
    settings = compose("train", ["experiment=bccd"])
    annotations = read_coco(*locate_split(bccd, "train"))
    pipeline = Pipeline({"resize": ResizeShortSide(384, 512)})
    objects = resized_objects(annotations, pipeline, seed=0, divisor=32, images=range(len(annotations)))
    now = pyramid_of(settings, settings["model"]["levels"])
    fitted = fit(objects, now, 0.5, seeded())

    def middles(anchors: AnchorGenerator) -> list[float]:
        return [size * math.sqrt(anchors.scales[0] * anchors.scales[-1]) for size in anchors.sizes]

    assert middles(fitted.anchors) == pytest.approx(middles(now.anchors), rel=0.2)
    iou = [best_iou(objects, pyramid).amax(dim=1) for pyramid in (now, fitted)]
    assert iou[1].mean() > iou[0].mean() + 0.01
    assert all((one >= 0.5).float().mean() > 0.99 for one in iou)
