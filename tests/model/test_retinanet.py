"""The detector against its oracle, torchvision's RetinaNet with the same weights and the same input."""

import copy
import inspect
import math
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

from faults import refused
from programs import Program
from retina.detections import postprocess
from retina.errors import ConfigError
from retina.losses.classification import Focal
from retina.losses.detection import DetectionLoss
from retina.model.retinanet import RetinaNet, retinanet
from retina.ops.assigners import MaxIoU
from retina.ops.boxes import decode
from retina.types import Targets

TINY = {"num_classes": 3, "backbone": "resnet18", "fpn_channels": 16, "head_convs": 1}


def torchvision_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under torchvision's names (v1 layout)."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("backbone.stem.", "backbone.body.").replace("backbone.layer", "backbone.body.layer")
        for i in range(3):
            key = key.replace(f"fpn.lateral.{i}.", f"backbone.fpn.inner_blocks.{i}.0.")
            key = key.replace(f"fpn.output.{i}.", f"backbone.fpn.layer_blocks.{i}.0.")
        key = key.replace("fpn.extra.0.", "backbone.fpn.extra_blocks.p6.")
        key = key.replace("fpn.extra.1.", "backbone.fpn.extra_blocks.p7.")
        for i in range(4):
            key = key.replace(f"head.classification.convs.{2 * i}.", f"head.classification_head.conv.{i}.0.")
            key = key.replace(f"head.box.convs.{2 * i}.", f"head.regression_head.conv.{i}.0.")
        key = key.replace("head.classification.predict.", "head.classification_head.cls_logits.")
        key = key.replace("head.box.predict.", "head.regression_head.bbox_reg.")
        renamed[key] = value
    return renamed


@pytest.fixture(scope="module")
def pair() -> tuple[RetinaNet, torch.nn.Module]:
    torch.manual_seed(0)
    ours = retinanet(num_classes=7, norm="frozen", p6_from="p5", anchors_rounded=True).eval()
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7, trainable_backbone_layers=0)
    theirs.eval()
    with torch.no_grad():  # weights with a signal: at the start every score is the prior
        for tower in (ours.head.classification, ours.head.box):
            tower.predict.weight.normal_(std=0.05)
        ours.head.classification.predict.bias.fill_(-3.0)
        for name, buffer in ours.backbone.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    missing, unexpected = theirs.load_state_dict(torchvision_layout(ours.state_dict()), strict=False)
    assert [key for key in missing if not key.endswith("num_batches_tracked")] == []
    assert unexpected == []
    return ours, theirs


@torch.no_grad()
def test_equals_torchvision_on_the_same_input(pair: tuple[RetinaNet, torch.nn.Module]) -> None:
    """Raw outputs in float32; detections from float64, for folded norms round otherwise, by 1e-4 of a pixel."""
    for ours, theirs in (pair, [copy.deepcopy(model).double() for model in pair]):
        _assert_equal_outputs(ours, theirs, exact=ours is not pair[0])


def _assert_equal_outputs(ours: RetinaNet, theirs: torch.nn.Module, exact: bool) -> None:
    # sides that are multiples of the coarsest stride, where torchvision's guess of the strides is exact
    images = torch.randint(0, 256, (2, 3, 256, 384), dtype=torch.uint8)
    predictions = ours(images)
    features = list(theirs.backbone(ours.normalize(images)).values())
    raw = theirs.head(features)

    tolerance = {"atol": 1e-9, "rtol": 1e-9} if exact else {"atol": 1e-4}
    assert torch.allclose(torch.cat(predictions.logits, 1), raw["cls_logits"], **tolerance)
    assert torch.allclose(torch.cat(predictions.deltas, 1), raw["bbox_regression"], **tolerance)

    listed = ImageList(ours.normalize(images), [(256, 384)] * 2)
    anchors = theirs.anchor_generator(listed, features)
    assert torch.allclose(torch.cat(predictions.anchors).to(anchors[0]), anchors[0], atol=1e-4)
    if not exact:
        return

    counts = [len(level) for level in predictions.anchors]
    split = {key: list(value.split(counts, dim=1)) for key, value in raw.items()}
    expected = theirs.postprocess_detections(split, [list(a.split(counts)) for a in anchors], listed.image_sizes)
    sizes = torch.tensor([[256, 384]] * 2)
    found = postprocess(predictions, sizes, max_detections=theirs.detections_per_img)
    assert min(len(one["scores"]) for one in expected) > 50
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other["labels"])
        assert torch.allclose(one.scores, other["scores"].float(), atol=1e-4)
        assert torch.allclose(one.boxes, other["boxes"].float(), atol=1e-4, rtol=1e-6)


