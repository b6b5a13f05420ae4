"""The graph finds what `Detector.predict` finds, image by image and in any company. (That its file does too is shown in
test_export.py.)"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import retina
from faults import refused
from retina.data.transforms import resize
from retina.errors import CheckpointError
from retina.export.graph import ExportedDetector, enlarged, shrunk
from retina.export.proof import Differences, Tolerance, choose, compare, pack
from retina.export.write import build, describe, look
from retina.inference import Detector
from retina.model.retinanet import retinanet
from retina.model.weights import DetectorCard
from retina.ops.boxes import pairwise_iou
from tiny import PREPROCESSING

SIZES = [(64, 96), (96, 64), (200, 130), (40, 90), (33, 33), (128, 192)]
RULES = {
    "candidates": {"candidates_per_level": 7},
    "agnostic": {"class_agnostic": True, "nms_iou": 0.3},
    "few": {"score_threshold": 0.9, "max_detections": 50},
    "many": {"max_detections": 3000, "score_threshold": 0.0},
}


def detector(run: Path, **options: object) -> Detector:
    made = retina.load(run, device="cpu", precision="fp32")
    made.card = replace(made.card, postprocess=made.card.postprocess | options)
    return made


def described(ours: Detector) -> dict[str, Any]:
    return describe(ours, format="onnx", raw=False, weights="")


def images(sizes: list[tuple[int, int]] = SIZES) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    # smooth, as photographs are: what rounds differently in a resize then makes little difference
    return [cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (w, h)) for h, w in sizes]


def run(model: ExportedDetector, batch: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    packed = {name: torch.from_numpy(value) for name, value in pack(batch).items()}
    with torch.no_grad():
        return model.eval()(packed["images"], packed["sizes"])


@pytest.mark.parametrize("rule", RULES)
def test_it_finds_what_the_detector_finds(trained_run: Path, rule: str) -> None:
    ours = detector(trained_run, **RULES[rule])
    every = [image for image in images() if min(image.shape[:2]) >= 64]  # not enlarged: the same pixels to the bit
    settings = described(ours)
    model = ExportedDetector(ours, settings)
    for group in ([0], [0, 1, 2, 3]):
        tables, counts = run(model, [every[number] for number in group])
        for table, count, number in zip(tables, counts.tolist(), group, strict=True):
            differences = Differences()
            known = look(ours, every[number])
            compare("", known, table[:count].numpy(), differences, Tolerance(1e-3, 1e-5), settings)
            assert (differences.faults, differences.edges, differences.matched) == ([], 0, len(known))
            assert count == len(known)
            assert (table[:count, 4].diff() <= 0).all()
            assert (table[count:] == torch.tensor([0.0, 0, 0, 0, 0, -1])).all()


HEADS: dict[str, dict[str, Any]] = {
    "TAL": {"head_quality": False, "box_bins": 9, "head_scales": True, "head_norm": "group"},
    "TOOD": {"head": "task_aligned", "head_norm": "group"},
    "PAFPN": {"neck": "pafpn", "norm": "group"},
    "ATSS with quality": {"head_quality": True, "head_scales": True},
    "GFL": {"box_bins": 17, "guided_quality": True},
    "timm": {"backbone": "timm:mobilenetv3_small_050"},
}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_written_as_it_predicts(name: str) -> None:
    if name == "timm":
        pytest.importorskip("timm", reason="extra timm")
    torch.manual_seed(0)
    usual: dict[str, Any] = {"backbone": "resnet18_half", "levels": [3, 4, 5], "fpn_channels": 16, "head_convs": 2}
    usual |= {"anchor_scales": [1.0], "anchor_ratios": [1.0], "prior": 0.2}
    model = retinanet(num_classes=2, **usual | HEADS[name])
    with torch.no_grad():  # scores far apart, so that rounding does not change their order
        for key, weight in model.head.named_parameters():
            if "classification" in key and key.endswith("predict.weight"):
                weight.normal_(std=1.0)
    card = DetectorCard(
        model=model.arguments,
        classes=["a", "b"],
        category_ids=[1, 2],
        preprocessing=PREPROCESSING,
        postprocess={"score_threshold": 0.05, "candidates_per_level": 100, "nms_iou": 0.5, "max_detections": 20},
    )
    ours = Detector(model.eval(), card, device=torch.device("cpu"), file=Path("a"))
    settings = described(ours)
    batch = [image for image in images() if min(image.shape[:2]) >= 64][:3]
    for image in batch:
        (table,), (count,) = run(ExportedDetector(ours, settings), [image])
        differences = Differences()
        compare("", look(ours, image), table[:count].numpy(), differences, Tolerance(1e-2, 1e-4), settings)
        assert differences.faults == []
        assert differences.matched >= 10


class Strange(torch.nn.Module):
    """A neck that no graph can hold: what it does depends on what it sees."""

    strides = (8, 16, 32)

    def __init__(self, neck: torch.nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, features: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self.neck(features) if features[0].sum().item() > 0 else self.neck(features[::1])


def test_what_torch_cannot_write_is_one_line(trained_run: Path) -> None:
    ours = detector(trained_run)
    ours.model.fpn = Strange(ours.model.fpn)
    with refused("not-exportable", "best.safetensors", "pt2", kind=CheckpointError):
        build(ours, described(ours) | {"format": "pt2", "precision": "fp32"})


def test_a_file_looks_at_images_as_they_are(trained_run: Path) -> None:
    """Who runs it cuts tiles, as the description says."""
    ours = detector(trained_run)
    ours.card = replace(ours.card, preprocessing=ours.card.preprocessing | {"tile": [64, 64], "tile_overlap": 0.5})
    assert described(ours)["preprocessing"]["tile"] == [64, 64]


def test_each_class_has_a_threshold(trained_run: Path) -> None:
    ours = detector(trained_run)
    limits = [0.2, 0.9, 0.4, 0.99, 0.6]
    count_of_all = len(ours.predict(images()[0])[0].scores)
    ours.card = replace(ours.card, operating_point={"classes": [{"threshold": limit} for limit in limits]})
    settings = described(ours)
    assert (settings["thresholds"], settings["score_threshold"]) == (limits, 0.2)
    (found,) = ours.predict(images()[0])
    assert 0 < len(found.scores) < count_of_all
    table, count = run(ExportedDetector(ours, settings), images()[:1])
    assert table[0, : int(count), 5].tolist() == found.labels.tolist()
    assert set(describe(ours, format="onnx", raw=False, weights="", score_threshold=0.5)["thresholds"]) == {0.0}


def test_raw_outputs_lead_to_the_same_detections(trained_run: Path) -> None:
    ours = detector(trained_run, candidates_per_level=100_000)
    settings = described(ours) | {"raw": True}
    boxes, scores = run(ExportedDetector(ours, settings), images()[:2])
    for image, anchors, values in zip(images()[:2], boxes.numpy(), scores.numpy(), strict=True):
        (found,) = ours.predict(image)
        table = choose(anchors, values, settings)
        np.testing.assert_allclose(table[:, :4], found.boxes.numpy(), atol=1e-3)
        np.testing.assert_allclose(table[:, 4], found.scores.numpy(), atol=1e-5)
        assert table[:, 5].tolist() == found.labels.tolist()


def test_what_is_no_number_is_not_found(trained_run: Path) -> None:
    ours = detector(trained_run)
    with torch.no_grad():
        ours.model.head.classification.predict.bias[0] = torch.nan
    table, count = run(ExportedDetector(ours, described(ours)), images()[:1])
    assert table.isfinite().all()
    assert int(count) == 0


@pytest.mark.parametrize(("size", "new"), [((128, 192), (64, 96)), ((300, 401), (64, 86)), ((64, 97), (63, 96))])
def test_images_are_shrunk_as_opencv_does(size: tuple[int, int], new: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = shrunk(torch.from_numpy(image)[None], torch.tensor([size]), torch.tensor([new]), (96, 128))
    gap = np.abs(out[0].numpy()[: new[0], : new[1]].astype(int) - resize(image, new))
    assert gap.max() <= 1
    assert (gap > 0).mean() < 1e-3
    assert (out[0, new[0] :] == 0).all()
    assert (out[0, :, new[1] :] == 0).all()


@pytest.mark.parametrize(("size", "new"), [((40, 50), (64, 80)), ((63, 96), (64, 97)), ((20, 20), (90, 90))])
def test_images_are_enlarged_as_opencv_does(size: tuple[int, int], new: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = enlarged(torch.from_numpy(image)[None], torch.tensor([size]), torch.tensor([new]), (96, 128))
    gap = np.abs(out[0].numpy()[: new[0], : new[1]].astype(int) - resize(image, new))
    assert gap.max() <= 1
    assert (gap > 0).mean() < 0.02  # with plain rounding it is every eighth


def test_an_image_does_not_depend_on_its_company(trained_run: Path) -> None:
    ours = detector(trained_run)
    model = ExportedDetector(ours, described(ours))
    together, counts = run(model, images())
    for number, image in enumerate(images()):
        (alone,), (count,) = run(model, [image])
        assert counts[number] == count
        torch.testing.assert_close(together[number], alone, rtol=0, atol=1e-3)
        overlaps = pairwise_iou(together[number, :count, :4], alone[:count, :4])
        assert (overlaps.diagonal() > 0.999).all()