def test_initial_classification_loss_is_the_analytic_one_of_the_prior() -> None:
    prior, alpha, gamma, k = 0.01, 0.25, 2.0, 3
    torch.manual_seed(0)
    model = retinanet(**TINY, prior=prior)
    torch.nn.init.zeros_(model.head.classification.predict.weight)  # leaves the bias alone to speak
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    predictions = model(images)
    objects = torch.tensor([[[10.0, 10.0, 60.0, 70.0]], [[40.0, 30.0, 100.0, 90.0]]])
    valid = torch.ones(2, 1, dtype=torch.bool)
    targets = Targets(objects, torch.zeros(2, 1, dtype=torch.int64), valid, ~valid)
    losses = DetectionLoss(
        assigner=MaxIoU(negative_iou=0.5),
        classification=Focal(alpha=alpha, gamma=gamma),  # nothing is ignored
    )(predictions, targets)

    positives = losses.num_positives.item()
    elements = 2 * sum(len(anchors) for anchors in predictions.anchors) * k
    of_positive = alpha * (1 - prior) ** gamma * -math.log(prior)
    of_negative = (1 - alpha) * prior**gamma * -math.log(1 - prior)
    expected = positives * of_positive + (elements - positives) * of_negative
    assert positives > 0
    assert losses.classification.item() == pytest.approx(expected, rel=1e-5)


def test_random_initialisation_starts_near_the_prior() -> None:
    torch.manual_seed(0)
    model = retinanet(**TINY)
    scores = torch.cat(model(torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)).logits, 1).sigmoid()
    assert scores.mean().item() == pytest.approx(0.01, rel=0.2)


def test_forward_is_the_same_in_training_and_evaluation() -> None:
    model = retinanet(**TINY, norm="group")
    images = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    for ours, theirs in zip(model.train()(images)[:3], model.eval()(images)[:3], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("levels", [(3, 4, 5), (2, 3, 4, 5, 6), (4, 5, 6, 7, 8), (3, 4), (2,)])
def test_any_set_of_levels(levels: tuple[int, ...]) -> None:
    model = retinanet(**TINY, levels=levels, anchor_ratios=(1.0,))
    assert model.strides == tuple(2**level for level in levels)
    predictions = model(torch.zeros(1, 3, 256, 512, dtype=torch.uint8))
    for logits, anchors, stride in zip(predictions.logits, predictions.anchors, model.strides, strict=True):
        assert logits.shape == (1, math.ceil(256 / stride) * math.ceil(512 / stride) * 3, 3)
        assert anchors.shape == (logits.shape[1], 4)
    areas = [((a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])).min().sqrt().item() for a in predictions.anchors]
    assert areas == pytest.approx([4 * stride for stride in model.strides], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_head_outputs_are_views_in_channels_last_memory(batch: int, dtype: torch.dtype) -> None:
    """Without a copy, whatever the batch and on levels of a single cell too."""
    model = retinanet(**TINY).to(memory_format=torch.channels_last)
    convolved: list[int] = []
    for tower in (model.head.classification, model.head.box):
        tower.predict.register_forward_hook(lambda _module, _inputs, output: convolved.append(output.data_ptr()))
    images = torch.zeros(batch, 3, 96, 128, dtype=torch.uint8)
    for given in (images, images.to(memory_format=torch.channels_last)):
        convolved.clear()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            predictions = model(given)
        outputs = (*predictions.logits, *predictions.deltas)
        assert all(output.is_contiguous() and output.dtype == dtype for output in outputs)
        assert [output.data_ptr() for output in outputs] == convolved


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_bfloat16_casts_every_weight_once_per_step(norm: str) -> None:
    """Although the head runs on five levels, and what a folded norm makes of a weight is no parameter."""
    model = retinanet(**TINY, norm=norm).train()
    images = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    casts: list[torch.Size] = []

    class CountCasts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten._to_copy.default and args[0].ndim == 4 and args[0].shape[-1] == args[0].shape[-2]:
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with CountCasts(), torch.autocast("cpu", torch.bfloat16):
        model(images)
    weights = [layer.weight.shape for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert sorted(shape for shape in casts if shape in weights) == sorted(weights)


def test_normalisation_is_per_channel_and_leaves_the_images_alone() -> None:
    model = retinanet(**TINY, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0))
    images = torch.full((1, 3, 2, 2), 40, dtype=torch.uint8)
    assert model.normalize(images)[0, :, 0, 1].tolist() == [30.0, 10.0, 2.5]
    assert (images == 40).all()


COMPILED = {
    "batch": {"norm": "batch"},
    "frozen": {"norm": "frozen"},
    "switches": {"norm": "batch", "neck": "pafpn", "head_norm": "group", "head_quality": True, "box_bins": 6},
    "timm": {"norm": "batch", "backbone": "timm:test_convnext"},
}


@pytest.mark.parametrize(
    "kind", ["batch", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(COMPILED)[1:])]
)
def test_compiles_once_per_canvas_and_mode(kind: str) -> None:
    """In a process of its own: here, every function is wrapped in type checks that a compiler cannot trace."""
    program = Program(__file__, kind, cwd=Path(__file__).parent)
    _, err = program.communicate(timeout=1000)
    assert program.returncode == 0, err


def compile_and_compare(kind: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = retinanet(**TINY | COMPILED[kind], levels=(3, 4), frozen_stages=2).to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="eager" if kind == "batch" else "aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    sizes = torch.tensor([[50, 60], [64, 33]])
    canvases = [torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8) for size in ((64, 96), (96, 64))]

    def use(model: RetinaNet) -> list[list[Tensor]]:
        """All outputs and gradients of a step and an evaluation on each canvas."""
        found = []
        for images in canvases:
            model.train()
            model.zero_grad()
            predictions = model(images, sizes)
            outputs = [*predictions.logits, *predictions.deltas]
            outputs += [*(predictions.quality or ()), *(predictions.bins or ())]
            torch.stack([output.square().mean() for output in outputs]).sum().backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.eval()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                evaluated = model(images, sizes)
            found.append([*outputs, *grads, *evaluated.logits, *evaluated.deltas])
        return found

    counters = torch._dynamo.utils.counters
    for ours, theirs in zip(use(compiled), use(plain), strict=True):
        assert len(ours) == len(theirs) > 20
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    stats = dict(counters["stats"])
    assert stats["unique_graphs"] == len(canvases) * 2, stats
    assert not counters["graph_break"], counters["graph_break"]
    first = use(compiled)
    use(plain)
    compiled.load_state_dict(plain.state_dict())  # other weights, the same graphs
    for ours, theirs in zip(use(compiled), use(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    went_on = not torch.equal(first[0][-1], use(compiled)[0][-1])
    assert went_on == (kind in ("batch", "switches"))  # learned statistics; the others have none
    assert counters["stats"]["unique_graphs"] == stats["unique_graphs"], "compiled again"


def test_names_in_the_default_state_dict_stay() -> None:
    """Weights files of every version hold them."""
    with torch.device("meta"):
        model = retinanet(num_classes=3)
        resnet = torchvision.models.resnet50(weights=None)
    stem = ("conv1.", "bn1.")
    backbone = [
        f"backbone.{'stem.' if key.startswith(stem) else ''}{key}"
        for key in resnet.state_dict()
        if not key.startswith("fc.")
    ]
    layers = [f"fpn.{part}.{i}" for part, count in (("lateral", 3), ("output", 3), ("extra", 2)) for i in range(count)]
    for tower in ("classification", "box"):
        layers += [f"head.{tower}.convs.{i}" for i in (0, 2, 4, 6)] + [f"head.{tower}.predict"]
    assert list(model.state_dict()) == backbone + [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert sum(p.numel() for p in model.parameters()) == 36_371_327


def test_arguments_of_earlier_versions_still_build_the_same_model() -> None:
    """A card lacks what came later, and the defaults of that are what was then."""
    later = {"norm_eps", "stride_in_1x1", "neck", "p7_relu", "head_quality", "head_scales", "box_bins"}
    later |= {"anchor_offset"}
    model = retinanet(**TINY)
    assert later < model.arguments.keys()
    again = retinanet(**{key: value for key, value in model.arguments.items() if key not in later})
    again.load_state_dict(model.state_dict())
    assert again.arguments == model.arguments
    images = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    for one, other in zip(again.eval()(images)[:3], model.eval()(images)[:3], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


SWITCHES = {
    "head_quality": {"head_quality": True},
    "head_scales": {"head_scales": True},
    "box_bins": {"box_bins": 17},
    "neck": {"neck": "pafpn"},
    "p2": {"levels": (2, 3)},
    "p6 from p5": {"p6_from": "p5", "p7_relu": False, "levels": (3, 4, 5, 6, 7)},
    "centres": {"anchor_offset": 0.5},
    "one anchor": {"anchor_scales": (2.0,), "anchor_ratios": (1.0,)},
    "group": {"head_norm": "group"},
}
SWITCHES["all"] = {key: value for switch in SWITCHES.values() for key, value in switch.items()}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_goes_forward_and_backward(name: str) -> None:
    torch.manual_seed(0)
    model = retinanet(**TINY | {"levels": (3, 4)} | SWITCHES[name]).to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    predictions = model(images)
    counts = [len(anchors) for anchors in predictions.anchors]
    cells = [math.ceil(64 / stride) * math.ceil(96 / stride) for stride in model.strides]
    assert counts == [n * model.anchors.num_per_cell for n in cells]
    assert [x.shape for x in predictions.logits] == [(2, n, 3) for n in counts]
    assert [x.shape for x in predictions.deltas] == [(2, n, 4) for n in counts]
    assert (predictions.quality is None) == (not model.arguments["head_quality"])
    assert (predictions.bins is None) == (model.arguments["box_bins"] is None)
    if predictions.quality is not None:
        assert [x.shape for x in predictions.quality] == [(2, n) for n in counts]
    if predictions.bins is not None:
        assert [x.shape for x in predictions.bins] == [(2, n, 4, 17) for n in counts]
    outputs = (*predictions.logits, *predictions.deltas, *(predictions.quality or ()), *(predictions.bins or ()))
    torch.cat([x.flatten() for x in outputs]).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.device("meta"):
        assert retinanet(**model.arguments).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_deltas_of_distributions_decode_to_the_box_of_their_means(rounded: bool, dtype: torch.dtype) -> None:
    """On every level, for every anchor of a cell: centre of the anchor +- mean x stride."""
    torch.manual_seed(0)
    model = retinanet(**TINY, box_bins=9, anchors_rounded=rounded, anchor_offset=0.5).eval()
    torch.nn.init.normal_(model.head.box.predict.weight, std=2.0)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        predictions = model(torch.randint(0, 256, (2, 3, 128, 192), dtype=torch.uint8))
    assert predictions.bins is not None
    levels = zip(predictions.bins, predictions.deltas, predictions.anchors, model.strides, strict=True)
    for bins, deltas, anchors, stride in levels:
        assert bins.dtype == dtype
        assert deltas.dtype == torch.float32
        means = (bins.double().softmax(dim=-1) * torch.arange(9)).sum(dim=-1) * stride
        assert means.std() > 0.1 * stride  # they differ
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2
        expected = torch.cat((centre - means[..., :2], centre + means[..., 2:]), dim=-1)
        torch.testing.assert_close(decode(deltas, anchors).double(), expected, rtol=0, atol=1e-3)


def test_distributions_start_from_their_anchors() -> None:
    """As deltas do, whatever the scales and ratios; with sizes that differ in strides, from the mean over levels."""
    model = retinanet(**TINY, box_bins=17)
    torch.nn.init.zeros_(model.head.box.predict.weight)
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    predictions = model(images)
    assert len(model.anchors.cell(32.0).unique(dim=0)) == 9
    for deltas in predictions.deltas:
        torch.testing.assert_close(deltas, torch.zeros_like(deltas), rtol=0, atol=1e-4)

    sizes = [(2.0 + level) * stride for level, stride in enumerate(model.strides)]  # 2 to 6 strides
    model = retinanet(**TINY, box_bins=17, anchor_sizes=sizes, anchor_scales=[1.0], anchor_ratios=[1.0])
    torch.nn.init.zeros_(model.head.box.predict.weight)
    predictions = model(images)
    for deltas, anchors, stride in zip(predictions.deltas, predictions.anchors, model.strides, strict=True):
        boxes = decode(deltas[0], anchors)
        torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], torch.full((len(boxes), 2), 4.0 * stride))


def test_arguments_rebuild_the_model() -> None:
    model = retinanet(
        **TINY, anchor_ratios=(0.5, 2.0), levels=(3, 4, 5), anchor_offset=0.5, norm_eps=1e-3, p7_relu=False
    )
    again = retinanet(**model.arguments)
    assert (again.anchors.offset, again.fpn.p7_relu, again.backbone.stem.bn1.eps) == (0.5, False, 1e-3)
    assert again.arguments == model.arguments
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert again.anchors == model.anchors


@pytest.mark.parametrize(
    ("wrong", "code", "key"),
    [
        ({"backbone": "resnet19"}, "unknown-value", "backbone"),
        ({"norm": "layer"}, "unknown-value", "norm"),
        ({"frozen_stages": 6}, "out-of-range", "frozen_stages"),
        ({"levels": (3, 5)}, "out-of-range", "levels"),
        ({"levels": (1, 2)}, "out-of-range", "levels"),
        ({"levels": (6, 7)}, "out-of-range", "levels"),
        ({"levels": ()}, "out-of-range", "levels"),
        ({"p6_from": "c4"}, "unknown-value", "p6_from"),
        ({"head_norm": "batch"}, "unknown-value", "head_norm"),
        ({"prior": 0.0}, "out-of-range", "prior"),
        ({"anchor_sizes": (32.0, 64.0)}, "out-of-range", "anchor_sizes"),
        ({"anchor_offset": -0.5}, "out-of-range", "anchor_offset"),
        ({"canvas_strides": True, "box_bins": 9}, "contradiction", "canvas_strides"),
        ({"neck": "bifpn"}, "unknown-value", "neck"),
        ({"box_bins": 1}, "out-of-range", "box_bins"),
        ({"box_bins": 10**12}, "out-of-range", "box_bins"),
        ({"fpn_channels": 10**12}, "out-of-range", "fpn_channels"),
        ({"head_channels": 10**12}, "out-of-range", "head_channels"),
        ({"head_convs": 10**12}, "out-of-range", "head_convs"),
        ({"anchor_scales": [1.0] * 40, "anchor_ratios": [1.0] * 40}, "out-of-range", "anchor_ratios"),
        ({"norm_eps": -1.0}, "out-of-range", "norm_eps"),
        ({"stride_in_1x1": True}, "contradiction", "stride_in_1x1"),
        ({"num_classes": 0}, "out-of-range", "num_classes"),
        ({"mean": (1.0, 2.0)}, "out-of-range", "std"),  # mean says how many channels there are
        ({"mean": (1.0, 2.0, math.nan)}, "out-of-range", "mean"),
        ({"std": (1.0, 1.0, 0.0)}, "out-of-range", "std"),
        ({"fpn_channels": 0}, "out-of-range", "fpn_channels"),
        ({"head_channels": -4}, "out-of-range", "head_channels"),
        ({"head_convs": -1}, "out-of-range", "head_convs"),
    ],
)
def test_values_that_do_not_fit_are_named(wrong: dict[str, object], code: str, key: str) -> None:
    with refused(code, f"{key}: ", kind=ConfigError):
        retinanet(**(TINY | wrong))


def test_whole_numbers_are_a_mean_and_std_too() -> None:
    """As in `model.mean=[127,127,127]` on a command line."""
    model = inspect.unwrap(retinanet)(**TINY, mean=[127, 127, 127], std=[64, 64, 64])
    same = retinanet(**TINY, mean=[127.0, 127.0, 127.0], std=[64.0, 64.0, 64.0])
    images = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(model.normalize(images), same.normalize(images))
    assert model.normalize(images).dtype == torch.float32


@pytest.mark.parametrize(
    "images", [torch.rand(1, 3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64, 3).byte()]
)
def test_images_of_another_type_or_shape_are_refused(images: Tensor) -> None:
    """Floats from 0 to 1 would give predictions that are silently wrong."""
    model = retinanet(**TINY)
    forward = inspect.unwrap(RetinaNet.forward)  # without the type checks of these tests
    with pytest.raises(ValueError, match="uint8"):
        forward(model, images)


if __name__ == "__main__":
    compile_and_compare(sys.argv[1])
